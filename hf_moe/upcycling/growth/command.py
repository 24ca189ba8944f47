"""`hf-moe grow SRC DST`: a dense checkpoint in, a larger one of the same class out."""

import argparse
import json

from hf_moe.files import check_new_folder, new_folder, write_text


__all__ = ["add_arguments", "run"]

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `hf-moe grow`."""
    parser.add_argument("source", metavar="SRC", help="dense model: a folder or Hub id")
    parser.add_argument("destination", metavar="DST", help="folder to write; must not exist, or be empty")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="default: as in the source")
    parser.add_argument("--width", help="how added units start: fpi_uneven (default), fpi or aki")
    parser.add_argument("--depth", help="how added layers start: interpolate (default), stack or identity")
    parser.add_argument("--method", help="fpi, aki or aki_pro, in place of --width and --depth")
    parser.add_argument("--order", default="cyclic", help="which units are copied first: cyclic (default) or random")
    parser.add_argument("--noise-std", type=float, default=0.0, help="noise on added units, in standard deviations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's own")
    parser.add_argument("--no-check", action="store_true", help="do not run both models to measure the difference")


def run(args: argparse.Namespace) -> int:
    """Grows, saves and prints the report.

    Returns:
        `int`: 0.

    Raises:
        ValueError: an option that cannot work; the destination is untouched.
    """
    destination = check_new_folder(args.destination)
    from transformers import AutoTokenizer

    from hf_moe import grow_model
    from hf_moe.upcycling.sources import load_source

    model = load_source(args.source, "SRC")
    if args.dtype:
        import torch

        model = model.to(getattr(torch, args.dtype))
    choices = (*SIZES, "width", "depth", "method", "order", "noise_std", "seed")
    grown, report = grow_model(model, check=not args.no_check, **{name: getattr(args, name) for name in choices})
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.source)
    except (OSError, ValueError):
        tokenizer = None  # a model without one can grow all the same
    with new_folder(destination) as partial:
        grown.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_text(partial / "growth.json", json.dumps(report.to_dict(), indent=2) + "\n")
    print(report)
    print(f"Wrote {destination}")
    return 0
