# /// script
# dependencies = ["hf-moe"]
# ///

"""Distils a fine-tuned dense model into a Mixture-of-Experts that was made from it.

# A classifier: BERT and its mixture, on the task BERT was fine-tuned for
```bash
python -m hf_moe.trainers.scripts.distillation \
    --model_name_or_path ./bert-sst2-moe \
    --teacher_model_name_or_path ./bert-sst2 \
    --dataset_name ./sst2 \
    --text_column sentence \
    --distillation_weight 2 \
    --learning_rate 3.0e-5 \
    --per_device_train_batch_size 32 \
    --num_train_epochs 3 \
    --output_dir bert-sst2-moe-distilled
```
Rows have a text (`--text_column`, `--text_pair_column`) and a label (`--label_column`), or `input_ids` and whatever
the head needs. Language models need the text alone. The student comes from `hf_moe.upcycle(...)`, e.g. with
`ImportanceShared(512, width=768)`.

# Several processes
```bash
accelerate launch --multi_gpu --num_processes 2 -m hf_moe.trainers.scripts.distillation --config distillation.yaml
hf-moe train distillation --config distillation.yaml --multi_gpu --num_processes 2
```
With `--use_cpu` these are two processes on the CPU (`--cpu` of accelerate silently runs one).
"""

import argparse
import re
from dataclasses import dataclass, field
from typing import Any


__all__ = ["DistillationScriptArguments", "main", "make_parser"]

TOKEN_HEADS = ("ForTokenClassification",)
LANGUAGE_HEADS = ("ForCausalLM", "ForMaskedLM")


@dataclass
class DistillationScriptArguments:
    """What the script reads.

    Args:
        model_name_or_path (`str`): The student, a Mixture-of-Experts.
        teacher_model_name_or_path (`str`): The dense model it was made from, fine-tuned on the task.
        dataset_name (`str`): A Hub id, a local folder, or a file (JSON lines, CSV, Parquet, text).
        train_split (`str`, defaults to `"train"`): What to train on.
        eval_split (`str`, *optional*): What to evaluate on.
        text_column (`str`, defaults to `"text"`), text_pair_column (`str`, *optional*): Where the text is.
        label_column (`str`, defaults to `"label"`): Where the label of a text is, a number or a name in `label2id`.
        max_length (`int`, defaults to 128): Tokens after which a text is cut.
        dtype (`str`, defaults to `"auto"`): Of both models' weights.
        trust_remote_code (`bool`, defaults to `False`): As in `from_pretrained`.
    """

    model_name_or_path: str = field(metadata={"help": "The student, a Mixture-of-Experts."})
    teacher_model_name_or_path: str = field(metadata={"help": "The dense model it was made from, fine-tuned."})
    dataset_name: str = field(metadata={"help": "A Hub id, a local folder, or a file."})
    train_split: str = field(default="train", metadata={"help": "What to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "What to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "Where the text is."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Where the second text is, if any."})
    label_column: str = field(default="label", metadata={"help": "Where the label of a text is."})
    max_length: int = field(default=128, metadata={"help": "Tokens after which a text is cut."})
    dtype: str = field(default="auto", metadata={"help": "Of both models' weights."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code of the models' repositories."})


def main(script_args: DistillationScriptArguments, training_args: Any) -> None:
    """Distils with [`~hf_moe.trainers.MoEDistillationTrainer`] what the parsed arguments describe, and saves."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    import hf_moe  # noqa: F401  makes our model types known
    from hf_moe.trainers import MoEDistillationTrainer
    from hf_moe.trainers.scripts.unlearning import load_rows

    options = {"trust_remote_code": script_args.trust_remote_code}
    config = AutoConfig.from_pretrained(script_args.model_name_or_path, **options)
    head = head_name((config.architectures or [""])[0])
    auto_class = getattr(transformers, f"AutoModel{head}")
    tokenizer = AutoTokenizer.from_pretrained(script_args.model_name_or_path, **options)
    splits = {"train_dataset": script_args.train_split, "eval_dataset": script_args.eval_split}
    data = {
        use: prepare(load_rows(script_args.dataset_name, split, "dataset_name"), tokenizer, head, config, script_args)
        for use, split in splits.items()
        if split is not None
    }
    student, teacher = (
        auto_class.from_pretrained(name, dtype=script_args.dtype, **options)
        for name in (script_args.model_name_or_path, script_args.teacher_model_name_or_path)
    )
    trainer = MoEDistillationTrainer(
        student,
        training_args,
        teacher_model=teacher,
        processing_class=tokenizer,
        data_collator=make_collator(tokenizer, head),
        **data,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if "eval_dataset" in data:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")


def head_name(architecture: str) -> str:
    """`"ForMaskedLM"` of `"MoeBertForMaskedLM"`.

    Raises:
        ValueError: the checkpoint's config names no class with a head.
    """
    found = re.search(r"For[A-Z]\w+$", architecture)
    if found is None and architecture.endswith("LMHeadModel"):
        return "ForCausalLM"
    if found is None:
        raise ValueError(
            f"`--model_name_or_path` must be a model with a head, got the architecture {architecture!r}; save one, "
            "such as `MoeBertForSequenceClassification`."
        )
    return found[0]


def prepare(rows: Any, tokenizer: Any, head: str, config: Any, script_args: DistillationScriptArguments) -> Any:
    """Token ids and labels of a data set; rows that have `input_ids` stay as they are.

    Raises:
        ValueError: a column is missing, or the rows of a head that is not for whole texts have no `input_ids`.
    """
    if "input_ids" in rows.column_names:
        return rows
    wanted = [script_args.text_column, script_args.text_pair_column]
    if head == "ForSequenceClassification":
        wanted.append(script_args.label_column)
    elif head not in LANGUAGE_HEADS:
        raise ValueError(f"A model {head[3:]} needs rows with `input_ids`, got the columns {rows.column_names}.")
    missing = [name for name in wanted if name is not None and name not in rows.column_names]
    if missing:
        raise ValueError(f"`--dataset_name` has no column {missing[0]!r}; it has {rows.column_names}.")

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[name] for name in wanted[:2] if name is not None]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=script_args.max_length))
        if head == "ForSequenceClassification":
            known = config.label2id
            encoded["labels"] = [known.get(label, label) for label in batch[script_args.label_column]]
        return encoded

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def make_collator(tokenizer: Any, head: str) -> Any:
    """Pads a batch as the head needs it; masks words for masked language models."""
    from transformers import (
        DataCollatorForLanguageModeling,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
    )

    if head in LANGUAGE_HEADS:
        return DataCollatorForLanguageModeling(tokenizer, mlm=head == "ForMaskedLM")
    return (DataCollatorForTokenClassification if head in TOKEN_HEADS else DataCollatorWithPadding)(tokenizer)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from trl import TrlParser

    from hf_moe.trainers import MoEDistillationConfig

    types: Any = (DistillationScriptArguments, MoEDistillationConfig)
    if subparsers is not None:
        return subparsers.add_parser("distillation", help="Run the distillation script", dataclass_types=types)
    return TrlParser(types, prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
