"""Does a layer whose tokens use fewer experts really compute less?

    python examples/benchmarks/active_experts.py --output out

Three routers with a variable number of experts are set to use more and more of them: `fixed_random` (SMoE-Dropout,
2303.01610) by k, `top_p` (2403.07652) by p, and `comet` (2306.02824) by the width gamma of its steps: a narrow one
stands for a saturated gate, a wide one for a gate at the start of training. For each setting:

* experts per token, counted;
* floating-point operations of the experts, counted by `torch.utils.flop_counter`;
* time of a forward (and backward) of the layer, router included. All settings run in turn in one process, on one
  thread, with fresh inputs in every round. Ratios are taken within a round, to the setting with all experts; the
  table has the median over rounds and the quartiles. CPU time of the thread is used, which other jobs disturb little.

The experts' operations fall exactly with the active count. Time falls less: the router, the sorting and the reading of
weights stay. Writes `active_experts.json` and, where matplotlib is installed, `active_experts.png`.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from hf_moe import MoeLlamaConfig
from hf_moe.files import write_text
from hf_moe.layers import MoeBlock


__all__ = ["main"]

MODES = ("forward", "training")
#: Share of the experts, p and gamma; the last setting of each uses all experts.
SETTINGS: dict[str, tuple[float, ...]] = {
    "fixed_random": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
    "top_p": (0.1, 0.3, 0.5, 0.8, 1.0),
    "comet": (1e-3, 0.5, 1.0, 2.0, 100.0),
}


def make_layers(args: argparse.Namespace, router_type: str) -> dict[float, MoeBlock]:
    """One layer per setting of this router; all share router and expert weights."""
    config = MoeLlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_experts=args.experts,
        num_experts_per_tok=2,
        router_type=router_type,
        router_aux_loss_coef=0.0,
        router_config={"entropy_coef": 0.0} if router_type != "fixed_random" else {},
    )
    config._experts_implementation = args.implementation
    layers: dict[float, MoeBlock] = {}
    for setting in SETTINGS[router_type]:
        layer = MoeBlock(config, layer_idx=0)
        if layers:
            first = next(iter(layers.values()))
            layer.experts = first.experts
            layer.gate.load_state_dict(first.gate.state_dict())
        else:
            spread_router(layer.gate, args.hidden)
        adjust(layer.gate, router_type, setting)
        layers[setting] = layer
    return layers


def spread_router(gate: Any, hidden: int) -> None:
    """Logits and steps of standard deviation 1 for standard normal inputs, as after some training."""
    with torch.no_grad():
        for tensor in (*gate.parameters(), *gate.buffers()):
            if tensor.dim() == 2:
                tensor.normal_(std=hidden**-0.5)


def adjust(gate: Any, router_type: str, setting: float) -> None:
    """Has the router use the number of experts that `setting` stands for."""
    if router_type == "fixed_random":
        gate.k.fill_(max(1, round(setting * gate.num_experts)))
    elif router_type == "top_p":
        gate.p.fill_(setting)
    else:
        gate.gamma = setting


def run(layer: MoeBlock, tokens: int, hidden: int, mode: str) -> float:
    """CPU seconds of one call on fresh inputs."""
    training = mode == "training"
    hidden_states = torch.randn(1, tokens, hidden, requires_grad=training)
    gradient = torch.randn_like(hidden_states)
    for parameter in layer.parameters():
        parameter.grad = None
    with torch.set_grad_enabled(training):
        start = time.thread_time()
        output, _ = layer(hidden_states)
        if training:
            output.backward(gradient)
        return time.thread_time() - start


def count(layer: MoeBlock, tokens: int, hidden: int) -> tuple[float, int]:
    """Experts per token, and operations of the experts, of one batch."""
    hidden_states = torch.randn(tokens, hidden)
    implementation, layer.experts.config._experts_implementation = (
        layer.experts.config._experts_implementation,
        "eager",
    )
    try:  # torch does not count grouped_mm
        with torch.no_grad():
            out = layer.gate(hidden_states)
            with FlopCounterMode(display=False) as counter:
                layer.mix(hidden_states, out.top_k_index, out.top_k_weights)
    finally:
        layer.experts.config._experts_implementation = implementation
    active = (out.top_k_index < layer.num_experts).sum(-1).double().mean().item()
    return active, counter.get_total_flops()


def compare(args: argparse.Namespace, router_type: str, mode: str, progress: tqdm) -> list[dict]:
    """Times all settings of a router in turn."""
    layers = make_layers(args, router_type)
    seconds: dict[float, list[float]] = {setting: [] for setting in layers}
    order = list(layers)
    for round_ in range(args.warmup + args.rounds):
        order = order[1:] + order[:1]  # nobody always runs after the same neighbour
        for setting in order:
            taken = run(layers[setting], args.tokens, args.hidden, mode)
            if round_ >= args.warmup:
                seconds[setting].append(taken)
        progress.update()
    everything = max(layers)
    counts = {setting: count(layer, args.tokens, args.hidden) for setting, layer in layers.items()}
    rows = []
    for setting, (active, flops) in counts.items():
        ratios = [s / all_ for s, all_ in zip(seconds[setting], seconds[everything], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "router": router_type,
                "setting": setting,
                "mode": mode,
                "active_experts": active,
                "flops": flops,
                "flops_ratio": flops / counts[everything][1],
                "time_ratio": statistics.median(ratios),
                "time_quartiles": [quartiles[0], quartiles[2]],
                "ms": 1e3 * statistics.median(seconds[setting]),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """The results as Markdown."""
    lines = [
        "| router | mode | experts per token | experts' GFLOP | share | time (quartiles) | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["time_quartiles"]
        lines.append(
            f"| {r['router']} | {r['mode']} | {r['active_experts']:.2f} | {r['flops'] / 1e9:.3f} "
            f"| {r['flops_ratio']:.3f} | **{r['time_ratio']:.3f}** ({low:.3f}-{high:.3f}) | {r['ms']:.1f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Operations and time over experts per token, one panel per router."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    routers = list(dict.fromkeys(r["router"] for r in rows))
    figure, axes = plt.subplots(1, len(routers), figsize=(3.6 * len(routers), 3.4), sharey=True, squeeze=False)
    for axis, router in zip(axes[0], routers, strict=True):
        mine = [r for r in rows if r["router"] == router]
        for mode in dict.fromkeys(r["mode"] for r in mine):
            line = sorted((r for r in mine if r["mode"] == mode), key=lambda r: r["active_experts"])
            ratios = [r["time_ratio"] for r in line]
            error = [
                [r["time_ratio"] - r["time_quartiles"][0] for r in line],
                [r["time_quartiles"][1] - r["time_ratio"] for r in line],
            ]
            axis.errorbar([r["active_experts"] for r in line], ratios, yerr=error, marker="o", capsize=3, label=mode)
        line = sorted(mine, key=lambda r: r["active_experts"])
        axis.plot([r["active_experts"] for r in line], [r["flops_ratio"] for r in line], color="grey", ls="--",
                  label="experts' operations")  # fmt: skip
        axis.set(title=router, xlabel="experts per token", ylim=(0, None))
    axes[0][0].set_ylabel("share of the cost with all experts")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Runs the benchmark, prints the table and returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for the JSON file and the figure")
    parser.add_argument("--routers", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--implementation", default="grouped_mm", help="of the experts")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.rounds < 1 or args.warmup < 0:
        parser.error("`--rounds` must be at least 1 and `--warmup` at least 0.")

    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = []
    with tqdm(total=len(args.routers) * len(args.modes) * (args.warmup + args.rounds), unit="round") as progress:
        for router_type in args.routers:
            for mode in args.modes:
                rows += compare(args, router_type, mode, progress)
    torch.set_num_threads(threads)
    print(table(rows))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(args).items() if k != "output"}
        result = {"settings": settings, "torch": torch.__version__, "machine": platform.machine(), "rows": rows}
        write_text(args.output / "active_experts.json", json.dumps(result, indent=2) + "\n")
        try:
            plot(rows, args.output / "active_experts.png")
        except ImportError:
            print("matplotlib is not installed, so there is no figure.")
    return rows


if __name__ == "__main__":
    main()
