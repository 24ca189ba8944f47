# /// script
# dependencies = ["hf-moe"]
# ///

"""EvoMoE: one expert per layer, then many, with a gate that goes from dense to sparse.

# From a dense model
```bash
python -m hf_moe.trainers.scripts.evomoe \
    --model_name_or_path HuggingFaceTB/SmolLM2-135M \
    --dataset_name roneneldan/TinyStories \
    --num_experts 8 \
    --max_steps 20000 \
    --expert_steps 0.2 \
    --temperature_steps 0.5 \
    --hard_after 0.5 \
    --learning_rate 3.0e-4 \
    --lr_scheduler_type cosine \
    --packing \
    --per_device_train_batch_size 8 \
    --save_steps 1000 \
    --output_dir smollm2-evomoe
```
Checkpoints are in `phase1` and `phase2` of `--output_dir`; with `--resume_from_checkpoint True` an interrupted run
goes on in the phase it was in. `--max_active_experts 4` bounds what the dense part of phase 2 costs.

# Several processes
```bash
accelerate launch --multi_gpu --num_processes 2 -m hf_moe.trainers.scripts.evomoe --config evomoe.yaml
hf-moe train evomoe --config evomoe.yaml --multi_gpu --num_processes 2
```
"""

import argparse
from typing import Any


__all__ = ["main", "make_parser"]


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Trains both phases with [`~hf_moe.trainers.train_evomoe`] and saves the result."""
    from transformers import AutoTokenizer
    from trl import get_peft_config

    import hf_moe
    from hf_moe.trainers import MoeSFTTrainer, train_evomoe
    from hf_moe.trainers.scripts.runner import load_splits
    from hf_moe.upcycling.sources import load_source

    data = load_splits(script_args, training_args, dataset_args)
    model = load_source(model_args.model_name_or_path, "--model_name_or_path")
    if model_args.dtype not in (None, "auto"):
        import torch

        model = model.to(getattr(torch, model_args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    options = {"processing_class": tokenizer, "peft_config": get_peft_config(model_args), **data}
    trainer = train_evomoe(model, training_args, MoeSFTTrainer, **options)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub and trainer.is_world_process_zero():
        repository = training_args.hub_model_id or training_args.output_dir
        hf_moe.push_to_hub(trainer.accelerator.unwrap_model(trainer.model), repository, tokenizer=tokenizer)
    trainer.end()


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from hf_moe.trainers import EvoMoEConfig
    from hf_moe.trainers.scripts.runner import make_script_parser

    return make_script_parser(EvoMoEConfig, "evomoe", subparsers, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
