# /// script
# dependencies = ["hf-moe"]
# ///

"""Unlearning in a Mixture-of-Experts model by training one expert and its router.

# One expert, negative preference optimization
```bash
python -m hf_moe.trainers.scripts.unlearning \
    --model_name_or_path Qwen/Qwen1.5-MoE-A2.7B-Chat \
    --forget_dataset ./forget.jsonl \
    --retain_dataset ./retain.jsonl \
    --forget_loss npo \
    --max_steps 200 \
    --eval_strategy steps \
    --eval_steps 20 \
    --save_steps 20 \
    --load_best_model_at_end \
    --output_dir qwen-moe-unlearned
```
Rows have `text`, `messages` or `input_ids`. The adapter goes to `--output_dir`; with `--merge` the whole model, in
the layout of its family.

# Several processes
```bash
hf-moe train unlearning --config unlearning.yaml --multi_gpu --num_processes 2
```
"""

import argparse
from dataclasses import dataclass, field
from typing import Any


__all__ = ["UnlearningScriptArguments", "main", "make_parser"]


@dataclass
class UnlearningScriptArguments:
    """What the script reads and writes.

    Args:
        model_name_or_path (`str`): Model to start from.
        forget_dataset (`str`): What to forget: a Hub id, a local folder, or a file (JSON lines, CSV, Parquet, text).
        retain_dataset (`str`, *optional*): What to keep.
        eval_forget_dataset, eval_retain_dataset (`str`, *optional*): What to evaluate with; the same by default.
        dataset_split (`str`, defaults to `"train"`): Split of all of them.
        dtype (`str`, defaults to `"auto"`): Of the weights.
        attn_implementation (`str`, *optional*): As in `from_pretrained`.
        trust_remote_code (`bool`, defaults to `False`): As in `from_pretrained`.
        merge (`bool`, defaults to `False`): Write the slices back and save the whole model.
    """

    model_name_or_path: str = field(metadata={"help": "Model to start from."})
    forget_dataset: str = field(metadata={"help": "What to forget: a Hub id, a local folder, or a file."})
    retain_dataset: str | None = field(default=None, metadata={"help": "What to keep."})
    eval_forget_dataset: str | None = field(default=None, metadata={"help": "Forget set of evaluations."})
    eval_retain_dataset: str | None = field(default=None, metadata={"help": "Retain set of evaluations."})
    dataset_split: str = field(default="train", metadata={"help": "Split of all data sets."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code of the model's repository."})
    merge: bool = field(default=False, metadata={"help": "Write the slices back and save the whole model."})


def main(script_args: UnlearningScriptArguments, training_args: Any) -> None:
    """Unlearns with [`~hf_moe.trainers.ExpertUnlearningTrainer`] what the parsed arguments describe, and saves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_moe  # noqa: F401  makes our model types known
    from hf_moe.trainers import ExpertUnlearningTrainer

    names = ("forget_dataset", "retain_dataset", "eval_forget_dataset", "eval_retain_dataset")
    data = {name: load_rows(getattr(script_args, name), script_args.dataset_split, name) for name in names}
    options = {"trust_remote_code": script_args.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(
        script_args.model_name_or_path,
        dtype=script_args.dtype,
        attn_implementation=script_args.attn_implementation,
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(script_args.model_name_or_path, **options)
    trainer = ExpertUnlearningTrainer(model, training_args, processing_class=tokenizer, **data)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    if script_args.merge and training_args.trainable == "expert":
        merged = trainer.model.merge_and_unload()
        if training_args.should_save:
            merged.save_pretrained(training_args.output_dir)
            tokenizer.save_pretrained(training_args.output_dir)
    else:
        trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")


def load_rows(source: str | None, split: str, name: str) -> Any:
    """A data set from the Hub, a folder or a file.

    Args:
        source (`str`, *optional*): Where it is.
        split (`str`): Which split.
        name (`str`): The argument, for messages.

    Returns:
        `datasets.Dataset`, or `None` without a source.

    Raises:
        ValueError: there is no such split.
    """
    import os

    from datasets import load_dataset

    if source is None:
        return None
    if os.path.isfile(source):
        kind = os.path.splitext(source)[1].lower().lstrip(".")
        loaded = load_dataset({"jsonl": "json", "txt": "text"}.get(kind, kind), data_files=source)
    else:
        loaded = load_dataset(source)
    if split not in loaded:
        raise ValueError(f"`--dataset_split {split}` is not in `--{name} {source}`, which has {sorted(loaded)}.")
    return loaded[split]


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from trl import TrlParser

    from hf_moe.trainers import ExpertUnlearningConfig

    types: Any = (UnlearningScriptArguments, ExpertUnlearningConfig)
    if subparsers is not None:
        return subparsers.add_parser("unlearning", help="Run the unlearning script", dataclass_types=types)
    return TrlParser(types, prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
