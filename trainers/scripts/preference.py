# /// script
# dependencies = ["hf-moe"]
# ///

"""Preference distillation (LLaVA-MoD): a student learns which answers to prefer, with its teacher as the reference.

```bash
python -m hf_moe.trainers.scripts.preference \
    --model_name_or_path ./student \
    --teacher_model_name_or_path ./teacher \
    --dataset_name my-preferences \
    --learning_rate 2.0e-6 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.03 \
    --output_dir student-preference
```

`--loss_type kto_pair` is the loss of the released code. `--precompute_ref_log_probs` runs the teacher once, before
training; `--teacher_device cpu` keeps it off the accelerator.

# Several processes, the teacher whole on each
```bash
accelerate launch --multi_gpu --num_processes 2 -m hf_moe.trainers.scripts.preference --config preference.yaml
hf-moe train preference --config preference.yaml --multi_gpu --num_processes 2
```
"""

import argparse


__all__ = ["main", "make_parser"]


def main(script_args, training_args, model_args, dataset_args) -> None:
    """Trains with [`~hf_moe.trainers.PreferenceDistillationTrainer`] what the parsed arguments describe."""
    from hf_moe.trainers import PreferenceDistillationTrainer
    from hf_moe.trainers.scripts.runner import run_training

    run_training(PreferenceDistillationTrainer, script_args, training_args, model_args, dataset_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from hf_moe.trainers import PreferenceDistillationConfig
    from hf_moe.trainers.scripts.runner import make_script_parser

    return make_script_parser(PreferenceDistillationConfig, "preference", subparsers, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
