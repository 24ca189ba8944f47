import pytest
import torch
from common.toy_moe import random_routing
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe.routing.balance import (
    expert_counts,
    expert_frequency,
    load_balance_loss,
    mean_probability,
    normalize_counts,
    router_z_loss,
)


def test_counts_leave_out_empty_slots_and_padding():
    index = torch.tensor([[0, 2], [2, 3], [3, 3], [1, 0]])  # 3 is the empty slot
    assert expert_counts(index, 3).tolist() == [2, 1, 2]
    assert expert_counts(index, 3, torch.tensor([True, True, True, False])).tolist() == [1, 0, 2]
    assert expert_counts(index.int(), 3, torch.tensor([[1, 1], [1, 0]])).tolist() == [1, 0, 2]


def test_frequency_sums_to_one_for_every_number_of_active_slots():
    index = torch.tensor([[0, 1], [0, 2], [2, 2]])  # 2 empties, 1 token all empty
    frequency = expert_frequency(index, 2)
    torch.testing.assert_close(frequency, torch.tensor([2 / 3, 1 / 3]))
    assert expert_frequency(torch.full((3, 2), 2), 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balanced_routing_costs_one(top_k):
    num_experts = 8
    index = (torch.arange(64).unsqueeze(-1) * top_k + torch.arange(top_k)) % num_experts
    probabilities = torch.full((64, num_experts), 1 / num_experts)
    loss = load_balance_loss(probabilities, expert_frequency(index, num_experts))
    torch.testing.assert_close(loss, torch.tensor(1.0))


def test_collapsed_routing_costs_the_number_of_experts():
    index = torch.full((5, 1), 2)
    probabilities = torch.nn.functional.one_hot(index[:, 0], 6).float()
    assert load_balance_loss(probabilities, expert_frequency(index, 6)).item() == 6.0


def test_parts_with_the_frequency_of_the_whole_sum_to_the_loss_of_the_whole(generator):
    weight = torch.randn(8, 16, generator=generator, requires_grad=True)
    inputs = [torch.randn(tokens, 16, generator=generator) for tokens in (64, 10, 33, 7)]

    def probabilities(x):
        return torch.softmax(x @ weight.T, dim=-1)

    whole = torch.cat(inputs)
    index = probabilities(whole).topk(2).indices
    frequency = expert_frequency(index, 8)
    loss = load_balance_loss(probabilities(whole), frequency)
    (gradient,) = torch.autograd.grad(loss, weight)
    parts = [load_balance_loss(probabilities(x), frequency) * len(x) / len(whole) for x in inputs]
    (sum_of_gradients,) = torch.autograd.grad(sum(parts), weight)
    torch.testing.assert_close(sum(parts), loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(sum_of_gradients, gradient, atol=3e-8, rtol=0)


def test_parts_sum_to_the_whole_in_double_precision(generator):
    logits = torch.randn(40, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    frequency = expert_frequency(logits.topk(2).indices, 8).double()
    p = torch.softmax(logits, dim=-1)
    whole = load_balance_loss(p, frequency)
    parts = sum(load_balance_loss(part, frequency) / 4 for part in p.chunk(4))
    assert abs(parts.item() - whole.item()) < 1e-8
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (whole, parts)]
    assert (gradients[0] - gradients[1]).abs().max() < 3e-8


def test_frequency_gets_no_gradient(generator):
    frequency = torch.rand(4, generator=generator, requires_grad=True)
    probabilities = torch.rand(3, 4, generator=generator, requires_grad=True)
    load_balance_loss(probabilities, frequency).backward()
    assert frequency.grad is None
    torch.testing.assert_close(probabilities.grad, (4 * frequency.detach() / 3).expand(3, 4))


def test_padding_changes_neither_value_nor_gradient(generator):
    routing = random_routing(generator)
    mask = torch.ones(16, dtype=torch.bool)
    mask[10:] = False
    short = routing.logits.detach()[:10].requires_grad_()
    masked = load_balance_loss(routing.distribution(), expert_frequency(routing.index, 4, mask), mask)
    plain = load_balance_loss(torch.softmax(short, -1), expert_frequency(routing.index[:10], 4))
    torch.testing.assert_close(masked, plain)
    masked.backward()
    plain.backward()
    torch.testing.assert_close(routing.logits.grad[:10], short.grad)
    assert routing.logits.grad[10:].abs().max() == 0


def test_nan_in_padding_rows_stays_there():
    probabilities = torch.tensor([[0.5, 0.5], [torch.nan, torch.nan]])
    assert mean_probability(probabilities, torch.tensor([True, False])).tolist() == [0.5, 0.5]


def test_all_padding_costs_nothing(generator):
    routing = random_routing(generator)
    mask = torch.zeros(16, dtype=torch.bool)
    assert load_balance_loss(routing.distribution(), expert_frequency(routing.index, 4, mask), mask).item() == 0.0
    assert router_z_loss(routing.logits, mask).item() == 0.0


def test_heterogeneous_loss_is_that_of_moe_plus_plus_times_experts_over_k():
    # 2 feed-forward + 2 zero-computation experts, tau 0.75; the paper's f (sum K = 2) is 0.5 for all, P is 0.25.
    index = torch.tensor([[0, 1], [2, 3]])
    weights = torch.tensor([1.0, 1.0, 0.75, 0.75])
    loss = load_balance_loss(torch.full((2, 4), 0.25), expert_frequency(index, 4), weights=weights)
    assert loss.item() * 2 / 4 == pytest.approx(0.4375, abs=1e-7)


def test_one_layer_equals_the_mixtral_helper_divided_by_k(generator):
    routing = random_routing(generator, num_tokens=50, num_experts=8, skew=0.3)
    ours = load_balance_loss(routing.distribution(), expert_frequency(routing.index, 8))
    theirs = load_balancing_loss_func((routing.logits,), 8, top_k=2)
    torch.testing.assert_close(2 * ours, theirs)


def test_opposite_collapsed_layers_do_not_cancel():
    layers = [torch.tensor([[40.0, 0.0]]).expand(6, 2), torch.tensor([[0.0, 40.0]]).expand(6, 2)]
    values = [load_balance_loss(x.softmax(-1), expert_frequency(x.topk(1).indices, 2)).item() for x in layers]
    assert values == [2.0, 2.0]
    assert load_balancing_loss_func(tuple(layers), 2, top_k=1).item() == 1.0  # pooled: "balanced"


def test_z_loss_by_hand():
    logits = torch.log(torch.tensor([[1.0, 2.0], [3.0, 1.0], [9.0, 9.0]]))
    expected = (torch.log(torch.tensor(3.0)) ** 2 + torch.log(torch.tensor(4.0)) ** 2) / 2
    torch.testing.assert_close(router_z_loss(logits, torch.tensor([True, True, False])), expected)


def test_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"`token_mask` has 3 entries .* but 4 tokens were routed"):
        expert_counts(torch.zeros(4, 1, dtype=torch.int64), 2, torch.ones(3))


def test_normalizing_keeps_the_ratio():
    torch.testing.assert_close(normalize_counts(torch.tensor([[3, 1], [0, 0]])), torch.tensor([[0.75, 0.25], [0, 0]]))
