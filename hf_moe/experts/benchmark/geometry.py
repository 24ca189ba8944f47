"""Shapes of expert banks to measure."""

from typing import Any, NamedTuple

import torch


__all__ = ["GEOMETRIES", "Geometry", "geometry_of_config", "make_experts", "make_routing"]


class Geometry(NamedTuple):
    """One bank: N gated experts of D x I, K of them per token.

    Args:
        name (`str`): Short name.
        hidden (`int`): D.
        intermediate (`int`): I.
        experts (`int`): N.
        slots (`int`): K.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    slots: int

    def __str__(self) -> str:
        return f"{self.name} {self.hidden}/{self.intermediate} E{self.experts} k{self.slots}"

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass."""
        return 6 * tokens * self.slots * self.hidden * self.intermediate

    def read_bytes(self, chosen: int, dtype: torch.dtype) -> int:
        """Bytes of the weights of `chosen` experts."""
        return 3 * chosen * self.hidden * self.intermediate * dtype.itemsize


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry("A", 1024, 3584, 8, 2),
        Geometry("B", 2048, 1024, 64, 8),
        Geometry("C", 256, 512, 16, 2),
        Geometry("D", 1024, 512, 32, 4),
        Geometry("SmolLM2", 576, 1536, 8, 2),
    )
}

_NAMES = {
    "hidden": ("hidden_size",),
    "intermediate": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_dim"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "slots": ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"),
}


def geometry_of_config(config: Any, name: str) -> Geometry:
    """The geometry of a MoE model.

    Args:
        config (`PreTrainedConfig`): Its config.
        name (`str`): What to call it.

    Raises:
        ValueError: a size cannot be found: the model has no routed experts, or calls them differently.
    """
    config = config.get_text_config()
    values = []
    for field, names in _NAMES.items():
        value = next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)
        if value is None:
            raise ValueError(
                f"`--model {name}`: its config says nothing about `{field}` (looked for {list(names)}). Choose a "
                "Mixture-of-Experts model, or `--geometry`."
            )
        values.append(value)
    return Geometry(name, *values)


def make_experts(geometry: Geometry, dtype: torch.dtype) -> torch.nn.Module:
    """An experts module of transformers with these shapes and seeded random values."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=geometry.hidden,
        intermediate_size=geometry.intermediate,
        num_local_experts=geometry.experts,
        num_experts_per_tok=geometry.slots,
    )
    config._experts_implementation = "eager"
    experts = MixtralExperts(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    return experts.to(dtype)


def make_routing(
    geometry: Geometry, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens `(T, D)`, experts `(T, K)` and weights `(T, K)` of a skewed router; new ones at every call."""
    bias = 0.7 * torch.randn(geometry.experts, generator=generator)
    logits = torch.randn(tokens, geometry.experts, generator=generator) + bias
    weights, index = logits.softmax(dim=-1).topk(geometry.slots, dim=-1)
    hidden = torch.randn(tokens, geometry.hidden, generator=generator)
    return hidden.to(dtype), index, weights.to(dtype)
