"""What self-contrast decoding (https://huggingface.co/papers/2405.14507) costs, as a multiple of greedy decoding.

    python examples/benchmarks/self_contrast.py
    python examples/benchmarks/self_contrast.py --model my-moe --dtypes bfloat16 --implementations hf_moe

Batch 1, 256 new tokens; greedy, separate and fused runs take turns, and a figure is the median of the ratios of a
round. With one thread it is CPU time of that thread, which other jobs on the machine disturb least, else wall time.

By default a Mixtral with random weights and the sizes of SmolLM2-135M upcycled to 16 experts, top-2: 1.3 billion
parameters. Its streams choose different experts about as often as they can, so it is the expensive end; the share of
weak experts that the strong stream did not choose, each of them more weights to read, is in the table.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from hf_moe import SelfContrast, moe_layers
from hf_moe.files import write_text


TARGET = 1.35


def random_model(layers: int, experts: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> Any:
    """A random Mixtral with SmolLM2-135M's proportions: intermediate 8/3 of the hidden size, heads of 64."""
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        head_dim=64,
        num_local_experts=experts,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def run(model: Any, prompt: torch.Tensor, new_tokens: int, decoder: SelfContrast | None) -> tuple[float, Any]:
    """Seconds of one generation, and its output."""
    start = clock()
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, custom_generate=decoder, return_dict_in_generate=True,
    )  # fmt: skip
    return clock() - start, output


def clock() -> float:
    """CPU time of this thread where only one computes, else wall time."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def unchosen_share(model: Any, prompt: torch.Tensor, new_tokens: int, weak: str) -> float:
    """Share of the weak stream's experts that the strong stream did not choose for the same token and layer."""
    unchosen: list[float] = []

    def look(_: Any, args: tuple) -> None:
        index, weights = args[1], args[2]
        if index.shape[0] == 2:  # a decoding step: row 0 strong, row 1 weak
            weak_experts = index[1][weights[1] > 0]
            unchosen.append(1 - torch.isin(weak_experts, index[0]).float().mean().item())

    handles = [layer.experts.register_forward_pre_hook(look) for layer in moe_layers(model)]
    try:
        run(model, prompt, new_tokens, SelfContrast(weak=weak, mode="fused"))
    finally:
        for handle in handles:
            handle.remove()
    return statistics.mean(unchosen)


def measure(model: Any, args: argparse.Namespace) -> list[dict]:
    """A row per experts implementation. Rounds are interleaved over implementations and modes."""
    decoders = {"greedy": None} | {mode: SelfContrast(weak=args.weak, mode=mode) for mode in ("separate", "fused")}
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, model.config.vocab_size, (1, args.prompt), generator=generator)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in args.implementations}
    rows = {}
    for name in args.implementations:  # kernels are built at first use
        model.set_experts_implementation(name)
        found = {mode: run(model, prompt, min(8, args.new_tokens), decoder)[1] for mode, decoder in decoders.items()}
        share = unchosen_share(model, prompt, min(24, args.new_tokens), args.weak)
        rows[name] = {"implementation": name, "unchosen_share": share, "cache": found["fused"].weak_cache_bytes}
    for round_ in range(args.rounds):
        prompt = torch.randint(3, model.config.vocab_size, (1, args.prompt), generator=generator)
        for name in args.implementations:
            model.set_experts_implementation(name)
            modes = list(decoders)[round_ % 3 :] + list(decoders)[: round_ % 3]
            timed = {mode: run(model, prompt, args.new_tokens, decoders[mode]) for mode in modes}
            seconds[name].append({mode: duration for mode, (duration, _) in timed.items()})
            rows[name]["cache"] = timed["separate"][1].weak_cache_bytes
    for name, rounds in seconds.items():
        rows[name]["greedy_ms"] = 1e3 * statistics.median(times["greedy"] for times in rounds) / args.new_tokens
        for mode in ("separate", "fused"):
            ratios = [times[mode] / times["greedy"] for times in rounds]
            rows[name] |= {mode: statistics.median(ratios), f"{mode}_range": [min(ratios), max(ratios)]}
    return list(rows.values())


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id of a MoE language model; random weights by default")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--implementations", nargs="+", default=["grouped_mm", "hf_moe"])
    parser.add_argument("--weak", default="rank:2")
    parser.add_argument("--prompt", type=int, default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder for self_contrast.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print a table, write JSON."""
    args = parse_arguments(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    rows = []
    try:
        for name in args.dtypes:
            dtype = getattr(torch, name)
            if args.model:
                model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
            else:
                model = random_model(args.layers, args.experts, args.hidden, args.vocabulary, dtype)
            size = sum(parameter.numel() for parameter in model.parameters())
            rows += [{"dtype": name, "parameters": size, **row} for row in measure(model, args)]
            del model
    finally:
        torch.set_num_threads(threads)
    columns = ("dtype", "experts", "greedy, ms per token", "separate", "fused (range)", "unchosen", "second cache")
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for row in rows:
        low, high = row["fused_range"]
        cells = (
            row["dtype"], row["implementation"], f"{row['greedy_ms']:.1f}", f"{row['separate']:.2f}",
            f"{row['fused']:.2f} ({low:.2f} to {high:.2f})", f"{row['unchosen_share']:.0%}",
            f"{row['cache'] / 1e6:.2f} MB",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    best = min(rows, key=lambda row: row["fused"])
    print(
        f"\n{rows[0]['parameters'] / 1e6:.0f} million parameters, {args.threads} thread(s). Lowest: "
        f"{best['fused']:.2f} with {best['implementation']}, {best['dtype']}; the aim is at most {TARGET}."
    )
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        written = {"settings": settings, "rows": rows}
        write_text(args.output / "self_contrast.json", json.dumps(written, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
