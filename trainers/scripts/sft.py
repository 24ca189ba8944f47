# /// script
# dependencies = ["hf-moe"]
# ///

"""Supervised fine-tuning of a Mixture-of-Experts model.

# Full training
```bash
python -m hf_moe.trainers.scripts.sft \
    --model_name_or_path ./smollm2-moe \
    --dataset_name trl-lib/Capybara \
    --balance_mode running \
    --learning_rate 2.0e-5 \
    --router_learning_rate 2.0e-4 \
    --num_train_epochs 1 \
    --packing \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --output_dir smollm2-moe-sft
```

# LoRA on attention and on every expert
```bash
python -m hf_moe.trainers.scripts.sft \
    --model_name_or_path ./smollm2-moe \
    --dataset_name trl-lib/Capybara \
    --learning_rate 2.0e-4 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --use_peft \
    --lora_r 32 \
    --lora_alpha 16 \
    --lora_dropout 0 \
    --lora_target_modules q_proj v_proj \
    --lora_target_parameters mlp.experts.gate_up_proj mlp.experts.down_proj \
    --output_dir smollm2-moe-sft-lora
```

# Several processes
```bash
accelerate launch --multi_gpu --num_processes 2 -m hf_moe.trainers.scripts.sft --config sft.yaml
hf-moe train sft --config sft.yaml --multi_gpu --num_processes 2
```
With `--use_cpu --bf16 False` these are two processes on the CPU (`--cpu` of accelerate silently runs one).
"""

import argparse


__all__ = ["main", "make_parser"]


def main(script_args, training_args, model_args, dataset_args) -> None:
    """Trains with [`~hf_moe.trainers.MoeSFTTrainer`] what the parsed arguments describe."""
    from hf_moe.trainers import MoeSFTTrainer
    from hf_moe.trainers.scripts.runner import run_training

    run_training(MoeSFTTrainer, script_args, training_args, model_args, dataset_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from hf_moe.trainers import MoeSFTConfig
    from hf_moe.trainers.scripts.runner import make_script_parser

    return make_script_parser(MoeSFTConfig, "sft", subparsers, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
