"""Routers with a variable number of experts: the experts' arithmetic follows the slots in use."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM
from hf_moe.routing import trim_slots


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


def test_slots_behind_the_last_one_in_use_are_cut_off():
    index = torch.tensor([[0, 2, N, N], [1, N, N, N]])
    weights = torch.tensor([[0.6, 0.4, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    short_index, short_weights = trim_slots(index, weights, N)
    assert torch.equal(short_index, index[:, :2]) and torch.equal(short_weights, weights[:, :2])
    for row in (index[:, 2:], index[:0]):  # nothing in use, no token
        assert trim_slots(row, torch.zeros(row.shape), N)[0].shape[-1] == (1 if len(row) else 4)
    full = torch.arange(4).expand(2, 4)
    assert trim_slots(full, full.float(), N)[0].shape == (2, 4)
    hole = torch.tensor([[0, N, 3, N]])  # an expert without a feed-forward lies between
    assert trim_slots(hole, torch.ones(1, 4), N)[0].shape == (1, 3)


@pytest.mark.parametrize("router_type", ["top_p", "fixed_random", "comet"])
def test_experts_get_the_slots_of_the_batch_and_compiled_code_all_of_them(router_type, generator, monkeypatch):
    block = make_block(router_type, "batched_mm").train()
    if router_type == "comet":
        with torch.no_grad():
            block.gate.node_weight.mul_(1000)
    x = torch.randn(1, T, D, generator=generator)
    widths = []
    experts = type(block.experts)
    forward = experts.forward
    monkeypatch.setattr(experts, "forward", lambda *args: widths.append(args[2].shape[-1]) or forward(*args))
    needed = int((block.gate(x).top_k_index < N).sum(-1).max())
    expected, _ = block(x)
    assert widths == [needed] and needed < N
    torch._dynamo.reset()
    compiled, _ = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    assert widths[-1] == N
    torch.testing.assert_close(compiled, expected)


def test_cut_slots_change_no_gradient(generator):
    x = torch.randn(1, T, D, generator=generator)
    found = []
    for variable in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            block = make_block("top_p", "eager").train()
        block.gate.variable_slots = variable
        output, _ = block(x)
        output.square().sum().backward()
        found.append((output, [p.grad for p in block.parameters()]))
    torch.testing.assert_close(found[0], found[1])
