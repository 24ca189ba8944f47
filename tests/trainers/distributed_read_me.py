"""Run by `test_read_me.py` in two processes: router and expert steps, saves how each rank ends."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from common.tiny_training import token_rows
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import convert_to_readme
from hf_moe.trainers import ReadMeTrainer, ReadMeTrainingArguments


__all__ = ["train"]


def train(folder: Path, batch_size: int) -> dict[str, torch.Tensor]:
    """One round of two router and two expert steps; the weights by name."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            initializer_range=0.2,
        )
        dense = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    domains = {name: torch.randint(low, low + 40, (2, 32), generator=generator) for low, name in ((3, "a"), (60, "b"))}
    model, _ = convert_to_readme(dense, domains, check=False, multiple_of=1)
    options = {"rounds": 1, "router_steps": 2, "expert_steps": 2, "optim": "sgd", "trained_parts": "all"}
    options |= {"learning_rate": 0.1, "router_learning_rate": 0.1, "max_grad_norm": 1.0}
    options |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 2}
    options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = ReadMeTrainingArguments(str(folder), **options)
    trainer = ReadMeTrainer(model, args, teacher=dense, train_dataset=token_rows(16, pad=False))
    trainer.train()
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    state = train(folder / f"run-{rank}", batch_size=1)
    save_file({**state, "world_size": torch.tensor(world_size)}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
