"""What mimic distillation keeps in memory: chunks of logits against all logits of teacher and student at once.

One loss and its backward pass, on a batch whose every token is distilled. Peak memory is torch's own record of what
was allocated beyond the models; losses and gradients are compared too.

    python examples/benchmarks/distillation_memory.py                     # vocabulary 49152, 1024 tokens
    python examples/benchmarks/distillation_memory.py --chunk-size 32
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from hf_moe.experts.benchmark.memory import peak_bytes
from hf_moe.files import write_text
from hf_moe.trainers import chunked_divergence


def make_model(vocabulary: int, hidden_size: int, seed: int) -> Any:
    """A language model that is nearly all vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_hidden_layers=2, initializer_range=0.2, **sizes))


def whole(student: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """The loss on all logits at once, as one would write it down."""
    with torch.no_grad():
        log_p = F.log_softmax(teacher(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)
    logits = student(input_ids=ids, use_cache=False).logits[:, :-1].float()
    divergence = F.kl_div(F.log_softmax(logits, dim=-1), log_p, reduction="none", log_target=True).sum(-1).mean()
    return divergence + F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def in_chunks(student: Any, teacher: Any, ids: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """The same in chunks."""
    with torch.no_grad():
        guide = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    hidden = student.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    divergence, cross_entropy = chunked_divergence(
        hidden, guide, ids[:, 1:].flatten(), student.lm_head, teacher.lm_head, chunk_size=chunk_size
    )
    return (divergence + cross_entropy) / len(hidden)


def measure(vocabulary: int, length: int, hidden_size: int, chunk_size: int) -> dict[str, float]:
    """Peak bytes of both, and how far apart they are."""
    student, teacher = make_model(vocabulary, hidden_size, 0), make_model(vocabulary, hidden_size, 1)
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    for name, loss_of in {
        "whole": lambda: whole(student, teacher, ids),
        "chunks": lambda: in_chunks(student, teacher, ids, chunk_size),
    }.items():

        def run(name: str = name, loss_of: Any = loss_of) -> None:
            loss = loss_of()
            loss.backward()
            found[f"loss_{name}"] = loss.item()

        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)  # both find them there
        found[f"bytes_{name}"] = peak_bytes(run)
        found[f"gradient_{name}"] = torch.cat([p.grad.flatten() for p in student.parameters()])
    one, other = found.pop("gradient_whole"), found.pop("gradient_chunks")
    found["gradient_difference"] = ((one - other).norm() / one.norm()).item()
    found["loss_difference"] = abs(found["loss_whole"] - found["loss_chunks"])
    found["ratio"] = found["bytes_chunks"] / found["bytes_whole"]
    return found


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--output", type=Path, help="folder for the figures as JSON")
    args = parser.parse_args(arguments)
    result = measure(args.vocabulary, args.length, args.hidden_size, args.chunk_size)
    mib = {name: result[f"bytes_{name}"] / 2**20 for name in ("whole", "chunks")}
    print(
        f"peak memory: all logits {mib['whole']:.0f} MiB, chunks {mib['chunks']:.0f} MiB, ratio {result['ratio']:.3f}"
    )
    print(f"loss {result['loss_whole']:.6f}, difference {result['loss_difference']:.2e}; "
          f"relative difference of gradients {result['gradient_difference']:.2e}")  # fmt: skip
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        write_text(args.output / "distillation_memory.json", json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
