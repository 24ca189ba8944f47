"""What MoSA costs at inference: nothing over the standard adapter it collapses into.

A ViT with the standard adapter, with a MoSA adapter of the same size whose experts are merged in evaluation, and with
that one collapsed run in turn within each round, on the same pictures; the figures are medians of the rounds' ratios
to the standard adapter. A second standard adapter runs along: its ratio is the noise.

    python examples/benchmarks/mosa.py --rounds 41
"""

import argparse
import json
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from hf_moe import MosaConfig
from hf_moe.files import write_text


def adapted(layers: int, collapse: bool = False, **fields: Any) -> Any:
    """A ViT-B/16 of some layers with an adapter that looks trained."""
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(num_hidden_layers=layers)).eval()
    model = get_peft_model(base, MosaConfig(init_weights=False, **fields)).eval()
    if collapse:
        model.collapse_adapter("default")
    return model


@torch.no_grad()
def measure(layers: int, batch: int, rounds: int, share: str) -> list[dict[str, Any]]:
    models = {
        "standard adapter": adapted(layers, num_experts=1),
        "standard adapter again": adapted(layers, num_experts=1),
        "MoSA": adapted(layers, share=share),
        "MoSA, collapsed": adapted(layers, share=share, collapse=True),
    }
    pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    difference = (models["MoSA"](pixels).logits - models["MoSA, collapsed"](pixels).logits).abs().max().item()
    names = list(models)
    ratios: dict[str, list[float]] = {name: [] for name in names[1:]}
    for number in range(rounds + 2):
        seconds = {}
        for name in names[number % 4 :] + names[: number % 4]:  # nobody always runs last
            start = perf_counter()
            models[name](pixels)
            seconds[name] = perf_counter() - start
        if number >= 2:  # the first rounds warm up
            for name, values in ratios.items():
                values.append(seconds[name] / seconds[names[0]])
    results = []
    for name, values in ratios.items():
        low, _, high = quantiles(values, n=4)
        about = {"model": name, "share": share, "batch": batch, "collapse_difference": difference}
        results.append({**about, "ratio": median(values), "quartiles": [low, high]})
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--output", type=Path, help="folder for mosa.json")
    args = parser.parse_args(arguments)
    results = []
    for share in ("down", "none"):
        for batch in args.batch:
            rows = measure(args.layers, batch, args.rounds, share)
            print(
                f"share={share!r}, batch {batch}; merged and collapsed differ by {rows[0]['collapse_difference']:.1e}"
            )
            for row in rows:
                low, high = row["quartiles"]
                print(f"  {row['model']:24} {row['ratio']:.3f} x the standard adapter ({low:.3f} to {high:.3f})")
            results += rows
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_text(args.output / "mosa.json", json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
