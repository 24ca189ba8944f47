# /// script
# dependencies = ["hf-moe"]
# ///

"""Uni-MoE: connectors are aligned, experts tuned on different modalities, and all of it tuned on everything.

# All three phases
```bash
python -m hf_moe.trainers.scripts.uni_moe \
    --model_name_or_path ./my-uni-moe \
    --dataset_name ./rows \
    --expert_data image+text speech+image video \
    --max_steps 1000 \
    --per_device_train_batch_size 16 \
    --output_dir my-uni-moe-tuned
```
The model is a `uni_moe` of one expert per layer (`upcycle_uni_moe(language_model, 1, 1, vision_encoder=...,
speech_model=...)`), saved with its processor. Rows have `prompt` and `completion`, and lists `images`, `videos`,
`speech` (waveforms) or `audio`, one placeholder in the prompt for each; phases choose among them.

# One phase at a time
```bash
python -m hf_moe.trainers.scripts.uni_moe --phase 1 --connectors speech --model_name_or_path ./my-uni-moe ...
python -m hf_moe.trainers.scripts.uni_moe --phase 2 --expert_data speech+image --model_name_or_path ./aligned ...
python -m hf_moe.trainers.scripts.uni_moe --phase 3 --expert_models ./a ./b ./c --model_name_or_path ./a ...
```
An interrupted run goes on with `--resume_from_checkpoint True`.

# Several processes
```bash
accelerate launch --multi_gpu --num_processes 2 -m hf_moe.trainers.scripts.uni_moe --config uni_moe.yaml
hf-moe train uni-moe --config uni_moe.yaml --multi_gpu --num_processes 2
```
With `--use_cpu` these are processes on the CPU (`--cpu` of accelerate silently runs one).
"""

import argparse
from typing import Any


__all__ = ["main", "make_parser"]


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Trains with [`~hf_moe.trainers.train_uni_moe`] what the parsed arguments describe."""
    from accelerate import PartialState
    from transformers import AutoProcessor

    import hf_moe
    from hf_moe.trainers import train_uni_moe
    from hf_moe.trainers.scripts.runner import load_splits
    from hf_moe.upcycling.sources import load_source

    if model_args.use_peft:
        raise ValueError("`--use_peft` does not apply: phase 3 has its adapter (`--adapter_rank`, `--adapter_alpha`).")
    model = load_source(model_args.model_name_or_path, "--model_name_or_path")
    if model_args.dtype not in (None, "auto"):
        import torch

        model = model.to(getattr(torch, model_args.dtype))
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    data = load_splits(script_args, training_args, dataset_args)
    model = train_uni_moe(model, training_args, processing_class=processor, **data)
    state = PartialState()
    state.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub and state.is_main_process:
        repository = training_args.hub_model_id or training_args.output_dir
        hf_moe.push_to_hub(model, repository, tokenizer=processor)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from hf_moe.trainers import UniMoeTrainingArguments
    from hf_moe.trainers.scripts.runner import make_script_parser

    return make_script_parser(UniMoeTrainingArguments, "uni-moe", subparsers, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
