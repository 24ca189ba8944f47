"""Pairs of experts, and pairs of token and expert, against counts by hand."""

import numpy as np
import pytest
import torch

from hf_moe.reporting.cooccurrence import CoActivation, TokenExpertCounts
from hf_moe.reporting.plots import relative_coactivation


def test_coactivation_counts_tokens_two_experts_share():
    together = CoActivation(4)
    together.update(torch.tensor([[0, 1], [0, 1], [2, 0], [3, 4]]))  # 4 is the empty slot
    together.update(torch.tensor([[1, 0]]))
    expected = [[4, 3, 1, 0], [3, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert together.counts.tolist() == expected


def test_partners_drawn_by_popularity_alone_are_at_chance(generator):
    # The reference is exact for E_ij = a_i a_j off the diagonal, however uneven a is.
    popularity = torch.tensor([9.0, 5.0, 30.0, 14.0, 7.0], dtype=torch.float64)
    counts = torch.outer(popularity, popularity).numpy()
    ratio = relative_coactivation(counts)
    assert np.isnan(ratio.diagonal()).all()
    assert ratio[~np.isnan(ratio)] == pytest.approx(1.0, abs=1e-9)


def test_inseparable_experts_are_above_chance():
    counts = np.array([[100, 90, 5, 5], [90, 100, 5, 5], [5, 5, 100, 90], [5, 5, 90, 100]])
    ratio = relative_coactivation(counts)
    assert ratio[0, 1] == pytest.approx(2.7, abs=0.01) and ratio[0, 2] == pytest.approx(0.15, abs=0.01)


def test_rare_pairs_are_left_empty():
    assert np.isnan(relative_coactivation(np.ones((6, 6)))).all()
    assert np.isnan(relative_coactivation(np.zeros((3, 3)))).all()


def test_typical_tokens_are_frequent_and_specific():
    # token 5: always expert 0 (20x); token 6: expert 0 in half of 20; token 7: always expert 1 (4x); token 8 once
    token_ids = torch.tensor([5] * 20 + [6] * 20 + [7] * 4 + [8])
    experts = torch.tensor([0] * 20 + [0] * 10 + [1] * 10 + [1] * 4 + [1]).unsqueeze(-1)
    counts = TokenExpertCounts(3)
    for part in torch.randperm(45, generator=torch.Generator().manual_seed(0)).split(10):
        counts.update(token_ids[part], experts[part])
    typical = counts.typical(torch.bincount(token_ids, minlength=10), limit=5)
    assert [tuple(token) for token in typical[0]] == [(5, 20, 1.0)]  # 6 goes to expert 0 less than the average token
    assert [tuple(token) for token in typical[1]] == [(7, 4, 1.0), (6, 10, 0.5)]  # 8 was seen once only
    assert typical[2] == []


def test_empty_slots_are_no_tokens():
    counts = TokenExpertCounts(2)
    counts.update(torch.tensor([1, 1, 1, 1]), torch.tensor([[0, 2], [0, 2], [0, 2], [2, 2]]))
    counts.update(torch.tensor([3, 3, 3, 3]), torch.tensor([[1, 2]] * 4))
    typical = counts.typical(torch.tensor([0, 4, 0, 4]), limit=3)
    assert [tuple(t) for t in typical[0]] == [(1, 3, 0.75)] and [tuple(t) for t in typical[1]] == [(3, 4, 1.0)]
