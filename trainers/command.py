"""`hf-moe train METHOD ...`: one of the training scripts, under `accelerate launch`."""

import argparse
import importlib


__all__ = ["METHODS", "add_arguments", "run", "split_arguments"]

METHODS = (
    "clip-moe",
    "distillation",
    "dpo",
    "evomoe",
    "mimic",
    "moe-llava",
    "multitask",
    "preference",
    "read-me",
    "sft",
    "staged-distillation",
    "uni-moe",
    "unlearning",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hf-moe train`.

    Args:
        parser (`argparse.ArgumentParser`): The sub-command's parser.
    """
    parser.add_argument(
        "method", choices=METHODS, help="training script; `hf-moe train METHOD --help` lists its arguments"
    )
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="arguments of the script, of `--config FILE.yaml`, and of `accelerate launch`",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command.

    Args:
        args (`argparse.Namespace`): With the attributes of [`add_arguments`].

    Returns:
        `int`: 0.

    Raises:
        ValueError: the YAML of `--config` is no mapping, or `--accelerate_config` is unknown.
        OSError: the YAML cannot be read.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    words = [word for word in args.arguments if word != "--debug"]
    launch, script = split_arguments(args.method, words)
    command = [*launch, "--module", script_module(args.method), *script]
    launch_command(launch_command_parser().parse_args(command))
    return 0


def script_module(method: str) -> str:
    """Where the script of a method is."""
    return f"hf_moe.trainers.scripts.{method.replace('-', '_')}"


def split_arguments(method: str, words: list[str]) -> tuple[list[str], list[str]]:
    """Tells the arguments of `accelerate launch` from those of the script.

    Args:
        method (`str`): One of `METHODS`.
        words (`list[str]`): What followed it on the command line.

    Returns:
        `tuple`: For `accelerate launch`, those found in the YAML included; for the script.
    """
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    parser = importlib.import_module(script_module(method)).make_parser(prog=f"hf-moe train {method}")
    # What the script's parser does not know is left over, in order; `--help` prints and exits here.
    *_, from_file, unknown = parser.parse_args_and_config(
        words, return_remaining_strings=True, separate_remaining_strings=True
    )
    left = list(unknown)
    script = []
    for word in words:
        if left and word == left[0]:
            left.pop(0)
        else:
            script.append(word)
    return resolve_accelerate_config_argument([*from_file, *unknown]), script
