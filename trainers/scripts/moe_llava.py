# /// script
# dependencies = ["hf-moe"]
# ///

"""The three stages of MoE-LLaVA's training, from a LLaVA whose projector is new to a sparse one.

# Stage 1: projector, on captions
```bash
python -m hf_moe.trainers.scripts.moe_llava \
    --stage 1 \
    --model_name_or_path ./my-llava \
    --dataset_name ./captions \
    --per_device_train_batch_size 32 \
    --num_train_epochs 1 \
    --output_dir my-llava-1
```

# Stage 2: projector and language model, on instructions
```bash
python -m hf_moe.trainers.scripts.moe_llava \
    --stage 2 \
    --model_name_or_path ./my-llava-1 \
    --dataset_name ./instructions \
    --per_device_train_batch_size 16 \
    --output_dir my-llava-2
```

# Stage 3: the dense model becomes sparse, and its feed-forwards and routers are trained
```bash
python -m hf_moe.trainers.scripts.moe_llava \
    --stage 3 \
    --model_name_or_path ./my-llava-2 \
    --dataset_name ./instructions \
    --num_experts 4 \
    --num_experts_per_tok 2 \
    --moe_layers sparse \
    --per_device_train_batch_size 16 \
    --output_dir my-moe-llava
```
Rows have `images` and `messages` (or `prompt` and `completion`), as TRL's vision collator reads them.

# Several processes
```bash
accelerate launch --multi_gpu --num_processes 8 -m hf_moe.trainers.scripts.moe_llava --config stage3.yaml
hf-moe train moe-llava --stage 3 --config stage3.yaml --multi_gpu --num_processes 8
```
With `--use_cpu --bf16 False` these are processes on the CPU (`--cpu` of accelerate silently runs one).
"""

import argparse


__all__ = ["main", "make_parser"]


def main(script_args, training_args, model_args, dataset_args) -> None:
    """Trains with [`~hf_moe.trainers.moe_tuning_trainer`] what the parsed arguments describe."""
    from hf_moe.trainers import moe_tuning_trainer
    from hf_moe.trainers.scripts.runner import run_training

    run_training(moe_tuning_trainer, script_args, training_args, model_args, dataset_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from hf_moe.trainers import MoeTuningConfig
    from hf_moe.trainers.scripts.runner import make_script_parser

    return make_script_parser(MoeTuningConfig, "moe-llava", subparsers, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
