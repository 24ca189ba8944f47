"""`hf-moe convert`: checkpoints that authors released in a layout of their own, as models of this package."""

import argparse
import importlib
from typing import NamedTuple


__all__ = ["FORMATS", "Format", "add_arguments", "run"]


class Format(NamedTuple):
    """A released layout.

    Args:
        function (`str`): `"module:function"` of `function(source, destination, max_shard_bytes=...)`.
        summary (`str`): What `hf-moe convert --help` says.
    """

    function: str
    summary: str


FORMATS: dict[str, Format] = {
    "dynamic-moe": Format(
        "hf_moe.models.dynamic_moe.convert_released:convert_released", "dynamic routing (AnLan577/Dynamic_MoE)"
    ),
    "moe-llava": Format(
        "hf_moe.models.moe_llava.convert_released:convert_released", "MoE-LLaVA (LanguageBind/MoE-LLaVA-Phi2-2.7B-4e)"
    ),
    "moepp": Format(
        "hf_moe.models.moe_plus_plus.convert_released:convert_released", "MoE++ (Chat-UniVi/MoE-Plus-Plus-7B)"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-moe convert`."""
    formats = "; ".join(f"{name}: {entry.summary}" for name, entry in FORMATS.items())
    parser.add_argument("format", metavar="format", help=f"the released layout. {formats}")
    parser.add_argument("source", help="folder or Hub id of the released checkpoint")
    parser.add_argument("destination", help="folder to make; it may exist if it is empty")
    parser.add_argument(
        "--max-shard-gb", type=float, default=2.0, help="largest size of one weight file in GB (default: 2)"
    )


def run(args: argparse.Namespace) -> int:
    """Convert and say where the result is.

    Raises:
        ValueError: An unknown format, or what the format's converter refuses.
    """
    if args.format not in FORMATS:
        raise ValueError(f"`format` must be one of {sorted(FORMATS)}, got {args.format!r}.")
    if not args.max_shard_gb > 0:
        raise ValueError(f"`--max-shard-gb` must be above 0, got {args.max_shard_gb}.")
    module, _, name = FORMATS[args.format].function.partition(":")
    convert = getattr(importlib.import_module(module), name)
    folder = convert(args.source, args.destination, max_shard_bytes=max(1, round(args.max_shard_gb * 1e9)))
    print(f"Wrote {folder}. Load it with `AutoModelForCausalLM.from_pretrained`.")
    return 0
