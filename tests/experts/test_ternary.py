"""Ternary experts against the rules of BitNet b1.58 and against plain experts with rounded parameters."""

import pytest
import torch
from torch.nn import functional as F

from hf_moe.experts import build_experts
from hf_moe.experts.ternary_rounding import round_activations, round_weights, ternary_codes
from hf_moe.models.llama import MoeLlamaConfig


D, INNER, N, K, T = 16, 24, 4, 2, 9
W = torch.tensor([[0.5, -0.1, 0.9], [-0.3, 0.05, -1.15]])


def make_config(implementation="eager", expert_type="ternary", **fields):
    sizes = {"hidden_size": D, "moe_intermediate_size": INNER, "num_experts": N, "num_attention_heads": 2}
    config = MoeLlamaConfig(**{**sizes, "expert_type": expert_type, **fields})
    config._experts_implementation = implementation
    return config


def make_bank(implementation="eager", **fields):
    bank = build_experts(make_config(implementation, **fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return bank


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(T, D, generator=generator)
    index = torch.stack([torch.randperm(N, generator=generator)[:K] for _ in range(T)])
    index[0] = N  # empty slots
    weights = torch.rand(T, K, generator=generator).masked_fill(index == N, 0.0)
    return tokens, index, weights


def reference(bank, tokens, index, weights):
    """Expert by expert, each matrix rounded by the formula written out."""

    def rounded(matrix):
        s = matrix.abs().mean()
        return s * (matrix / s).round().clamp(-1, 1)

    def eight_bits(x):
        a = 127 / x.abs().amax(-1, keepdim=True)
        return (a * x).round().clamp(-128, 127) / a

    output = torch.zeros_like(tokens)
    for t in range(T):
        for slot in range(K):
            e = int(index[t, slot])
            if e < N:
                gate, up = bank.gate_up_proj[e].detach().chunk(2)
                x = eight_bits(tokens[t : t + 1])
                h = F.silu(x @ rounded(gate).T) * (x @ rounded(up).T)
                output[t] += weights[t, slot] * (eight_bits(h) @ rounded(bank.down_proj[e].detach()).T)[0]
    return output


def test_weights_are_rounded_by_the_mean_absolute_value():
    codes, scale = ternary_codes(W)
    assert scale.item() == pytest.approx(0.5)
    assert codes.tolist() == [[1, 0, 1], [-1, 0, -1]]
    assert round_weights(W).tolist() == [[0.5, 0.0, 0.5], [-0.5, 0.0, -0.5]]


def test_a_row_may_have_a_scale_of_its_own():
    codes, scale = ternary_codes(W, "row")
    torch.testing.assert_close(scale, torch.tensor([[0.5], [0.5]]))
    assert codes.tolist() == [[1, 0, 1], [-1, 0, -1]]


def test_activations_are_rounded_to_eight_bits_per_token():
    x = torch.tensor([[1.0, -2.0, 0.5]])
    rounded = round_activations(x)
    torch.testing.assert_close(rounded, torch.tensor([[64 / 63.5, -2.0, 32 / 63.5]]))
    # 64 / 63.5 + 32 / 63.5 times s = 0.5, and its opposite
    torch.testing.assert_close(rounded @ round_weights(W).T, torch.tensor([[0.755906, -0.755906]]))
    integers = torch.tensor([[64, -127, 32]]) @ ternary_codes(W)[0].long().T
    torch.testing.assert_close(integers * 0.5 / 63.5, rounded @ round_weights(W).T)


def test_rounding_again_keeps_the_codes_but_not_the_scale():
    codes, scale = ternary_codes(W)
    again, smaller = ternary_codes(scale * codes)
    assert torch.equal(again, codes)
    torch.testing.assert_close(smaller, scale * codes.abs().float().mean())


def test_the_gradient_passes_unchanged_where_values_were_clipped_too():
    for rounding in (round_weights, round_activations):
        weight = W.clone().requires_grad_()
        rounding(weight).sum().backward()
        assert torch.equal(weight.grad, torch.ones_like(W))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "hf_moe"])
def test_every_implementation_gives_the_sum_of_the_definition(implementation):
    tokens, index, weights = make_inputs()
    bank = make_bank(implementation)
    torch.testing.assert_close(bank(tokens, index, weights), reference(bank, tokens, index, weights))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "hf_moe"])
def test_gradients_are_those_of_the_rounded_bank(implementation):
    tokens, index, weights = make_inputs()
    bank, plain = make_bank(implementation, expert_config={"activation_bits": None}), make_bank(expert_type="swiglu")
    with torch.no_grad():
        rounded = round_weights(bank.gate_up_proj.detach().unflatten(1, (2, -1))).flatten(1, 2)
        plain.gate_up_proj.copy_(rounded)
        plain.down_proj.copy_(round_weights(bank.down_proj.detach()))
    for module in (bank, plain):
        module(tokens, index, weights).square().sum().backward()
    for name, parameter in bank.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)
        assert parameter.grad.abs().sum() > 0


def test_bfloat16_and_autocast_stay_close():
    tokens, index, weights = make_inputs()
    bank = make_bank()
    expected = bank(tokens, index, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(bank(tokens, index, weights).float(), expected, rtol=5e-2, atol=5e-2)
    half = bank.to(torch.bfloat16)(tokens.bfloat16(), index, weights.bfloat16())
    torch.testing.assert_close(half.float(), expected, rtol=8e-2, atol=8e-2)


def test_compiled_banks_give_the_same():
    tokens, index, weights = make_inputs()
    bank = make_bank("grouped_mm")
    expected = bank(tokens, index, weights)
    compiled = torch.compile(bank, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, index, weights), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "column"}, r"`expert_config\['scale'\]` must be one of \('matrix', 'row'\), got 'column'"),
        ({"activation_bits": 16}, r"`expert_config\['activation_bits'\]` must be None or from 2 to 8, got 16"),
        ({"bits": 2}, r"`expert_config` has \['bits'\], which `expert_type='ternary'` does not know"),
    ],
)
def test_wrong_options_are_refused_by_the_config(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(expert_config=options)


def test_banks_without_options_refuse_them_too():
    with pytest.raises(ValueError, match="`expert_type='swiglu'` takes no options"):
        make_config(expert_type="swiglu", expert_config={"scale": "row"})
