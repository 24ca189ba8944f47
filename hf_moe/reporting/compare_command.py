"""`hf-moe compare A B --text FILE`: how routing differs between two models, or between two texts."""

import argparse
import sys
from typing import Any

from .command import add_pass_arguments, check_pass_arguments, check_text, load, read_texts


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hf-moe compare`.

    Args:
        parser (`argparse.ArgumentParser`): The sub-command's parser.
    """
    parser.add_argument("model", metavar="A", help="folder or Hub id of a Mixture-of-Experts model")
    parser.add_argument(
        "other", metavar="B", nargs="?", help="a model to compare with, such as A after fine-tuning or unlearning"
    )
    parser.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text; blank lines separate documents")
    parser.add_argument("--other-text", metavar="FILE", help="instead of B: compare how A routes this text")
    add_pass_arguments(parser, output="routing-shift")


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command.

    Args:
        args (`argparse.Namespace`): With the attributes of [`add_arguments`].

    Returns:
        `int`: 0.

    Raises:
        ValueError: neither or both of B and `--other-text`, models that cannot be compared, and what `hf-moe inspect`
            refuses.
        OSError: as in `hf-moe inspect`. Nothing was written then.
    """
    if (args.other is None) == (args.other_text is None):
        given = "neither" if args.other is None else "both"
        raise ValueError(f"`hf-moe compare` needs a second model B or `--other-text`, got {given}. Give one of them.")
    device = check_pass_arguments(args, "hf-moe compare")
    check_text(args.text)

    from .markdown import markdown_table
    from .shift import routing_shift

    if args.other is None:
        check_text(args.other_text, "--other-text")
        model, tokenizer = load(args.model, device)
        a, b = (snapshot(model, tokenizer, path, args, name=path) for path in (args.text, args.other_text))
    else:
        length = common_window(args.model, args.other)
        # One after the other: two large models may not fit together.
        model, tokenizer = load(args.model, device)
        a = snapshot(model, tokenizer, args.text, args, max_length=length)
        del model
        model, tokenizer = load(args.other, device)
        b = snapshot(model, tokenizer, args.text, args, max_length=length)
        if a.token_ids.shape != b.token_ids.shape or not bool((a.token_ids == b.token_ids).all()):
            raise ValueError(
                f"{args.model!r} and {args.other!r} have tokenizers that read `--text` differently, so their routing "
                "cannot be compared. Compare models that descend from one another."
            )
    report = routing_shift(a, b)
    folder = report.save(args.output)
    print(markdown_table(report.table()), file=sys.stdout)
    print(f"\nReport: {folder / 'shift.md'}", file=sys.stdout)
    return 0


def snapshot(model: Any, tokenizer: Any, path: str, args: argparse.Namespace, **options: Any) -> Any:
    """Routes one text file.

    Args:
        model (`nn.Module`): From [`load`].
        tokenizer: Its tokenizer.
        path (`str`): The file.
        args (`argparse.Namespace`): Of the command.
        **options: For [`routing_snapshot`].

    Returns:
        [`RoutingSnapshot`]
    """
    from .snapshot import routing_snapshot

    return routing_snapshot(
        model,
        tokenizer,
        read_texts(path),
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        show_progress=True,
        **options,
    )


def common_window(*names: str) -> int:
    """Tokens of a window that all models can hold, read off their configs.

    Args:
        *names (`str`): Folders or Hub ids.

    Returns:
        `int`
    """
    from transformers import AutoConfig

    import hf_moe  # noqa: F401  makes our model types known

    from .command import check_name
    from .passes import longest_window

    for name in names:
        check_name(name)
    return min(longest_window(AutoConfig.from_pretrained(name)) for name in names)
