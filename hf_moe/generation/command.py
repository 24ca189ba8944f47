"""`hf-moe export-decoder DIR`: write self-contrast decoding as a folder for `generate(custom_generate=DIR)`."""

import argparse

from .weak import WEAK_WEIGHTS


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hf-moe export-decoder`.

    Args:
        parser (`argparse.ArgumentParser`): The sub-command's parser.
    """
    parser.add_argument("folder", metavar="DIR", help="a new or empty folder")
    parser.add_argument("--beta", type=float, default=0.5, help="strength of the contrast (default: %(default)s)")
    parser.add_argument(
        "--alpha", type=float, default=0.1, help="plausible share of the best probability (default: %(default)s)"
    )
    parser.add_argument("--weak", default="rank:2", help="rank:k, top:m or random:r (default: %(default)s)")
    parser.add_argument("--weak-weights", choices=WEAK_WEIGHTS, default="native", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command.

    Args:
        args (`argparse.Namespace`): With the attributes of [`add_arguments`].

    Returns:
        `int`: 0.

    Raises:
        ValueError: The folder is not empty or a setting is out of range. Nothing was written then.
    """
    from .export import export_decoder

    folder = export_decoder(
        args.folder, beta=args.beta, alpha=args.alpha, weak=args.weak, weak_weights=args.weak_weights
    )
    print(f'Wrote {folder}. Use: model.generate(..., custom_generate="{folder}", trust_remote_code=True)')
    return 0
