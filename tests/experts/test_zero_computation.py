from types import SimpleNamespace

import pytest
import torch

from hf_moe.experts import ZeroComputationExperts


def make_experts(constant=2, copy=1, zero=1, hidden=6):
    config = SimpleNamespace(
        hidden_size=hidden,
        num_constant_experts=constant,
        num_copy_experts=copy,
        num_zero_experts=zero,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ZeroComputationExperts(config)


def one_by_one(experts, hidden_states, weights):
    """The definition, a token and an expert at a time."""
    rows = []
    for x, w in zip(hidden_states, weights, strict=True):
        y = torch.zeros_like(x)
        for c in range(experts.num_constant):
            a = torch.softmax(experts.constant_gate[c] @ x, dim=0)
            y = y + w[c] * (a[0] * x + a[1] * experts.constants[c])
        for c in range(experts.num_copy):
            y = y + w[experts.num_constant + c] * x
        rows.append(y)
    return torch.stack(rows)


def test_constant_expert_mixes_input_and_constant():
    # Oracle: x = (1, 2), v = (3, -1), W_c = I gives a = (.2689, .7311) and E = (2.4621, -0.1932).
    experts = make_experts(constant=1, copy=0, zero=0, hidden=2)
    with torch.no_grad():
        experts.constants.copy_(torch.tensor([[3.0, -1.0]]))
        experts.constant_gate.copy_(torch.eye(2)[None])
    output = experts(torch.tensor([[1.0, 2.0]]), torch.ones(1, 1))
    torch.testing.assert_close(output, torch.tensor([[2.4621, -0.1932]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("constant", "copy", "zero"), [(2, 1, 1), (0, 1, 1), (1, 0, 0), (3, 2, 0), (0, 0, 1)])
def test_dense_sum_equals_the_experts_one_by_one(constant, copy, zero, generator):
    experts = make_experts(constant, copy, zero)
    hidden_states = torch.randn(7, 6, generator=generator)
    weights = torch.rand(7, experts.num_experts, generator=generator)
    torch.testing.assert_close(experts(hidden_states, weights), one_by_one(experts, hidden_states, weights))


def test_zero_expert_gives_exactly_zero(generator):
    experts = make_experts()
    weights = torch.zeros(5, 4)
    weights[:, -1] = 0.7  # the order is constant, copy, zero
    assert experts(torch.randn(5, 6, generator=generator), weights).eq(0).all()


def test_copy_expert_gives_its_weight_times_the_input(generator):
    experts = make_experts()
    hidden_states = torch.randn(5, 6, generator=generator)
    weights = torch.zeros(5, 4)
    weights[:, 2] = torch.rand(5, generator=generator)
    assert torch.equal(experts(hidden_states, weights), weights[:, 2:3] * hidden_states)


def test_unused_constants_get_no_gradient(generator):
    experts = make_experts()
    weights = torch.zeros(5, 4)
    weights[:, 0] = 0.5
    experts(torch.randn(5, 6, generator=generator), weights).square().sum().backward()
    assert experts.constants.grad[0].ne(0).any()
    assert experts.constants.grad[1].eq(0).all()
    assert experts.constant_gate.grad[1].eq(0).all()


def test_gradients_equal_those_of_the_experts_one_by_one(generator):
    experts = make_experts().double()
    hidden_states = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    inputs = (hidden_states, weights, *experts.parameters())
    ours = torch.autograd.grad(experts(hidden_states, weights).sin().sum(), inputs)
    theirs = torch.autograd.grad(one_by_one(experts, hidden_states, weights).sin().sum(), inputs)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        # the softmax over (a_1, a_2) is always taken in float32
        torch.testing.assert_close(ours_, theirs_, atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_bfloat16(generator):
    experts = make_experts().bfloat16()
    hidden_states = torch.randn(4, 6, generator=generator).bfloat16()
    weights = torch.rand(4, 4, generator=generator).bfloat16()
    output = experts(hidden_states, weights)
    assert output.dtype == torch.bfloat16
    expected = one_by_one(experts.float(), hidden_states.float(), weights.float())
    torch.testing.assert_close(output.float(), expected, atol=5e-2, rtol=2e-2)


def test_constants_start_as_released():
    # v_c ~ N(0, 1), whatever `initializer_range` says.
    experts = make_experts(constant=4, hidden=512)
    assert abs(experts.constants.std().item() - 1.0) < 0.05
    assert abs(experts.constant_gate.std().item() - 0.5) < 0.05
