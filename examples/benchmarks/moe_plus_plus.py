"""How much faster is a MoE++ layer than a plain top-2 MoE layer of equal parameters?

    python examples/benchmarks/moe_plus_plus.py --output out

MoE++ (2410.07348) reports 1.15 to 2.11 times the expert throughput on GPUs, and 1.22 at tau = 0.75 with 16 experts.
Here both layers (`MoeBlock`: router, dispatch, experts) run in turn in one process, on one thread.

* Equal parameters: both have the same feed-forward experts; MoE++ adds 4 experts without feed-forward.
* Routing as in a trained model: at the optimum of the balance loss (Eq. 7) a feed-forward expert gets tau times what
  an expert without feed-forward gets. Nothing is trained here; the routers are real, with random weights of equal
  norm and one bias on the experts without feed-forward, set so that this proportion comes out. The table says which
  share of the slots feed-forward experts got: tau N / (tau N + 4), and its inverse is the ideal speed-up.
* Fresh inputs, hence fresh routing, for every call of either layer: repeated shapes would flatter bf16 kernels.
* Time is CPU time of the thread (other jobs on the machine disturb it little) and wall time. A ratio is taken within
  each round, plain divided by MoE++; the table has the median over rounds and the quartiles.

Few tokens gain little: then reading the experts' weights costs more than the products, and all experts are read.
Writes `moe_plus_plus.json` and, where matplotlib is installed, `moe_plus_plus.png`.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from hf_moe import MoeLlamaConfig, MoePlusPlusConfig
from hf_moe.layers import MoeBlock
from hf_moe.routing import RoutingContext


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("forward", "training")


class Case(NamedTuple):
    """One line of the table."""

    implementation: str
    dtype: str
    mode: str
    tokens: int
    tau: float


def make_layer(args: argparse.Namespace, case: Case, tau: float | None) -> MoeBlock:
    """A layer with random weights; `tau=None` is the plain one."""
    sizes = {
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_experts": args.experts,
        "num_experts_per_tok": 2,
    }
    if tau is None:
        config = MoeLlamaConfig(**sizes, router_config={"norm_topk_prob": False})
    else:
        config = MoePlusPlusConfig(**sizes, router_tau=tau, expert_capacity_factor=None, router_config={"bias": True})
    config._experts_implementation = case.implementation
    layer = MoeBlock(config, layer_idx=1)
    with torch.no_grad():
        # Logits of equal spread for every expert, so that equal experts get equal numbers of tokens.
        layer.gate.weight.copy_(torch.nn.functional.normalize(torch.randn_like(layer.gate.weight), dim=-1))
        if tau is not None:
            layer.gate.residual_weight.normal_(std=0.1 * layer.gate.num_experts**-0.5)
            balance(layer, args.experts, tau)
    gate = layer.gate
    layer.to(DTYPES[case.dtype])
    gate.to(torch.float32)  # as in our models
    return layer


def balance(layer: MoeBlock, num_experts: int, tau: float, tokens: int = 8192) -> None:
    """Sets the bias of the experts without feed-forward so that f_ffn = tau f_zc, by bisection."""
    hidden_states = torch.randn(tokens, layer.gate.hidden_size)
    context = RoutingContext(prev_state=torch.randn(tokens, layer.gate.num_experts))
    wanted = expected_share(num_experts, layer.zero_experts.num_experts, tau)
    low, high = -10.0, 10.0
    for _ in range(30):
        layer.gate.bias[num_experts:] = (low + high) / 2
        share = (layer.gate(hidden_states, context).top_k_index < num_experts).float().mean()
        low, high = ((low + high) / 2, high) if share > wanted else (low, (low + high) / 2)


def expected_share(num_experts: int, num_zero_computation: int, tau: float) -> float:
    """Share of the slots that feed-forward experts get: tau N / (tau N + Z)."""
    return tau * num_experts / (tau * num_experts + num_zero_computation)


def run(layer: MoeBlock, case: Case, hidden: int) -> tuple[float, float]:
    """CPU and wall seconds of one call on fresh inputs."""
    training = case.mode == "training"
    hidden_states = torch.randn(1, case.tokens, hidden).to(DTYPES[case.dtype]).requires_grad_(training)
    state = torch.randn(case.tokens, layer.gate.num_experts) if layer.gate.carries_state else None
    gradient = torch.randn_like(hidden_states) if training else None
    for parameter in layer.parameters():
        parameter.grad = None
    context = RoutingContext(prev_state=state)
    with torch.set_grad_enabled(training):
        wall, cpu = time.perf_counter(), time.thread_time()
        output, _ = layer(hidden_states, context)
        if training:
            output.backward(gradient)
        return time.thread_time() - cpu, time.perf_counter() - wall


def share_of_slots(layer: MoeBlock, case: Case, hidden: int) -> float:
    """Share of the slots that went to feed-forward experts, measured."""
    context = RoutingContext(prev_state=torch.randn(4096, layer.gate.num_experts))
    with torch.no_grad():
        index = layer.gate(torch.randn(4096, hidden).to(DTYPES[case.dtype]), context).top_k_index
    return (index < layer.num_experts).float().mean().item()


def compare(args: argparse.Namespace, cases: list[Case], progress: tqdm) -> list[dict]:
    """Times the plain layer and the MoE++ layers of `cases`, which differ in tau only, in turn."""
    layers = {None: make_layer(args, cases[0], None)}
    layers.update({case.tau: make_layer(args, case, case.tau) for case in cases})
    seconds = {tau: ([], []) for tau in layers}
    order = list(layers)
    for round_ in range(args.warmup + args.rounds):
        order = order[1:] + order[:1]  # nobody always runs after the same neighbour
        for tau in order:
            cpu, wall = run(layers[tau], cases[0], args.hidden)
            if round_ >= args.warmup:
                seconds[tau][0].append(cpu)
                seconds[tau][1].append(wall)
        progress.update()
    rows = []
    for case in cases:
        row = {**case._asdict(), "ffn_share": share_of_slots(layers[case.tau], case, args.hidden)}
        row["ideal"] = 1 / expected_share(args.experts, layers[case.tau].zero_experts.num_experts, case.tau)
        for clock, name in enumerate(("cpu", "wall")):
            plain, ours = seconds[None][clock], seconds[case.tau][clock]
            ratios = [p / o for p, o in zip(plain, ours, strict=True)]
            quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
            row[f"{name}_ratio"], row[f"{name}_quartiles"] = statistics.median(ratios), [quartiles[0], quartiles[2]]
            row[f"{name}_ms_plain"] = 1e3 * statistics.median(plain)
            row[f"{name}_ms"] = 1e3 * statistics.median(ours)
        row["parameters"] = sum(p.numel() for p in layers[case.tau].parameters())
        row["parameters_plain"] = sum(p.numel() for p in layers[None].parameters())
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The results as Markdown."""
    lines = [
        "| experts | dtype | mode | tokens | tau | FFN slots | ideal | CPU ratio (quartiles) | wall | ms plain | ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["cpu_quartiles"]
        lines.append(
            f"| {r['implementation']} | {r['dtype']} | {r['mode']} | {r['tokens']} | {r['tau']:g} "
            f"| {100 * r['ffn_share']:.1f} % | {r['ideal']:.2f} | **{r['cpu_ratio']:.2f}** ({low:.2f}-{high:.2f}) "
            f"| {r['wall_ratio']:.2f} | {r['cpu_ms_plain']:.1f} | {r['cpu_ms']:.1f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """CPU-time ratio over tokens, one panel per dtype and mode, at the tau nearest to 0.75."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tau = min({r["tau"] for r in rows}, key=lambda t: abs(t - 0.75))
    rows = [r for r in rows if r["tau"] == tau]
    panels = sorted({(r["dtype"], r["mode"]) for r in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for implementation in dict.fromkeys(r["implementation"] for r in rows):
            line = [r for r in rows if (r["dtype"], r["mode"]) == panel and r["implementation"] == implementation]
            ratios = [r["cpu_ratio"] for r in line]
            error = [
                [r["cpu_ratio"] - r["cpu_quartiles"][0] for r in line],
                [r["cpu_quartiles"][1] - r["cpu_ratio"] for r in line],
            ]
            axis.errorbar([r["tokens"] for r in line], ratios, yerr=error, marker="o", label=implementation, capsize=3)
        axis.axhline(rows[0]["ideal"], color="grey", linestyle="--", label="fewer products alone")
        axis.axhline(1.15, color="lightgrey", linestyle=":", label="1.15")
        axis.set(title=" ".join(panel), xlabel="tokens", xscale="log")
    axes[0][0].set_ylabel(f"plain top-2 / MoE++ (tau {tau:g}), CPU time")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Runs the benchmark, prints the table and returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for the JSON file and the figure")
    parser.add_argument("--implementations", nargs="+", default=["eager", "grouped_mm"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--taus", nargs="+", type=float, default=[0.75])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", type=int, default=16, help="feed-forward experts")
    parser.add_argument("--hidden", type=int, default=768, help="the default sizes are the paper's 1B model")
    parser.add_argument("--intermediate", type=int, default=2048)
    args = parser.parse_args(arguments)
    if args.rounds < 1 or args.warmup < 0:
        parser.error("`--rounds` must be at least 1 and `--warmup` at least 0.")

    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = []
    groups = list(itertools.product(args.implementations, args.dtypes, args.modes, args.tokens))
    with tqdm(total=len(groups) * (args.warmup + args.rounds), unit="round") as progress:
        for group in groups:
            rows += compare(args, [Case(*group, tau) for tau in args.taus], progress)
    torch.set_num_threads(threads)
    print(table(rows))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(args).items() if k != "output"}
        result = {"settings": settings, "torch": torch.__version__, "machine": platform.machine(), "rows": rows}
        (args.output / "moe_plus_plus.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        try:
            plot(rows, args.output / "moe_plus_plus.png")
        except ImportError:
            print("matplotlib is not installed, so there is no figure.")
    return rows


if __name__ == "__main__":
    main()
