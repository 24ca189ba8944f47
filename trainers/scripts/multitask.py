# /// script
# dependencies = ["hf-moe"]
# ///

"""Training of a sequence-to-sequence Mixture-of-Experts on translation and denoising at once (Z-code M3).

# Two languages: text of each, and pairs
```bash
python -m hf_moe.trainers.scripts.multitask \
    --model_name_or_path ./t5-moe \
    --monolingual en=news.en.txt de=news.de.txt \
    --parallel en-de=pairs.jsonl \
    --sampling_temperature 5 \
    --router_aux_loss_coef 0.01 \
    --learning_rate 3e-4 \
    --max_steps 10000 \
    --output_dir t5-moe-multitask
```
Text files have one document a line. Files of pairs have JSON lines with a key for each language,
`{"en": "Good morning.", "de": "Guten Morgen."}`; `en-de` trains that direction, `de-en` the other.

# Several processes
```bash
accelerate launch --multi_gpu --num_processes 2 -m hf_moe.trainers.scripts.multitask --config multitask.yaml
hf-moe train multitask --config multitask.yaml --multi_gpu --num_processes 2
```
"""

import argparse
from dataclasses import dataclass, field
from typing import Any


__all__ = ["MultitaskScriptArguments", "main", "make_parser"]

#: Sentinels that a tokenizer without any is given.
NUM_SENTINELS = 100


@dataclass
class MultitaskScriptArguments:
    """What the script reads.

    Args:
        model_name_or_path (`str`): Sequence-to-sequence model to start from.
        monolingual (`list[str]`): `LANGUAGE=FILE` of text to denoise.
        parallel (`list[str]`): `SOURCE-TARGET=FILE` of pairs to translate.
        sampling_temperature (`float`, defaults to 5.0): S; data sets are drawn with p ~ size^(1/S).
        mask_ratio (`float`, defaults to 0.35): Share of the tokens masked in denoising.
        mean_span (`float`, defaults to 3.5): Mean length of a masked span.
        denoising_target (`str`, defaults to `"text"`): `"text"` or `"spans"`.
        max_length (`int`, defaults to 512): Tokens of sources and targets.
        eval_rows (`int`, defaults to 0): Rows held out for evaluation, dealt over the data sets.
    """

    model_name_or_path: str = field(metadata={"help": "Sequence-to-sequence model to start from."})
    monolingual: list[str] = field(default_factory=list, metadata={"help": "LANGUAGE=FILE of text to denoise."})
    parallel: list[str] = field(default_factory=list, metadata={"help": "SOURCE-TARGET=FILE of pairs to translate."})
    sampling_temperature: float = field(default=5.0, metadata={"help": "S; data sets are drawn with p ~ size^(1/S)."})
    mask_ratio: float = field(default=0.35, metadata={"help": "Share of the tokens masked in denoising."})
    mean_span: float = field(default=3.5, metadata={"help": "Mean length of a masked span."})
    denoising_target: str = field(default="text", metadata={"help": "text or spans."})
    max_length: int = field(default=512, metadata={"help": "Tokens of sources and targets."})
    eval_rows: int = field(default=0, metadata={"help": "Rows held out for evaluation."})


