"""Routers with a variable number of experts: the experts' arithmetic follows the slots in use."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM


D, N, T = 32, 8, 64


def make_block(router_type, implementation, **options):
    config = MoeLlamaConfig(
        hidden_size=D,
        intermediate_size=D,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        num_experts=N,
        num_experts_per_tok=2,
        router_type=router_type,
        router_config=options,
        initializer_range=0.2,
    )
    model = MoeLlamaForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    return model.model.layers[0].mlp


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])  # torch does not count grouped_mm
@pytest.mark.parametrize(
    ("router_type", "settings"),
    [
        ("fixed_random", [("k", 1), ("k", 3), ("k", N)]),
        ("top_p", [("p", 0.05), ("p", 0.4), ("p", 1.0)]),
        ("comet", [("gamma", 1e-4), ("gamma", 0.5), ("gamma", 100.0)]),
    ],
)
def test_experts_compute_for_slots_in_use_only(router_type, settings, implementation, generator):
    x = torch.randn(1, T, D, generator=generator)
    block = make_block(router_type, implementation)
    seen = []
    for name, value in settings:
        if name == "gamma":
            block.gate.gamma = value
            with torch.no_grad():
                block.gate.node_weight.copy_(torch.randn(block.gate.node_weight.shape, generator=generator) * D**-0.5)
        else:
            getattr(block.gate, name).fill_(value)
        out = block.gate(x)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block.experts(x[0], out.top_k_index, out.top_k_weights)
        active = (out.top_k_index < N).sum().item()
        assert counter.get_total_flops() == active * 3 * 2 * D * D  # gate, up and down
        seen.append(active)
    assert seen[0] < seen[1] < seen[2] == T * N
    assert seen[0] <= 2 * T
