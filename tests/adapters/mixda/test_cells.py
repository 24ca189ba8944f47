"""The gate and its mixture, with the figures of the paper's formulas."""

import math

import pytest
import torch
from torch import nn

from hf_moe.adapters.core import Bottleneck
from hf_moe.adapters.mixda import DomainGate, mix, sampling_loss


F = torch.tensor([1.0, 2.0])
K = torch.tensor([3.0, -1.0])


def constant_gate(logits, activation="softmax"):
    """A gate whose logits do not depend on the input."""
    gate = DomainGate(4, [f"d{i}" for i in range(len(logits) - 1)], activation=activation)
    nn.init.zeros_(gate.out.weight)
    with torch.no_grad():
        gate.out.bias.copy_(torch.tensor(logits))
    return gate


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_are_those_of_the_released_code():
    assert size(Bottleneck(4096, 1024, 4096 // 16)) == 1_312_000
    for domains, parameters in ((1, 4_329_218), (3, 4_330_756)):
        assert size(DomainGate(4096, [f"d{i}" for i in range(domains)], (768, 768, 768))) == parameters
    assert size(DomainGate(4096, ["d"])) == 4096 * 2 + 2  # what the paper's appendix counts, and biases


@pytest.mark.parametrize("activation, expected", [("softmax", [1.5, 1.25]), ("sigmoid", [2.25, 1.0])])
def test_the_mixture_of_two_with_known_logits(activation, expected):
    weights = constant_gate([0.0, math.log(3.0)], activation)(torch.zeros(4))
    torch.testing.assert_close(weights, torch.tensor([0.25 if activation == "softmax" else 0.5, 0.75]))
    torch.testing.assert_close(mix(weights, [K], F), torch.tensor(expected))


@pytest.mark.parametrize("domains", [1, 3])
def test_zero_adapters_and_equal_logits_do_not_give_the_base(domains):
    weights = constant_gate([0.0] * (domains + 1))(torch.zeros(4))
    torch.testing.assert_close(mix(weights, [torch.zeros(2)] * domains, F), F / (domains + 1))
    assert torch.equal(mix(weights, [torch.zeros(2)] * domains, F, "residual"), F)


def test_a_saturated_gate_gives_the_base_but_no_gradient():
    gate = constant_gate([-10.0, 10.0])
    expert = Bottleneck(4, 2, 2)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    output = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    mixed = mix(gate(x), [expert(x)], output)
    assert torch.equal(mixed, output)
    mixed.square().sum().backward()
    assert expert.up.weight.grad.abs().max() < 1e-7


def test_the_default_gate_starts_near_the_base_and_trains():
    gate = DomainGate(4, ["d"])
    nn.init.zeros_(gate.out.weight)
    weights = gate(torch.zeros(4))
    assert weights[1].item() == pytest.approx(1 / (1 + math.exp(-4.0))) and weights[1].item() > 0.98
    assert weights[0].item() > 0.01


def test_adapters_that_equal_the_network_change_nothing_under_softmax():
    q = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    for activation in ("softmax", "sigmoid"):
        gate = DomainGate(4, ["a", "b"], (6,), activation=activation, init_weights=False)
        weights = gate(q)
        total = weights.sum(-1, keepdim=True)
        torch.testing.assert_close(mix(weights, [F, F], F), F * total)
    assert not torch.allclose(total, torch.ones_like(total))
    softmax = DomainGate(4, ["a", "b"], init_weights=False)(q)
    torch.testing.assert_close(mix(softmax, [F, F], F), F.expand(7, 2))


def test_a_gate_that_chooses_one_adapter_gives_its_output():
    weights = constant_gate([-200.0, 0.0, -200.0])(torch.zeros(4))
    assert torch.equal(mix(weights, [F * 5, K], F), K)


def test_adapters_and_rows_can_change_places_together():
    gate = DomainGate(4, ["a", "b"], (6,), init_weights=False)
    q = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    before = mix(gate(q), [F * 2, K], F)
    with torch.no_grad():
        for parameter in (gate.out.weight, gate.out.bias):
            parameter.copy_(parameter[[1, 0, 2]])
    torch.testing.assert_close(mix(gate(q), [K, F * 2], F), before)


def test_domains_that_are_off_are_left_out_of_the_softmax():
    gate = constant_gate([1.0, 2.0, 3.0])
    gate.enabled = ["d1"]
    torch.testing.assert_close(gate(torch.zeros(4)), torch.tensor([2.0, 3.0]).softmax(0))


def test_rows_come_and_go_with_their_domains():
    gate = DomainGate(4, ["a", "b"], (6,), init_weights=False)
    q = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    logits = gate.out(gate.hidden(q))
    gate.add("c")
    assert gate.domains == ["a", "b", "c"] and gate.out.bias[2] == 0
    torch.testing.assert_close(gate.out(gate.hidden(q))[:, [0, 1, 3]], logits)
    gate.remove("a")
    assert gate.domains == gate.enabled == ["b", "c"]
    torch.testing.assert_close(gate.out(gate.hidden(q))[:, [0, 2]], logits[:, 1:])


def test_dropout_comes_before_every_linear_map():
    gate = DomainGate(4, ["a"], (6, 6), dropout=0.2)
    kinds = [type(module) for module in gate.hidden]
    assert kinds == [nn.Dropout, nn.Linear, nn.ReLU] * 2
    assert {m.p for m in gate.modules() if isinstance(m, nn.Dropout)} == {0.2}


def test_the_sampling_loss_of_known_tensors():
    base, knowledge = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert sampling_loss([(base, knowledge)], reduction="sum").item() == 30.0
    assert sampling_loss([(base, knowledge)]).item() == 7.5
    assert sampling_loss([(base, knowledge), (base, base)]).item() == 3.75  # the mean over layers
    assert sampling_loss([(base, knowledge)], torch.tensor([1, 0])).item() == 2.5
    with pytest.raises(ValueError, match="`reduction` must be"):
        sampling_loss([(base, knowledge)], reduction="max")
    with pytest.raises(ValueError, match="`pairs` is empty"):
        sampling_loss([])