def main(script_args: MultitaskScriptArguments, training_args: Any) -> None:
    """Trains with [`~hf_moe.trainers.MoeSeq2SeqTrainer`] what the parsed arguments describe, and saves."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    import hf_moe  # noqa: F401  makes our model types known
    from hf_moe.trainers import DenoisingCollator, MoeSeq2SeqTrainer, interleave_tasks

    tasks = [("monolingual", *_parse(entry, "monolingual")) for entry in script_args.monolingual]
    tasks += [("parallel", *_parse(entry, "parallel")) for entry in script_args.parallel]
    if not tasks:
        raise ValueError("no data to train on. Give `--monolingual LANGUAGE=FILE` or `--parallel SOURCE-TARGET=FILE`.")
    tokenizer = AutoTokenizer.from_pretrained(script_args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(script_args.model_name_or_path)
    tags = add_tokens(tokenizer, model, {name.rpartition("-")[2] for _, name, _ in tasks})
    collator = DenoisingCollator(
        tokenizer,
        tags,
        script_args.mask_ratio,
        script_args.mean_span,
        script_args.denoising_target,
        max_length=script_args.max_length,
    )
    rows = {name: load_task(kind, name, path, tokenizer) for kind, name, path in tasks}
    held_out = None
    if script_args.eval_rows:
        rows, held_out = _hold_out(rows, script_args.eval_rows)
    training_args.remove_unused_columns = False  # the collator reads `language`
    trainer = MoeSeq2SeqTrainer(
        model,
        training_args,
        train_dataset=interleave_tasks(rows, script_args.sampling_temperature, training_args.seed),
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")


def add_tokens(tokenizer: Any, model: Any, languages: set[str]) -> dict[str, int]:
    """Gives tokenizer and model what they lack: a tag `<2LANGUAGE>` for each language, sentinels.

    Returns:
        `dict[str, int]`: Language to id of its tag.
    """
    wanted = [f"<2{language}>" for language in sorted(languages)]
    if "<extra_id_0>" not in tokenizer.get_vocab():
        wanted += [f"<extra_id_{i}>" for i in range(NUM_SENTINELS)]
    tokenizer.add_tokens(wanted, special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return {language: tokenizer.convert_tokens_to_ids(f"<2{language}>") for language in languages}


def load_task(kind: str, name: str, path: str, tokenizer: Any) -> Any:
    """The tokenised rows of one file: `input_ids`, `labels` (`None` for text to denoise), `language`.

    Raises:
        ValueError: a file of pairs lacks a language.
    """
    from datasets import Dataset, Features, Sequence, Value

    source, _, target = name.rpartition("-")
    data: Any = Dataset.from_text(path) if kind == "monolingual" else Dataset.from_json(path)
    columns = ["text"] if kind == "monolingual" else [source, target]
    missing = [column for column in columns if column not in data.column_names]
    if missing:
        raise ValueError(f"`--{kind} {name}={path}`: the rows have {data.column_names}, and lack {missing}.")
    data = data.filter(lambda row: all(row[column] and row[column].strip() for column in columns))

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        encoded = [tokenizer(batch[column], add_special_tokens=False)["input_ids"] for column in columns]
        labels = encoded[1] if len(encoded) > 1 else [None] * len(encoded[0])
        return {"input_ids": encoded[0], "labels": labels, "language": [target] * len(encoded[0])}

    ids = Sequence(Value("int64"))
    features = Features({"input_ids": ids, "labels": ids, "language": Value("string")})
    return data.map(encode, batched=True, remove_columns=data.column_names, features=features)


def _parse(entry: str, argument: str) -> tuple[str, str]:
    name, _, path = entry.partition("=")
    form = "SOURCE-TARGET=FILE" if argument == "parallel" else "LANGUAGE=FILE"
    if not name or not path or (argument == "parallel") != ("-" in name):
        raise ValueError(f"`--{argument} {entry}` must have the form {form}.")
    return name, path


def _hold_out(rows: dict[str, Any], count: int) -> tuple[dict[str, Any], Any]:
    from datasets import concatenate_datasets

    each = -(-count // len(rows))
    short = [name for name, part in rows.items() if len(part) <= each]
    if short:
        raise ValueError(f"`--eval_rows {count}` would leave nothing of {short} to train on.")
    held_out = concatenate_datasets([part.select(range(each)) for part in rows.values()])
    return {name: part.select(range(each, len(part))) for name, part in rows.items()}, held_out


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from trl import TrlParser

    from hf_moe.trainers import MoeSeq2SeqTrainingArguments

    types: Any = (MultitaskScriptArguments, MoeSeq2SeqTrainingArguments)
    if subparsers is not None:
        return subparsers.add_parser("multitask", help="Run the multitask script", dataclass_types=types)
    return TrlParser(types, prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
