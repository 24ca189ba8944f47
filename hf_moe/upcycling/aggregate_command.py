"""`hf-moe aggregate A B DST`: one checkpoint with the experts of two."""

import argparse


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-moe aggregate`."""
    parser.add_argument("first", metavar="A", help="folder of a Mixture-of-Experts checkpoint; its experts come first")
    parser.add_argument("second", metavar="B", help="folder of a checkpoint of the same shape")
    parser.add_argument("destination", metavar="DST", help="folder to write; must be new or empty")
    parser.add_argument("--shared", default="mean", help="all other weights: mean (default), a or b")
    parser.add_argument(
        "--no-rescale", action="store_true", help="do not double experts whose softmax weights would be halved"
    )


def run(args: argparse.Namespace) -> int:
    """Aggregates folder to folder, a tensor at a time.

    Returns:
        `int`: 0.

    Raises:
        ValueError: what cannot work; the destination is untouched.
    """
    from .aggregate import aggregate_checkpoints

    aggregate_checkpoints(args.first, args.second, args.destination, args.shared, not args.no_rescale)
    print(f"Wrote {args.destination}")
    return 0
