"""The cells: linear in what is split, equal to the plain adapter with one expert, collapsible into it."""

import pytest
import torch

from hf_moe.adapters.core import Bottleneck
from hf_moe.adapters.mosa.cells import LowRank, SplitBottleneck, SplitLowRank


SIZES = {"in_features": 8, "out_features": 8, "rank": 4, "layernorm": True, "scale": 0.5}


def bottleneck(share="down", **kwargs):
    torch.manual_seed(0)
    return SplitBottleneck(num_experts=4, share=share, seed=0, **{**SIZES, "init_weights": False, **kwargs})


def low_rank(share="down", shape=(6, 8), **kwargs):
    torch.manual_seed(0)
    settings = {"rank": 4, "init_weights": False, **kwargs}
    return SplitLowRank(num_experts=4, share=share, seed=0, shape=shape, **settings)


def over_experts(cell, monkeypatch, x):
    """Outputs in training mode with each expert drawn in all split layers."""
    cell.train()
    for index in range(4):
        for layer in (cell.down, cell.up):
            if hasattr(layer, "draw"):
                monkeypatch.setattr(layer, "draw", lambda index=index: torch.tensor([index]))
        yield cell(x)


@pytest.mark.parametrize("make", [bottleneck, low_rank])
def test_mean_over_experts_is_the_evaluation_where_the_split_is_linear(make, monkeypatch):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    outputs = list(over_experts(make(), monkeypatch, x))
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(torch.stack(outputs).mean(0), make().eval()(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", ["up", "none"])
def test_mean_over_experts_differs_behind_an_activation(share, monkeypatch):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    outputs = list(over_experts(bottleneck(share), monkeypatch, x))
    assert (torch.stack(outputs).mean(0) - bottleneck(share).eval()(x)).abs().max() > 1e-4


@pytest.mark.parametrize("share, split", [("down", {"up"}), ("up", {"down"}), ("none", {"up", "down"})])
@pytest.mark.parametrize("make", [bottleneck, low_rank])
def test_only_what_is_not_shared_is_split(make, share, split):
    assert {key.split(".")[0] for key in make(share).state_dict() if key.endswith("assign")} == split
    cell = make(share).train()
    cell(torch.rand(2, 8)).sum().backward()
    shared = {"up", "down"} - split
    for name in shared:
        assert getattr(cell, name).weight.grad.any()


@pytest.mark.parametrize("share", ["down", "up", "none"])
@pytest.mark.parametrize("kind", ["bottleneck", "low_rank", "stacked"])
def test_collapsing_keeps_evaluation_and_gives_the_plain_adapter(kind, share):
    cell = {
        "bottleneck": lambda: bottleneck(share, merge_scale=1.5),
        "low_rank": lambda: low_rank(share),
        "stacked": lambda: low_rank(share, (3, 6, 8)),
    }[kind]().eval()
    state = torch.get_rng_state()
    plain = cell.collapse()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(plain) is (Bottleneck if kind == "bottleneck" else LowRank) and not plain.training
    assert all(parameter.requires_grad for parameter in plain.parameters())
    x = torch.randn(3, 8)
    if kind == "stacked":
        torch.testing.assert_close(plain.delta(), cell.delta())
    else:
        torch.testing.assert_close(plain(x), cell(x), rtol=0, atol=1e-6)
    settings = SIZES if kind == "bottleneck" else {"shape": (3, 6, 8) if kind == "stacked" else (6, 8), "rank": 4}
    fresh = type(plain)(**settings).state_dict()
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in fresh.items()}


def test_a_fresh_cell_starts_from_the_plain_ones_weights():
    torch.manual_seed(0)
    plain = Bottleneck(**SIZES)
    split = bottleneck("none", init_weights=True)
    assert torch.equal(split.down.weight, plain.down.weight) and torch.equal(split.down.initial, plain.down.weight)
    assert not split.up.weight.any()


def test_both_projections_are_dealt_out_differently():
    cell = bottleneck("none")
    assert not torch.equal(cell.up.assign, cell.down.assign.T)
