# /// script
# dependencies = ["hf-moe"]
# ///

"""Tunes a Read-ME model by turns: its router on routing distillation, its experts on the language-model loss.

# A converted model, on text
```bash
hf-moe refactor HuggingFaceTB/SmolLM2-135M-Instruct ./smollm2-readme
python -m hf_moe.trainers.scripts.read_me \
    --model_name_or_path ./smollm2-readme \
    --dataset_name ./text.jsonl \
    --block_length 1024 \
    --rounds 8 \
    --router_steps 100 \
    --expert_steps 200 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 8 \
    --output_dir smollm2-readme-tuned
```
Rows have a text (`--text_column`). The teacher is the dense model that was converted, by default the one that the
model's config names.

# Several processes
```bash
accelerate launch --multi_gpu --num_processes 2 -m hf_moe.trainers.scripts.read_me --config read_me.yaml
hf-moe train read-me --config read_me.yaml --multi_gpu --num_processes 2
```
With `--use_cpu` these are two processes on the CPU (`--cpu` of accelerate silently runs one).
"""

import argparse
from dataclasses import dataclass, field
from typing import Any


__all__ = ["ReadMeScriptArguments", "main", "make_parser"]


@dataclass
class ReadMeScriptArguments:
    """What the script reads.

    Args:
        model_name_or_path (`str`): The converted model.
        dataset_name (`str`): A Hub id, a local folder, or a file (JSON lines, CSV, Parquet, text).
        teacher_name_or_path (`str`, *optional*): The dense model; what the model's config says by default.
        train_split (`str`, defaults to `"train"`): What to train on.
        eval_split (`str`, *optional*): What to evaluate on.
        text_column (`str`, defaults to `"text"`): Where the text is.
        block_length (`int`, defaults to 1024): Tokens per row; texts are joined and cut.
        dtype (`str`, defaults to `"auto"`): Of both models' weights.
        trust_remote_code (`bool`, defaults to `False`): As in `from_pretrained`.
    """

    model_name_or_path: str = field(metadata={"help": "The converted model."})
    dataset_name: str = field(metadata={"help": "A Hub id, a local folder, or a file."})
    teacher_name_or_path: str | None = field(default=None, metadata={"help": "The dense model it was made from."})
    train_split: str = field(default="train", metadata={"help": "What to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "What to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "Where the text is."})
    block_length: int = field(default=1024, metadata={"help": "Tokens per row; texts are joined and cut."})
    dtype: str = field(default="auto", metadata={"help": "Of both models' weights."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code of the models' repositories."})


def main(script_args: ReadMeScriptArguments, training_args: Any) -> None:
    """Tunes with [`~hf_moe.trainers.ReadMeTrainer`] what the parsed arguments describe, and saves.

    Raises:
        ValueError: no dense model is known, or the data have no such column or less than a block.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_moe  # noqa: F401  makes our model types known
    from hf_moe.trainers import ReadMeTrainer

    options = {"dtype": script_args.dtype, "trust_remote_code": script_args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(
        script_args.model_name_or_path, trust_remote_code=script_args.trust_remote_code
    )
    train = blocks(script_args, script_args.train_split, tokenizer)
    evaluation = blocks(script_args, script_args.eval_split, tokenizer) if script_args.eval_split else None
    model = AutoModelForCausalLM.from_pretrained(script_args.model_name_or_path, **options)
    teacher = None
    if training_args.router_steps:
        source = script_args.teacher_name_or_path or (getattr(model.config, "upcycling", None) or {}).get("source")
        if not source:
            raise ValueError(
                "no dense model is known: give `--teacher_name_or_path`, the model that was converted, or "
                "`--router_steps 0`."
            )
        teacher = AutoModelForCausalLM.from_pretrained(source, **options)
    trainer = ReadMeTrainer(
        model,
        training_args,
        teacher=teacher,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")


def blocks(script_args: ReadMeScriptArguments, split: str, tokenizer: Any) -> Any:
    """A split's texts as rows of `block_length` tokens.

    Args:
        script_args ([`ReadMeScriptArguments`]): Which data.
        split (`str`): Which split.
        tokenizer: The model's tokenizer.

    Returns:
        [`~hf_moe.quickstart.data.TokenBlocks`]

    Raises:
        ValueError: no such column, or less text than a block.
    """
    from hf_moe.quickstart.data import TokenBlocks, pack
    from hf_moe.trainers.scripts.unlearning import load_rows

    rows = load_rows(script_args.dataset_name, split, "dataset_name")
    if script_args.text_column not in rows.column_names:
        raise ValueError(
            f"`--text_column {script_args.text_column}` is not in the data, which have {rows.column_names}."
        )
    texts = tuple(rows[script_args.text_column])
    return TokenBlocks(pack(texts, tokenizer, script_args.block_length, script_args.dataset_name))


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from trl import TrlParser

    from hf_moe.trainers import ReadMeTrainingArguments

    types: Any = (ReadMeScriptArguments, ReadMeTrainingArguments)
    if subparsers is not None:
        return subparsers.add_parser("read-me", help="Run the Read-ME script", dataclass_types=types)
    return TrlParser(types, prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
