"""Tokens per second of a whole model: greedy decoding and training with Trainer, every implementation in one run.

    python examples/benchmarks/experts_end_to_end.py
    python examples/benchmarks/experts_end_to_end.py --model my-upcycled-smollm2 --dtype bfloat16

By default a model with random weights and the sizes of SmolLM2-135M upcycled to 8 experts, top-2 (hidden 576, experts
of 1536, 9 query and 3 key-value heads, a vocabulary of 49152), with fewer layers: what one layer costs does not depend
on what it learned. `--model` takes a real one, as `hf-moe upcycle` makes it.

The implementations take turns; a figure is the median over the rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_moe import MoeLlamaConfig


IMPLEMENTATIONS = ("eager", "grouped_mm", "hf_moe")


def smollm2_config(layers: int, vocabulary: int) -> MoeLlamaConfig:
    """SmolLM2-135M's sizes with 8 experts."""
    return MoeLlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def decode(model, prompt: torch.Tensor, new_tokens: int) -> float:
    """Tokens per second of greedy decoding, CPU time where one thread runs."""
    start = clock()
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False,
    )  # fmt: skip
    return (output.numel() - prompt.numel()) / (clock() - start)


def train(model, steps: int, batch: int, length: int, seed: int) -> float:
    """Tokens per second of training steps with Trainer on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, model.config.vocab_size, (steps * batch, length), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-5, use_cpu=True,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, optim="sgd",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
        start = clock()
        trainer.train()
        return steps * batch * length / (clock() - start)


def clock() -> float:
    """CPU time of this thread where only one computes, else wall time."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def main(arguments: list[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id of a MoE model; random weights by default")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        dtype = getattr(torch, args.dtype)
        if args.model:
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(smollm2_config(args.layers, args.vocabulary), dtype=dtype)
        figures: dict[str, dict[str, list[float]]] = {"decode": {}, "train": {}}
        for round_ in range(args.rounds):
            generator = torch.Generator().manual_seed(round_)
            prompt = torch.randint(1, model.config.vocab_size, (1, 32), generator=generator)
            for name in IMPLEMENTATIONS[round_ % 3 :] + IMPLEMENTATIONS[: round_ % 3]:
                model.set_experts_implementation(name)
                found = decode(model.eval(), prompt, args.new_tokens)
                figures["decode"].setdefault(name, []).append(found)
                found = train(model.train(), args.steps, args.batch, args.length, seed=round_)
                figures["train"].setdefault(name, []).append(found)
    finally:
        torch.set_num_threads(before)
    print("| implementation | decoding, tokens/s | training, tokens/s |\n| --- | --- | --- |")
    for name in IMPLEMENTATIONS:
        print(f"| {name} | " + " | ".join(f"{statistics.median(figures[kind][name]):.1f}" for kind in figures) + " |")
    for kind, by_name in figures.items():
        best = max(("eager", "grouped_mm"), key=lambda name: statistics.median(by_name[name]))
        ratios = [ours / theirs for ours, theirs in zip(by_name["hf_moe"], by_name[best], strict=True)]
        print(f"{kind}: hf_moe is {statistics.median(ratios):.2f} times {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
