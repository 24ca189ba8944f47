"""What an adapter costs: forward time of each adapter type over PEFT's LoRA with the same number of parameters.

Base, LoRA and the adapter run in turn within each round, on the same input; the figures are medians of the rounds'
ratios. Aim: no more than 1.3 times LoRA.

    python examples/benchmarks/adapters.py --rounds 31 --output out
"""

import argparse
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import AgdConfig, MixdaConfig, MosaConfig, PillConfig
from hf_moe.adapters.agd import agd_guidance


class Subject(NamedTuple):
    """An adapter type and the modules where LoRA stands in the comparison: the same ones, or what they consist of."""

    config: Callable[[], Any]
    lora_targets: list[str]
    within: Callable[[Any], Any] = lambda model: nullcontext()


SUBJECTS: dict[str, Subject] = {
    "mosa": Subject(lambda: MosaConfig(r=64), ["gate_proj", "up_proj", "down_proj"]),
    "mixda": Subject(lambda: MixdaConfig(domain_layers="all"), ["down_proj"]),
    "pill": Subject(lambda: PillConfig(r=32), ["v_proj", "gate_proj", "up_proj"]),
    "agd": Subject(lambda: AgdConfig(hidden_size=128), ["o_proj"], lambda model: agd_guidance(model, 4.0)),
    "mosa, LoRA form": Subject(lambda: MosaConfig(style="lora", r=16), ["q_proj", "v_proj"]),
}


def base_model(layers: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    return LlamaForCausalLM(config).eval()


def num_added(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def lora_of_size(base: Callable[[], Any], targets: list[str], parameters: int) -> Any:
    """LoRA with the rank whose number of parameters comes nearest."""
    one = num_added(get_peft_model(base(), LoraConfig(r=1, target_modules=targets)))
    rank = max(1, round(parameters / one))
    return get_peft_model(base(), LoraConfig(r=rank, target_modules=targets)).eval()


def seconds(run: Callable[[], Any]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def measure(subject: Subject, base: Callable[[], Any], ids: torch.Tensor, rounds: int) -> dict[str, float]:
    adapted = get_peft_model(base(), subject.config()).eval()
    lora = lora_of_size(base, subject.lora_targets, num_added(adapted))
    plain = base()
    ratios, over_base = [], []
    with torch.no_grad(), subject.within(adapted):
        for round_number in range(rounds + 2):
            runs = [lambda: plain(input_ids=ids), lambda: lora(input_ids=ids), lambda: adapted(input_ids=ids)]
            order = [(round_number + i) % 3 for i in range(3)]  # nobody always runs last
            times = dict(zip(order, (seconds(runs[i]) for i in order), strict=True))
            if round_number >= 2:  # the first rounds warm up
                ratios.append(times[2] / times[1])
                over_base.append(times[2] / times[0])
    return {
        "adapter_parameters": num_added(adapted),
        "lora_parameters": num_added(lora),
        "over_lora": median(ratios),
        "over_base": median(over_base),
        "spread": (sorted(ratios)[math.ceil(0.75 * rounds) - 1] - sorted(ratios)[rounds // 4]) / 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=sorted(SUBJECTS), default=sorted(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 512], help="tokens per sequence, one table row each"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--output", type=Path, help="folder for adapters.json")
    args = parser.parse_args()

    rows = []
    for name in args.types:
        for tokens in args.tokens:
            ids = torch.randint(1, 1024, (args.batch, tokens), generator=torch.Generator().manual_seed(0))
            result = measure(SUBJECTS[name], lambda: base_model(args.layers, args.hidden), ids, args.rounds)
            rows.append({"type": name, "tokens": tokens, **result})
            print(
                f"{name:20} {tokens:5} tokens: {result['over_lora']:.2f} x LoRA (± {result['spread']:.2f}), "
                f"{result['over_base']:.2f} x base; {result['adapter_parameters']} against "
                f"{result['lora_parameters']} parameters"
            )
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "adapters.json").write_text(json.dumps({"rounds": args.rounds, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
