"""Maps of units, heads and layers."""

import pytest
import torch

from hf_moe.upcycling.growth import UnitMap, depth_map, grow_heads
from hf_moe.upcycling.growth.depth import inserted_layers
from hf_moe.upcycling.growth.unit_maps import grow_units


def test_units_repeat_from_left_to_right():
    assert grow_units(3, 8).index.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert grow_units(3, 8).counts.tolist() == [3, 3, 2]


def test_a_random_order_uses_every_unit_once_before_it_uses_one_again():
    unit_map = grow_units(5, 15, "random", torch.Generator().manual_seed(0))
    assert unit_map.index[:5].tolist() == list(range(5))
    assert unit_map.is_uniform and unit_map.index.tolist() != grow_units(5, 15).index.tolist()


@pytest.mark.parametrize("uneven", [False, True])
def test_shares_of_the_copies_of_a_unit_sum_to_one(uneven):
    unit_map = grow_units(3, 7)
    shares = unit_map.uneven_shares(4, torch.Generator().manual_seed(0)) if uneven else unit_map.shares().expand(4, 7)
    totals = torch.zeros(4, 3).index_add_(1, unit_map.index, shares)
    torch.testing.assert_close(totals, torch.ones(4, 3))
    assert (shares > 0).all()
    assert uneven == (shares[0] != shares[1]).any()


def test_added_units_are_all_but_the_first_copies():
    assert UnitMap(torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]), 4).added.tolist() == [False, False, True, True] * 2


def test_blocks_and_joined_maps_are_maps_of_coordinates():
    heads = UnitMap(torch.tensor([1, 0, 1]), 2).blocks(2)
    assert heads.index.tolist() == [2, 3, 0, 1, 2, 3] and heads.old == 4
    assert UnitMap.joined(heads, UnitMap(torch.tensor([0, 0]), 1)).index.tolist() == [2, 3, 0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads"),
    [
        ((4, 2, 8, 2), [0, 1, 0, 1, 2, 3, 2, 3], [0, 1]),
        ((4, 4, 8, 4), [0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3]),
        ((4, 1, 6, 1), [0, 1, 2, 3, 0, 1], [0]),
        ((4, 2, 8, 4), [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1]),
        ((4, 2, 4, 4), [0, 2, 1, 3], [0, 1, 0, 1]),
    ],
)
def test_heads_are_copied_inside_their_group(sizes, heads, kv_heads):
    head_map, kv_map = grow_heads(*sizes)
    assert head_map.index.tolist() == heads and kv_map.index.tolist() == kv_heads
    group, new_group = sizes[0] // sizes[1], sizes[2] // sizes[3]
    for new, old in enumerate(heads):
        assert old // group == kv_heads[new // new_group]


def test_the_papers_deepening_takes_each_fourth_layer_twice():
    layers = depth_map(32, 40, "interpolate")
    assert layers[:9] == [0, 0, 1, 2, 3, 4, 4, 5, 6] and len(layers) == 40 and layers[-5:] == [28, 28, 29, 30, 31]
    assert sorted(inserted_layers(layers)) == [1, 6, 11, 16, 21, 26, 31, 36]
    assert depth_map(3, 6, "interpolate") == [0, 0, 1, 1, 2, 2]
    assert depth_map(3, 6, "stack") == [0, 1, 2, 0, 1, 2]
