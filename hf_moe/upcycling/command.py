"""`hf-moe upcycle SRC DST`: a dense checkpoint in, a Mixture-of-Experts checkpoint out."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from hf_moe.files import check_new_folder, new_folder, write_text


__all__ = ["add_arguments", "run"]

# Name on the command line -> class and its one argument; `VirtualGroups:2` means VirtualGroups(2).
EXPERTS = {
    "copy": ("Copy", None),
    "diversify": ("Diversify", str),
    "drop": ("Drop", float),
    "importance-shared": ("ImportanceShared", int),
    "noise": ("Noise", float),
    "split": ("Split", str),
    "virtual-groups": ("VirtualGroups", int),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `hf-moe upcycle`."""
    parser.add_argument("source", metavar="SRC", help="dense model: a folder or Hub id, or mergekit's MoE YAML file")
    parser.add_argument("destination", metavar="DST", help="folder to write; must not exist, or be empty")
    parser.add_argument("--experts", type=int, default=8, metavar="N", help="experts per MoE layer (default: 8)")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (default: 2)")
    parser.add_argument(
        "--layers", default="all", help="all, every:2, every:2:0, first_half, second_half, 0,2,5 or a regex"
    )
    names = ", ".join(EXPERTS)
    parser.add_argument("--recipe", default="copy", metavar="NAME[:VALUE]", help=f"how experts are made: {names}")
    parser.add_argument("--shared", default=None, help="dense, residual, or a share of the channels such as 0.25")
    parser.add_argument("--weights", default="renormalise", help="renormalise (default), softmax or sigmoid")
    parser.add_argument("--target", default="auto", help="auto (default), generic, or a family such as mixtral")
    parser.add_argument("--calibration", metavar="FILE", help="text file, for recipes that look at data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's own")
    parser.add_argument(
        "--stream", action="store_true", help="convert layer by layer without loading the model; nothing is measured"
    )
    parser.add_argument("--no-check", action="store_true", help="do not run both models to measure the difference")


def run(args: argparse.Namespace) -> int:
    """Converts, saves and prints the report.

    Returns:
        `int`: 0.

    Raises:
        ValueError: an option that cannot work; the destination is untouched.
    """
    destination = check_new_folder(args.destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(destination.parent, os.W_OK):
        raise ValueError(f"DST {args.destination!r} cannot be written; choose a folder you may write to.")
    recipe = _recipe(args)
    if args.stream:
        from hf_moe.upcycling.streaming import upcycle_checkpoint

        if args.calibration or args.dtype or args.source.endswith((".yml", ".yaml")):
            raise ValueError("`--stream` takes a checkpoint as it is: no --calibration, no --dtype, no YAML.")
        report = upcycle_checkpoint(recipe.pop("model"), destination, **recipe)
        write_text(destination / "upcycling.json", json.dumps(report.to_dict(), indent=2) + "\n")
    else:
        report = _convert(args, recipe, destination)
    print(report)
    print(f"Wrote {destination}")
    return 0


def _convert(args: argparse.Namespace, recipe: dict[str, Any], destination: Path) -> Any:
    from transformers import AutoTokenizer

    from hf_moe import upcycle
    from hf_moe.upcycling.sources import load_source

    source = recipe.pop("model")
    model = load_source(source)
    if args.dtype or recipe.get("dtype"):
        import torch

        model = model.to(getattr(torch, args.dtype or recipe["dtype"]))
    recipe.pop("dtype", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        tokenizer = None  # a model without one can be converted all the same
    processor = _processor(source, model)
    calibration = None
    if args.calibration:
        from hf_moe.corpora import load_text_file

        calibration = load_text_file(args.calibration).train
    moe, report = upcycle(model, tokenizer=tokenizer, calibration=calibration, check=not args.no_check, **recipe)
    with new_folder(destination) as partial:
        moe.save_pretrained(partial)
        for saved in (tokenizer, processor):
            if saved is not None:
                saved.save_pretrained(partial)
        write_text(partial / "upcycling.json", json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def _processor(source: str, model: Any) -> Any:
    """What prepares images beside the text, `None` where there are none or it cannot be found."""
    if getattr(model.config, "vision_config", None) is None:
        return None
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source)
    except (OSError, ValueError):
        return None


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `upcycle`, from the options or from a mergekit file."""
    common = {"layers": _layers(args.layers), "weights": args.weights, "target": args.target, "seed": args.seed}
    if args.source.endswith((".yml", ".yaml")):
        from hf_moe.upcycling.mergekit import read_mergekit

        if not os.path.isfile(args.source):
            raise ValueError(f"SRC {args.source!r} is not a file.")
        recipe, dtype = read_mergekit(args.source)
        return {**common, **recipe, "dtype": dtype}
    return {
        **common,
        "model": args.source,
        "num_experts": args.experts,
        "top_k": args.top_k,
        "experts": _experts(args.recipe),
        "shared": _shared(args.shared),
    }


def _experts(text: str) -> Any:
    from hf_moe import upcycling

    name, _, value = text.partition(":")
    if name not in EXPERTS:
        raise ValueError(f"`--recipe {text}` is not known; choose one of {', '.join(EXPERTS)}.")
    class_name, convert = EXPERTS[name]
    if not value:
        return getattr(upcycling, class_name)()
    if convert is None:
        raise ValueError(f"`--recipe {name}` takes no value, got {value!r}.")
    try:
        return getattr(upcycling, class_name)(convert(value))
    except ValueError as error:
        raise ValueError(f"`--recipe {text}`: {error}") from error


def _shared(text: str | None) -> str | float | None:
    if text is None or text in ("dense", "residual"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"`--shared` must be dense, residual or a number in (0, 1), got {text!r}.") from None


def _layers(text: str) -> str | list[int]:
    parts = text.split(",")
    return [int(part) for part in parts] if all(part.strip().isdigit() for part in parts) else text
