# /// script
# dependencies = ["hf-moe"]
# ///

"""Mimic distillation (LLaVA-MoD): a student learns the predictions of a teacher, with images or without.

```bash
python -m hf_moe.trainers.scripts.mimic \
    --model_name_or_path ./student \
    --teacher_model_name_or_path ./teacher \
    --dataset_name my-conversations \
    --learning_rate 2.0e-5 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.03 \
    --output_dir student-mimic
```

A dense student is trained on the divergence alone, a Mixture-of-Experts (`hf-moe upcycle`) on the labels too.
Image-text models want `--max_length None` in YAML (`max_length: null`): a cut image is no image.

# Several processes, the teacher whole on each
```bash
accelerate launch --multi_gpu --num_processes 2 -m hf_moe.trainers.scripts.mimic --config mimic.yaml
hf-moe train mimic --config mimic.yaml --multi_gpu --num_processes 2
```
"""

import argparse


__all__ = ["main", "make_parser"]


def main(script_args, training_args, model_args, dataset_args) -> None:
    """Trains with [`~hf_moe.trainers.MimicDistillationTrainer`] what the parsed arguments describe."""
    from hf_moe.trainers import MimicDistillationTrainer
    from hf_moe.trainers.scripts.runner import run_training

    run_training(MimicDistillationTrainer, script_args, training_args, model_args, dataset_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from hf_moe.trainers import MimicDistillationConfig
    from hf_moe.trainers.scripts.runner import make_script_parser

    return make_script_parser(MimicDistillationConfig, "mimic", subparsers, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
