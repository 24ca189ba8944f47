import json
import math

import pytest
import torch
from common.toy_moe import random_routing

from hf_moe.routing import LayerRouting, RouterStats


def test_statistics_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.5, 1e-30], [1.0, 1e-30, 1e-30]])).requires_grad_()
    index = torch.tensor([[0, 1], [0, 3]])  # 3 is the empty slot
    stats = RouterStats()
    stats.update([LayerRouting(logits, index)])
    summary = stats.compute()
    assert summary.counts.tolist() == [[2, 1, 0]]
    torch.testing.assert_close(summary.load, torch.tensor([[2 / 3, 1 / 3, 0.0]]))
    torch.testing.assert_close(summary.mean_probability, torch.tensor([[0.75, 0.25, 0.0]]))
    assert summary.entropy.item() == pytest.approx(math.log(2) / 2)
    assert summary.load_entropy.item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert summary.max_violation.item() == pytest.approx(1.0)
    assert summary.dead_share.item() == pytest.approx(1 / 3)
    assert summary.active_experts.item() == 1.5
    assert summary.num_tokens == 2
    assert not any(v.requires_grad for v in summary if isinstance(v, torch.Tensor))


def test_batches_add_up(generator):
    whole = random_routing(generator, num_tokens=30)
    parts = [LayerRouting(whole.logits[i : i + 10], whole.index[i : i + 10]) for i in (0, 10, 20)]
    one, many = RouterStats(), RouterStats()
    one.update([whole])
    for part in parts:
        many.update([part])
    for a, b in zip(one.compute(), many.compute(), strict=True):
        torch.testing.assert_close(a, b)


def test_padding_is_not_counted(generator):
    routing = random_routing(generator, num_tokens=12)
    mask = torch.arange(12).view(3, 4) < 7
    masked, short = RouterStats(), RouterStats()
    masked.update([routing], mask)
    short.update([LayerRouting(routing.logits[:7], routing.index[:7])])
    for a, b in zip(masked.compute(), short.compute(), strict=True):
        torch.testing.assert_close(a, b)


def test_even_routing_has_no_violation_and_full_load_entropy():
    stats = RouterStats()
    stats.update([LayerRouting(torch.zeros(8, 4), torch.arange(8).view(8, 1) % 4)])
    summary = stats.compute()
    assert summary.max_violation.item() == 0.0 and summary.dead_share.item() == 0.0
    assert summary.load_entropy.item() == pytest.approx(math.log(4))
    assert summary.entropy.item() == pytest.approx(math.log(4))


def test_experts_a_narrow_layer_does_not_have_are_not_dead(generator):
    stats = RouterStats()
    narrow = LayerRouting(torch.zeros(4, 2), torch.tensor([[0], [1], [0], [1]]))
    stats.update([narrow, random_routing(generator, num_tokens=4, num_experts=6)])
    summary = stats.compute()
    assert summary.counts.shape == (2, 6)
    assert summary.dead_share[0] == 0.0 and summary.max_violation[0] == 0.0


def test_probabilities_of_the_router_are_used(generator):
    logits = torch.randn(5, 3, generator=generator)
    stats = RouterStats()
    stats.update([LayerRouting(logits, logits.topk(1).indices, lambda x: torch.full_like(x, 1 / 3))])
    assert stats.compute().entropy.item() == pytest.approx(math.log(3))


def test_scalars_are_few_and_json_able(generator):
    stats = RouterStats()
    stats.update([random_routing(generator) for _ in range(30)])
    summary = stats.reduce().compute()
    assert len(summary.scalars()) == 6
    assert json.loads(json.dumps(summary.to_dict()))["num_tokens"] == 16


def test_reduce_on_one_process_is_a_copy(generator):
    stats = RouterStats()
    stats.update([random_routing(generator)])
    reduced = stats.reduce()
    stats.update([random_routing(generator)])
    assert reduced.compute().num_tokens == 16 and stats.compute().num_tokens == 32
    stats.reset()
    with pytest.raises(ValueError, match="`RouterStats` has seen no batch yet"):
        stats.compute()


def test_layers_of_another_model_are_refused(generator):
    stats = RouterStats()
    stats.update([random_routing(generator)])
    with pytest.raises(ValueError, match=r"`layers` has the numbers of experts \[4, 4\].*needs \[4\]"):
        stats.update([random_routing(generator), random_routing(generator)])


def test_what_two_have_seen_adds_up_to_what_one_sees(generator):
    batches = [[random_routing(generator), random_routing(generator)] for _ in range(3)]
    whole, first, second = RouterStats(), RouterStats(), RouterStats()
    for stats, seen in ((whole, batches), (first, batches[:1]), (second, batches[1:])):
        for batch in seen:
            stats.update(batch)
    total = RouterStats()
    total.add(first)
    total.add(second)
    expected, found = whole.compute(), total.compute()
    assert found.num_tokens == expected.num_tokens and torch.equal(found.counts, expected.counts)
    torch.testing.assert_close(found.entropy, expected.entropy)
    assert first.compute().num_tokens == 16  # not changed
    with pytest.raises(ValueError, match=r"`other` has the numbers of experts \[4\].*needs \[4, 4\]"):
        single = RouterStats()
        single.update([random_routing(generator)])
        total.add(single)
