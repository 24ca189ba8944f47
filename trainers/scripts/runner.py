"""What every training script does: load the data, train, save, push."""

import argparse
from typing import Any


__all__ = ["load_splits", "make_script_parser", "run_training"]


def make_script_parser(
    config_class: type, name: str, subparsers: argparse._SubParsersAction | None = None, prog: str | None = None
) -> argparse.ArgumentParser:
    """The parser of a training script.

    Args:
        config_class (`type`): Configuration class of the trainer.
        name (`str`): Name of the script.
        subparsers (`argparse._SubParsersAction`, *optional*): Where to add it, instead of making a parser of its own.
        prog (`str`, *optional*): What it calls itself in its help.

    Returns:
        `trl.TrlParser`: Of `(ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig)`.
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    dataclass_types: Any = (ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser(name, help=f"Run the {name} training script", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


def run_training(
    trainer_class: type, script_args: Any, training_args: Any, model_args: Any, dataset_args: Any
) -> None:
    """Trains, saves to `output_dir` and, if asked to, pushes to the Hub.

    Args:
        trainer_class (`type`): A trainer that takes a model by path, `quantization_config` and `peft_config`.
        script_args, training_args, model_args, dataset_args: What a parser of `make_script_parser` returned.

    Raises:
        ValueError: neither `--dataset_name` nor `datasets` in the YAML was given, or the data have no such split.
    """
    from trl import get_peft_config, get_quantization_config

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    dataset = load_splits(script_args, training_args, dataset_args)
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        **dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to the Hub as {trainer.hub_model_id}.")
    trainer.end()


def load_splits(script_args: Any, training_args: Any, dataset_args: Any) -> dict[str, Any]:
    """The data a script was told to use.

    Args:
        script_args, training_args, dataset_args: What a parser of `make_script_parser` returned.

    Returns:
        `dict`: `train_dataset`, and `eval_dataset` (`None` if nothing is evaluated).

    Raises:
        ValueError: neither `--dataset_name` nor `datasets` in the YAML was given, or the data have no such split.
    """
    from datasets import load_dataset
    from transformers.utils import logging
    from trl import get_dataset

    if dataset_args.datasets:
        if script_args.dataset_name:
            logging.get_logger(__name__).warning(
                "Both `datasets` and `dataset_name` were given; `dataset_name` is ignored."
            )
        dataset = get_dataset(dataset_args)
    elif script_args.dataset_name:
        dataset = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    else:
        raise ValueError(
            "no data to train on. Give `--dataset_name` (a Hub id or a local folder), or `datasets` in `--config`."
        )
    splits = {"train": script_args.dataset_train_split}
    if training_args.eval_strategy != "no":
        splits["test"] = script_args.dataset_test_split
    for use, split in splits.items():
        if split not in dataset:
            raise ValueError(f"`--dataset_{use}_split {split}` is not in the data, which have {sorted(dataset)}.")
    return {
        "train_dataset": dataset[splits["train"]],
        "eval_dataset": dataset[splits["test"]] if "test" in splits else None,
    }
