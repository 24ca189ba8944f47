"""`hf-moe inspect MODEL --text FILE`: draw how a model routes a text."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .folder import check_writable


__all__ = [
    "add_arguments",
    "add_pass_arguments",
    "check_name",
    "check_pass_arguments",
    "check_text",
    "load",
    "read_texts",
    "run",
]

# A paragraph longer than this is handed on in parts, so that a file without blank lines is not read at once.
LONGEST_TEXT = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hf-moe inspect`.

    Args:
        parser (`argparse.ArgumentParser`): The sub-command's parser.
    """
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a Mixture-of-Experts model")
    parser.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text; blank lines separate documents")
    add_pass_arguments(parser, output="routing-report")


def add_pass_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Declares what commands that route texts share.

    Args:
        parser (`argparse.ArgumentParser`): The sub-command's parser.
        output (`str`): Default of `--output`.
    """
    parser.add_argument("--output", metavar="DIR", default=output, help="where the report goes (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=10_000, help="tokens to route at most (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=8, help="windows per forward pass (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: the fastest there is)")


def check_pass_arguments(args: argparse.Namespace, command: str) -> str:
    """Checks what [`add_pass_arguments`] declared, before anything is loaded.

    Args:
        args (`argparse.Namespace`): Of the command.
        command (`str`): Its name.

    Returns:
        `str`: The device to run on.

    Raises:
        ValueError: a number out of range, or an unknown device.
        OSError: the output cannot be written.
        ImportError: matplotlib is not installed.
    """
    for name in ("max_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(args, name)}.")
    check_writable(args.output)
    check_matplotlib(command)
    return choose_device(args.device)


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command.

    Args:
        args (`argparse.Namespace`): With the attributes of [`add_arguments`].

    Returns:
        `int`: 0.

    Raises:
        ValueError: the text is empty or not UTF-8, the model is no MoE model or has no fitting tokenizer, a number is
            out of range.
        OSError: the model or the text cannot be read, or the output cannot be written. Nothing was written then.
    """
    device = check_pass_arguments(args, "hf-moe inspect")
    check_text(args.text)

    from .collect import routing_report
    from .markdown import markdown_table

    model, tokenizer = load(args.model, device)
    report = routing_report(
        model,
        tokenizer,
        read_texts(args.text),
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        show_progress=True,
    )
    folder = report.save(args.output)
    print(markdown_table(report.table()), file=sys.stdout)
    print(f"\nReport: {folder / 'report.md'}", file=sys.stdout)
    return 0


def check_text(path: str, option: str = "--text") -> None:
    """Refuses a file without any text.

    Args:
        path (`str`): The file.
        option (`str`, defaults to `"--text"`): What it was given as.

    Raises:
        ValueError: it holds nothing but white space, or is not UTF-8.
        OSError: it cannot be read.
    """
    if next(read_texts(path, option), None) is None:
        raise ValueError(f"`{option}` {path!r} is empty: there is nothing to route. Give a file with text.")


def read_texts(path: str, option: str = "--text") -> Iterator[str]:
    """Paragraphs of a text file, read as they are needed.

    Args:
        path (`str`): A UTF-8 file.
        option (`str`, defaults to `"--text"`): What it was given as.

    Yields:
        `str`: A paragraph (blank lines separate them); a very long one in parts.

    Raises:
        ValueError: the file is not UTF-8.
        OSError: it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`{option}` {path!r} is not a file. Give the path of a text file.")
    lines: list[str] = []
    size = 0
    try:
        with open(path, encoding="utf-8") as file:
            while line := file.readline(LONGEST_TEXT):
                if line.strip():
                    lines.append(line)
                    size += len(line)
                if lines and (not line.strip() or size >= LONGEST_TEXT):
                    yield "".join(lines)
                    lines, size = [], 0
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{option}` {path!r} is not UTF-8 text ({error.reason}). Convert it to UTF-8 first."
        ) from error
    if lines:
        yield "".join(lines)


def choose_device(name: str) -> str:
    """The device to run on.

    Args:
        name (`str`): `"auto"` or what torch calls it.

    Returns:
        `str`

    Raises:
        ValueError: torch does not know it, or it is not there.
    """
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator()
        return accelerator.type if accelerator is not None and torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`--device` {name!r} cannot be used: {reason} Try `--device cpu`.") from error
    return name


def check_matplotlib(command: str) -> None:
    """Refuses to start what could not be drawn at the end.

    Args:
        command (`str`): What was started.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ImportError(f"`{command}` draws plots and needs matplotlib. Run `pip install matplotlib`.")


def check_name(name: str) -> None:
    """Refuses a path to nowhere, which would else be looked for on the Hub.

    Args:
        name (`str`): Folder or Hub id.

    Raises:
        FileNotFoundError: it can only be a path, and there is no such folder.
    """
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"MODEL {name!r} is not a folder. Give the folder of a saved model, or a Hub id.")


def load(name: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or Hub id; a language model where the type has one.

    Args:
        name (`str`): Folder or Hub id.
        device (`str`): Where the model goes.

    Returns:
        `tuple`: model in eval mode, tokenizer.

    Raises:
        ValueError: the model type is unknown, has no tokenizer, or is not a MoE model.
        OSError: not found.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    import hf_moe  # noqa: F401  makes our model types known
    from hf_moe.views import moe_layers

    check_name(name)
    config = AutoConfig.from_pretrained(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"MODEL {name!r} has no tokenizer that can be loaded ({str(error).splitlines()[0]}). Save one into the "
            "folder with `tokenizer.save_pretrained`."
        ) from error
    auto_class = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    model: Any = auto_class.from_pretrained(name, dtype="auto").eval()
    model.to(device)
    moe_layers(model)  # before the text is read: a dense model has nothing to show
    return model, tokenizer
