"""Helpers of the decoding tests: tiny models, prompts, and self-contrast decoding written the slow and obvious way."""

import torch

from common.tiny_families import tiny_model
from hf_moe.generation import contrast_logits, parse_weak


def spread_model(model_type: str = "mixtral", **overrides):
    """A tiny random model whose logits are far apart, so that rounding never decides about a token."""
    model = tiny_model(model_type, **overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.generation_config.eos_token_id = None  # random models would stop anywhere
    return model


def prompt(rows: int = 1, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random tokens `(rows, length)` without special ones."""
    return torch.randint(3, 384, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def slow_self_contrast(model, ids: torch.Tensor, steps: int, beta=0.5, alpha=0.1, weak="rank:2") -> torch.Tensor:
    """Greedy self-contrast decoding without caches."""
    for _ in range(steps):
        strong = model(ids).logits[:, -1]
        with parse_weak(weak).override(model):
            worse = model(ids).logits[:, -1]
        ids = torch.cat([ids, contrast_logits(strong, worse, beta, alpha).argmax(-1, keepdim=True)], dim=-1)
    return ids
