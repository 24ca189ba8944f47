# /// script
# dependencies = ["hf-moe"]
# ///

"""Mixture-of-Students: a shallower Mixture-of-Experts learns from a deeper one, and after a while by itself.

# A student of 21 layers from a PR-MoE of 24, from random weights
```bash
python -m hf_moe.trainers.scripts.staged_distillation \
    --teacher_model_name_or_path ./pr-moe \
    --student_drop_every 8 \
    --dataset_name roneneldan/TinyStories \
    --kd_stop_step 7000 \
    --max_steps 10000 \
    --learning_rate 3.0e-4 \
    --packing \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 4 \
    --output_dir mixture-of-students
```

# A student that exists, adapted with LoRA
```bash
python -m hf_moe.trainers.scripts.staged_distillation \
    --model_name_or_path ./smollm2-moe \
    --teacher_model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct \
    --dataset_name trl-lib/Capybara \
    --kd_weight 0.5 \
    --kd_temperature 2 \
    --learning_rate 2.0e-4 \
    --use_peft \
    --lora_dropout 0 \
    --lora_target_modules q_proj v_proj \
    --lora_target_parameters mlp.experts.gate_up_proj mlp.experts.down_proj \
    --output_dir smollm2-moe-distilled
```

# Several processes
```bash
accelerate launch --multi_gpu --num_processes 2 -m hf_moe.trainers.scripts.staged_distillation --config mos.yaml
hf-moe train staged-distillation --config mos.yaml --multi_gpu --num_processes 2
```
With `--use_cpu --bf16 False` these are two processes on the CPU (`--cpu` of accelerate silently runs one).
"""

import argparse


__all__ = ["main", "make_parser"]


def main(script_args, training_args, model_args, dataset_args) -> None:
    """Trains with [`~hf_moe.trainers.StagedDistillationTrainer`] what the parsed arguments describe."""
    from hf_moe.trainers import StagedDistillationTrainer
    from hf_moe.trainers.scripts.runner import run_training

    run_training(StagedDistillationTrainer, script_args, training_args, model_args, dataset_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from hf_moe.trainers import StagedDistillationConfig
    from hf_moe.trainers.scripts.runner import make_script_parser

    return make_script_parser(StagedDistillationConfig, "staged-distillation", subparsers, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
