# /// script
# dependencies = ["hf-moe"]
# ///

"""Direct preference optimization of a Mixture-of-Experts model.

# Full training
```bash
python -m hf_moe.trainers.scripts.dpo \
    --model_name_or_path ./smollm2-moe-sft \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --balance_mode running \
    --learning_rate 5.0e-7 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --output_dir smollm2-moe-dpo
```

# LoRA on attention and on every expert
```bash
python -m hf_moe.trainers.scripts.dpo \
    --model_name_or_path ./smollm2-moe-sft \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --learning_rate 5.0e-6 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --use_peft \
    --lora_r 32 \
    --lora_alpha 16 \
    --lora_dropout 0 \
    --lora_target_modules q_proj v_proj \
    --lora_target_parameters mlp.experts.gate_up_proj mlp.experts.down_proj \
    --output_dir smollm2-moe-dpo-lora
```

# Several processes
```bash
accelerate launch --multi_gpu --num_processes 2 -m hf_moe.trainers.scripts.dpo --config dpo.yaml
hf-moe train dpo --config dpo.yaml --multi_gpu --num_processes 2
```
With `--use_cpu --bf16 False` these are two processes on the CPU (`--cpu` of accelerate silently runs one).
"""

import argparse


__all__ = ["main", "make_parser"]


def main(script_args, training_args, model_args, dataset_args) -> None:
    """Trains with [`~hf_moe.trainers.MoeDPOTrainer`] what the parsed arguments describe."""
    from hf_moe.trainers import MoeDPOTrainer
    from hf_moe.trainers.scripts.runner import run_training

    run_training(MoeDPOTrainer, script_args, training_args, model_args, dataset_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from hf_moe.trainers import MoeDPOConfig
    from hf_moe.trainers.scripts.runner import make_script_parser

    return make_script_parser(MoeDPOConfig, "dpo", subparsers, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
