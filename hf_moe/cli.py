"""The `hf-moe` command. Every sub-command is a module with `add_arguments(parser)` and `run(args) -> exit code`.

Only the module of the sub-command that was asked for is imported, so `hf-moe --help` stays quick.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple


__all__ = ["COMMANDS", "Command", "main"]


class Command(NamedTuple):
    """Where a sub-command lives and what `hf-moe --help` says about it."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "quickstart": Command("hf_moe.quickstart", "upcycle, fine-tune, report, save and reload a small real model"),
    "upcycle": Command("hf_moe.upcycling.command", "turn a dense checkpoint into a Mixture-of-Experts checkpoint"),
    "grow": Command("hf_moe.upcycling.growth.command", "turn a dense checkpoint into a larger dense checkpoint"),
    "refactor": Command("hf_moe.upcycling.refactor_command", "turn a dense checkpoint into a Read-ME checkpoint"),
    "prune": Command(
        "hf_moe.upcycling.prune_command", "keep some of the experts of a checkpoint, by use or at random"
    ),
    "aggregate": Command("hf_moe.upcycling.aggregate_command", "put the experts of two checkpoints into one"),
    "convert": Command("hf_moe.convert", "load a checkpoint that its authors released in a layout of their own"),
    "train": Command("hf_moe.trainers.command", "fine-tune with one of the training scripts, under accelerate launch"),
    "inspect": Command("hf_moe.reporting.command", "draw how a model routes a text: load, entropy, co-activation"),
    "compare": Command("hf_moe.reporting.compare_command", "how routing differs between two models, or two texts"),
    "bench": Command("hf_moe.experts.benchmark.command", "compare experts implementations on this machine, or tune"),
    "export-decoder": Command("hf_moe.generation.command", "write self-contrast decoding as a folder for `generate`"),
    "list": Command("hf_moe.listing", "model types, routers, experts and recipes, each with its paper"),
}

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        arguments (`Sequence[str]`, *optional*): The words after `hf-moe`; `sys.argv[1:]` by default.

    Returns:
        `int`: 0 on success, 2 on bad input (one sentence on stderr; `--debug` shows the traceback), 130 on Ctrl-C,
        otherwise what the sub-command returned.

    Example:
        ```python
        main(["list", "routers"])
        ```
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    debug = "--debug" in arguments
    try:
        args = _parser(chosen).parse_args(arguments)
        code = int(importlib.import_module(COMMANDS[args.command].module).run(args) or 0)
        sys.stdout.flush()  # here, where a reader that left is no error yet
        return code
    except KeyboardInterrupt:
        if debug:
            raise
        print("hf-moe: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as in `hf-moe list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 0
    except Exception as error:
        if debug or not _is_bad_input(error):
            raise
        print(f"hf-moe: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    from hf_moe import __version__

    # `--debug` is accepted before and after the sub-command; SUPPRESS keeps the later parser from resetting it
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = argparse.ArgumentParser(
        prog="hf-moe", description="Mixture-of-Experts methods for transformers, PEFT and TRL.", parents=[common]
    )
    parser.add_argument("--version", action="version", version=f"hf-moe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, description=f"{command.summary}.", parents=[common])
        if name == chosen:
            importlib.import_module(command.module).add_arguments(sub)
    return parser


def _is_bad_input(error: Exception) -> bool:
    # Errors that come from what the user gave. Anything else is a mistake of ours and deserves its traceback.
    if isinstance(error, (ValueError, OSError, ImportError)):
        return True
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return isinstance(error, (StrictDataclassError, SafetensorError))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
