"""Run by two processes: compares a sharded model with the whole one. `python parallel_worker.py jobs.json`.

Each job is a checkpoint and the arguments of a `DistributedConfig`; rank 0 writes what it measured next to it.
"""

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_moe


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def measure(folder: str, distributed: dict, implementation: str) -> dict:
    """Largest differences between the sharded and the whole model, and the local shapes of expert parameters."""
    options = {"experts_implementation": implementation}
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**distributed), **options
    )
    reference = AutoModelForCausalLM.from_pretrained(folder, **options)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # empty slots: padding visits no expert
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        logits = [whole(m.eval()(**inputs).logits)[mask.bool()] for m in (model, reference)]
    outputs = [m.train()(**inputs, labels=ids) for m in (model, reference)]
    for output in outputs:
        output.loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    differences = {
        name: (whole(p.grad) - expected[name]).abs().max().item()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    local = {name: list(p.to_local().shape) for name, p in model.named_parameters() if isinstance(p, DTensor)}
    return {
        "logits": (logits[0] - logits[1]).abs().max().item(),
        "scale": logits[1].abs().max().item(),
        "loss": abs(outputs[0].loss.item() - outputs[1].loss.item()),
        "aux_loss": abs(outputs[0].aux_loss.item() - outputs[1].aux_loss.item()),
        "gradients": max(differences.values()),
        "without_gradient": missing,
        "local": {name: shape for name, shape in local.items() if ".mlp." in name},
    }


def main(jobs_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for job in json.loads(Path(jobs_file).read_text()):
        result = measure(job["folder"], job["distributed"], job["implementation"])
        if dist.get_rank() == 0:
            Path(job["result"]).write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert hf_moe.__version__
    main(sys.argv[1])
