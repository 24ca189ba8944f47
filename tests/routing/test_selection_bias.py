from types import SimpleNamespace

import pytest
import torch

from hf_moe.routing.selection_bias import update_selection_bias


def router(num_experts, balance_weights=None, bias=True):
    return SimpleNamespace(
        e_score_correction_bias=torch.zeros(num_experts) if bias else None, balance_weights=balance_weights
    )


def test_bias_moves_against_the_load():
    gate = router(4)
    update_selection_bias([gate], torch.tensor([[7, 1, 4, 4]]), speed=0.001)
    torch.testing.assert_close(gate.e_score_correction_bias, torch.tensor([-0.001, 0.001, 0.0, 0.0]))


def test_balanced_or_empty_counts_change_nothing():
    gates = [router(3), router(3)]
    update_selection_bias(gates, torch.tensor([[3, 3, 3], [0, 0, 0]]), speed=0.1)
    assert all(gate.e_score_correction_bias.abs().max() == 0 for gate in gates)


def test_narrow_layers_ignore_the_padding_of_their_row():
    gate = router(2)
    update_selection_bias([gate], torch.tensor([[3, 1, 0]]), speed=1.0)
    assert gate.e_score_correction_bias.tolist() == [-1.0, 1.0]


def test_heterogeneous_target_is_where_weighted_frequencies_are_equal():
    gate = router(3, balance_weights=torch.tensor([1.0, 1.0, 0.5]))
    update_selection_bias([gate], torch.tensor([[5, 3, 8]]), speed=1.0)  # target 4, 4, 8
    assert gate.e_score_correction_bias.tolist() == [-1.0, 1.0, 0.0]


def test_routers_without_bias_are_skipped():
    gates = [router(2, bias=False), router(2)]
    update_selection_bias(gates, torch.tensor([[3, 1], [1, 3]]), speed=1.0)
    assert gates[0].e_score_correction_bias is None
    assert gates[1].e_score_correction_bias.tolist() == [1.0, -1.0]


def test_another_number_of_routers_is_refused():
    with pytest.raises(ValueError, match="`routers` has 1 entries and `counts` 2 rows"):
        update_selection_bias([router(2)], torch.ones(2, 2), speed=1.0)


def test_repeated_updates_balance_a_skewed_router(generator):
    scores = torch.rand(512, 8, generator=generator) + torch.linspace(0, 0.5, 8)
    gate = router(8)

    def counts():
        index = (scores + gate.e_score_correction_bias).topk(2).indices
        return torch.bincount(index.flatten(), minlength=8)

    before = counts().max()
    for _ in range(200):
        update_selection_bias([gate], counts().unsqueeze(0), speed=0.01)
    assert before > 1.8 * 128
    assert counts().max() < 1.15 * 128
