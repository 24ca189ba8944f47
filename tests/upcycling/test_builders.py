"""Every expert builder: one shared battery, then the exact identities of each recipe on a toy feed-forward."""

import json

import pytest
import torch
from common.upcycling_toys import D, I, generator, moe, tokens, toy_ffn

from hf_moe.upcycling import (
    Copy,
    Drop,
    ImportanceShared,
    Masks,
    Noise,
    Normal,
    Repeated,
    Split,
    VirtualGroups,
    WeightRule,
    Zeros,
)
from hf_moe.upcycling.builders.base import ExpertBuilder
from hf_moe.upcycling.statistics import LayerStatistics


RN, NR, SG = WeightRule("renormalise"), WeightRule("softmax"), WeightRule("sigmoid", 2.5)
N = 4
# Name: a builder for 4 experts of a feed-forward with 24 channels, and the width of its experts.
BUILDERS = {
    "copy": (Copy(), 24),
    "noise": (Noise(), 24),
    "masks": (Masks(keep=0.5), 12),
    "given_masks": (Masks.from_activity(torch.rand(4, I, generator=generator(9)), keep=10), 10),
    "drop": (Drop(), 24),
    "split_random": (Split("random"), 6),
    "split_kmeans": (Split("kmeans"), 6),
    "split_coactivation": (Split("coactivation"), 6),
    "split_importance": (Split("importance"), 6),
    "virtual_groups": (VirtualGroups(2), 12),
    "importance_shared": (ImportanceShared(8), 12),
    "importance_shared_by_contribution": (ImportanceShared(0.5, "contribution"), 15),
}
SILENT = {"noise": Noise(sigma=0), "no_fraction": Noise(fraction=0), "drop": Drop(0.0), "masks": Masks(keep=1.0)}


def stats_of(ffn) -> LayerStatistics:
    x = tokens(5, count=64)
    activations = ffn.intermediate(x)
    importance = {
        "taylor": activations.abs().mean(0),
        "contribution": activations.abs().mean(0) * ffn.down.norm(dim=0),
    }
    return LayerStatistics(x, activations, importance, 64)


def build(name, ffn=None, seed=0):
    ffn = toy_ffn() if ffn is None else ffn
    return BUILDERS[name][0].build(ffn, N, stats_of(ffn), generator(seed), layer_idx=0)


# -- the shared battery ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, True)])
def test_experts_have_equal_shapes_and_the_width_that_was_announced(name, gated, biased):
    builder, width = BUILDERS[name]
    ffn = toy_ffn(gated=gated, biased=biased)
    builder.validate(N, 2)
    experts = build(name, ffn)
    assert len(experts) == N
    assert builder.expert_width(I, N) == width
    for expert in experts:
        assert expert.intermediate_size == width
        assert (expert.gated, expert.biased, expert.activation) == (gated, biased, ffn.activation)
        assert expert.tensors().keys() == ffn.tensors().keys()
        assert expert(tokens()).shape == (12, D)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_dense_feed_forward_is_left_alone(name):
    ffn = toy_ffn(biased=True)
    before = {k: t.clone() for k, t in ffn.tensors().items()}
    for expert in build(name, ffn):
        BUILDERS[name][0].fold_scale(expert, 3.0)
    assert all(torch.equal(t, before[k]) for k, t in ffn.tensors().items())


@pytest.mark.parametrize("name", BUILDERS)
def test_the_generator_decides_everything_random(name):
    first, again, other = build(name, seed=1), build(name, seed=1), build(name, seed=2)
    same = [torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in zip(first, again, strict=True)]
    assert all(same)
    random = name in ("noise", "masks", "drop", "split_random")
    assert any(not torch.equal(a.up, b.up) for a, b in zip(first, other, strict=True)) or not random


@pytest.mark.parametrize("name", BUILDERS)
def test_dtype_is_kept(name):
    ffn = toy_ffn(biased=True).map(lambda t: t.bfloat16())
    for expert in BUILDERS[name][0].build(ffn, N, stats_of(toy_ffn(biased=True)), generator()):
        assert all(t.dtype == torch.bfloat16 for t in expert.tensors().values())


@pytest.mark.parametrize("name", BUILDERS)
def test_a_recipe_describes_itself_in_json(name):
    description = json.loads(json.dumps(BUILDERS[name][0].describe()))
    assert description["name"] == type(BUILDERS[name][0]).__name__


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("rule", [RN, NR, SG], ids=lambda r: r.name)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("router", [Normal(0.3), Repeated(2, 0.3)], ids=["normal", "repeated"])
def test_the_prediction_is_what_happens(name, rule, k, router):
    """Predicted exact if and only if the layer is the dense feed-forward on random tokens."""
    ffn, x = toy_ffn(), tokens()
    y, prediction = moe(BUILDERS[name][0], ffn, rule, router, k, N, x, stats=stats_of(ffn))
    gap = float((y - ffn(x)).abs().max())
    assert prediction.reason and prediction.scale > 0
    assert prediction.exact == (gap <= 2e-6), (prediction, gap)


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.parametrize("rule", [RN, NR, SG], ids=lambda r: r.name)
def test_recipes_without_their_change_are_copies(name, rule):
    ffn, x = toy_ffn(biased=True), tokens()
    y, prediction = moe(SILENT[name], ffn, rule, Normal(0.3), 2, N, x)
    assert prediction.exact == (rule is not NR)
    assert (float((y - ffn(x)).abs().max()) <= 2e-6) == prediction.exact


def test_a_builder_without_build_says_so():
    with pytest.raises(TypeError, match=r"ExpertBuilder must define `build`"):
        ExpertBuilder().build(toy_ffn(), 2)


# -- copies --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, True)])
def test_renormalised_copies_are_the_dense_feed_forward(k, gated, biased):
    ffn, x = toy_ffn(gated=gated, biased=biased), tokens()
    y, prediction = moe(Copy(), ffn, RN, Normal(), k, 8, x)
    assert prediction.exact and prediction.scale == 1
    torch.testing.assert_close(y, ffn(x), rtol=0, atol=1e-6)


def test_copies_with_plain_softmax_weights_are_scaled_by_the_selected_probability():
    ffn, x = toy_ffn(), tokens()
    router = Normal(0.5)
    p = (x @ router.build(8, D, None, generator(2)).T).softmax(-1)
    y, prediction = moe(Copy(), ffn, NR, router, 2, 8, x, scale=1.0)
    assert not prediction.exact and prediction.scale == 4
    torch.testing.assert_close(y, p.topk(2).values.sum(-1, keepdim=True) * ffn(x), rtol=0, atol=1e-6)
    y, prediction = moe(Copy(), ffn, NR, router, 8, 8, x)
    assert prediction.exact and prediction.scale == 1
    torch.testing.assert_close(y, ffn(x), rtol=0, atol=1e-6)


def test_the_scaling_factor_of_sigmoid_weights_is_folded_away():
    ffn, x = toy_ffn(), tokens()
    y, prediction = moe(Copy(), ffn, SG, Normal(), 2, 8, x)
    assert prediction.exact and prediction.scale == pytest.approx(1 / 2.5)
    torch.testing.assert_close(y, ffn(x), rtol=0, atol=1e-6)
    doubled, _ = moe(Copy(), ffn, SG, Normal(), 2, 8, x, scale=1.0)
    torch.testing.assert_close(doubled, 2.5 * ffn(x), rtol=0, atol=3e-6)


def test_copies_share_one_tensor():
    ffn = toy_ffn()
    assert all(expert is ffn for expert in Copy().build(ffn, 8))


# -- noise ---------------------------------------------------------------------------------------------------------
def test_noise_hits_the_given_share_of_every_matrix_and_no_bias():
    ffn = toy_ffn(hidden=64, width=128, biased=True)
    experts = Noise(0.02, 0.5).build(ffn, 2, generator=generator())
    for name, tensor in ffn.tensors().items():
        changed = getattr(experts[0], name) != tensor
        if tensor.ndim == 1:
            assert not changed.any()
        else:
            difference = (getattr(experts[0], name) - tensor)[changed]
            assert float(changed.float().mean()) == pytest.approx(0.5, abs=0.03)
            assert float(difference.std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(experts[0].up, experts[1].up)


@pytest.mark.parametrize("bad", [dict(sigma=-1), dict(fraction=1.5)])
def test_noise_refuses_wrong_values(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must"):
        Noise(**bad)


# -- masks ---------------------------------------------------------------------------------------------------------
def test_masks_from_activity_keep_the_most_active_channels():
    activity = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 4, 3, 5, 1, 2], [5, 4, 0, 1, 3, 2]])
    masks = Masks.from_activity(activity, keep=3).masks
    assert masks.int().tolist() == [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0]]
    assert masks.all(dim=0).int().tolist() == [0, 1, 0, 0, 0, 0]


def test_a_masked_expert_is_the_dense_feed_forward_with_masked_activations():
    ffn, x = toy_ffn(), tokens()
    masks = torch.rand(3, I, generator=generator(4)).topk(10, dim=-1).indices
    masks = torch.zeros(3, I, dtype=torch.bool).scatter(-1, masks, True)
    for expert, mask in zip(Masks(masks).build(ffn, 3), masks, strict=True):
        expected = (ffn.intermediate(x) * mask) @ ffn.down.T
        torch.testing.assert_close(expert(x), expected, rtol=0, atol=1e-6)


def test_masks_may_differ_per_layer():
    ffn = toy_ffn()
    masks = {layer: torch.rand(2, I, generator=generator(layer)) for layer in (1, 3)}
    builder = Masks.from_activity(masks, keep=4)
    assert not torch.equal(builder.build(ffn, 2, layer_idx=1)[0].up, builder.build(ffn, 2, layer_idx=3)[0].up)
    with pytest.raises(ValueError, match=r"`masks` has no entry for layer 0; it has \[1, 3\]"):
        builder.build(ffn, 2, layer_idx=0)


def test_keeping_all_channels_is_exact():
    ffn, x = toy_ffn(), tokens()
    y, prediction = moe(Masks(torch.ones(4, I, dtype=torch.bool)), ffn, RN, Normal(), 2, 4, x)
    assert prediction.exact
    torch.testing.assert_close(y, ffn(x), rtol=0, atol=1e-6)


def test_masks_refuse_what_cannot_stack():
    uneven = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(ValueError, match=r"same number of channels, at least 1; got \[1, 2\]"):
        Masks(uneven)
    with pytest.raises(ValueError, match=r"boolean tensors"):
        Masks(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`masks` are for 2 experts, but `num_experts` is 4"):
        Masks(torch.ones(2, I, dtype=torch.bool)).validate(4, 1)
    with pytest.raises(ValueError, match=r"`masks` are for 3 channels, the feed-forward has 24"):
        Masks(torch.ones(2, 3, dtype=torch.bool)).expert_width(24, 2)
    with pytest.raises(ValueError, match=r"`keep` must be between 1 and the 3 channels, got 4"):
        Masks.from_activity(torch.ones(2, 3), keep=4)
    with pytest.raises(ValueError, match=r"`keep` must be above 0 and at most 1"):
        Masks(keep=0)


# -- drop-upcycling ------------------------------------------------------------------------------------------------
def test_permutation_alone_is_exact():
    ffn, x = toy_ffn(biased=True), tokens()
    expert = Drop(0.0).build(ffn, 1, generator=generator())[0]
    assert not torch.equal(expert.up, ffn.up)
    torch.testing.assert_close(expert(x), ffn(x), rtol=0, atol=2e-6)


def test_drop_uses_one_channel_set_for_all_matrices():
    ffn = toy_ffn(biased=True)
    for expert in Drop(0.5).build(ffn, 3, generator=generator()):
        kept = {name: set() for name in ("up", "gate", "down", "up_bias", "gate_bias")}
        for name, found in kept.items():
            dense, ours = getattr(ffn, name), getattr(expert, name)
            rows, mine = (dense.T, ours.T) if name == "down" else (dense, ours)
            for c in range(I):
                if any(torch.equal(rows[c], row) for row in mine):
                    found.add(c)
        assert len(kept["up"]) == I // 2
        assert all(found == kept["up"] for found in kept.values())
        assert torch.equal(expert.down_bias, ffn.down_bias)


def test_redrawn_channels_have_mean_and_spread_of_what_they_replace():
    ffn = toy_ffn(hidden=64, width=256)
    ffn = ffn.map(lambda t: t + 3.0)
    expert = Drop(1.0).build(ffn, 1, generator=generator())[0]
    for name, tensor in ffn.tensors().items():
        ours = getattr(expert, name)
        assert float(torch.isin(ours, tensor).float().mean()) < 0.2  # chance hits of float32
        assert float(ours.mean()) == pytest.approx(float(tensor.mean()), abs=0.02)
        assert float(ours.std()) == pytest.approx(float(tensor.std()), rel=0.05)


def test_drop_refuses_impossible_shares():
    with pytest.raises(ValueError, match=r"`rho` must be between 0 and 1, got 1.2"):
        Drop(1.2)


# -- split ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["random", "kmeans", "coactivation", "importance"])
@pytest.mark.parametrize("biased", [False, True])
def test_split_is_a_partition_and_its_parts_sum_to_the_whole(method, biased):
    ffn, x = toy_ffn(biased=biased), tokens()
    parts = Split(method).partition(ffn, N, stats_of(ffn), generator())
    assert sorted(torch.cat(parts).tolist()) == list(range(I))
    experts = Split(method).build(ffn, N, stats_of(ffn), generator())
    torch.testing.assert_close(sum(e(x) for e in experts), ffn(x), rtol=0, atol=2e-6)


def test_split_is_exact_with_all_experts_and_equal_weights():
    ffn, x = toy_ffn(biased=True), tokens()
    y, prediction = moe(Split(), ffn, RN, Zeros(), 4, 4, x)
    assert prediction.exact and prediction.scale == 4
    torch.testing.assert_close(y, ffn(x), rtol=0, atol=2e-6)
    assert not moe(Split(), ffn, RN, Normal(0.3), 4, 4, x)[1].exact


def test_split_of_known_contributions():
    """Contributions 1, 2, 3, 4 in shards {1, 2} and {3, 4}: both give 10, one of them 6 or 14."""
    from hf_moe.upcycling.feed_forward import DenseFeedForward

    ffn = DenseFeedForward(up=torch.ones(4, 1), down=torch.tensor([[1.0, 2, 3, 4]]), activation="relu")
    experts = [ffn.channels(range(0, 2)).scaled(2), ffn.channels(range(2, 4)).scaled(2)]
    x = torch.ones(1, 1)
    assert Split().exactness(RN, 1, 2).scale == Split().exactness(RN, 2, 2, Zeros()).scale == 2
    assert float(0.5 * experts[0](x) + 0.5 * experts[1](x)) == 10
    assert [float(e(x)) for e in experts] == [6, 14]


def test_the_scale_of_a_split_keeps_the_mean_output():
    """Averaged over all choices of K of N parts, with weights 1/K, the scaled output is the dense one."""
    from itertools import combinations

    ffn, x = toy_ffn(), tokens()
    scale = Split().exactness(RN, 2, 4, Normal()).scale
    parts = [e.scaled(scale) for e in Split().build(ffn, 4, None, generator())]
    outputs = [sum(parts[e](x) for e in chosen) / 2 for chosen in combinations(range(4), 2)]
    torch.testing.assert_close(torch.stack(outputs).mean(0), ffn(x), rtol=0, atol=2e-6)


def test_kmeans_split_finds_planted_groups():
    centers = 10 * torch.randn(3, D, generator=generator(1))
    order = torch.randperm(I, generator=generator(2))
    up = (centers.repeat_interleave(8, dim=0) + 0.1 * torch.randn(I, D, generator=generator(3)))[order]
    ffn = toy_ffn()
    from dataclasses import replace

    parts = Split("kmeans").partition(replace(ffn, up=up), 3, None, generator())
    groups = (order // 8).tolist()
    assert sorted({frozenset(groups[c] for c in part.tolist()) for part in parts}, key=min) == [{0}, {1}, {2}]


def test_coactivation_split_puts_channels_that_fire_together_in_one_expert():
    pattern = torch.zeros(30, 6)
    pattern[:15, [0, 2, 4]] = 1.0
    pattern[15:, [1, 3, 5]] = 1.0
    stats = LayerStatistics(activations=pattern)
    parts = Split("coactivation").partition(toy_ffn(width=6), 2, stats, generator())
    assert {frozenset(p.tolist()) for p in parts} == {frozenset({0, 2, 4}), frozenset({1, 3, 5})}


def test_importance_split_balances_importance():
    importance = torch.arange(8.0)
    stats = LayerStatistics(importance={"taylor": importance})
    parts = Split("importance").partition(toy_ffn(width=8), 2, stats)
    assert [float(importance[p].sum()) for p in parts] == [14.0, 14.0]


def test_split_refuses_widths_that_do_not_divide():
    with pytest.raises(ValueError, match=r"24 channels .* `num_experts` = 5 equal parts; use a divisor.*6, 8"):
        Split().expert_width(24, 5)
    with pytest.raises(ValueError, match=r"`method` must be one of .*kmeans.*, got 'kmean'"):
        Split("kmean")


# -- virtual groups ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("k", "exact"), [(2, True), (3, False), (4, True), (8, True)])
@pytest.mark.parametrize("biased", [False, True])
def test_virtual_groups_are_exact_for_multiples_of_the_group_count(k, exact, biased):
    ffn, x = toy_ffn(biased=biased), tokens()
    y, prediction = moe(VirtualGroups(2), ffn, RN, Repeated(2, 0.3), k, 8, x)
    assert prediction.exact == exact
    assert (float((y - ffn(x)).abs().max()) <= 2e-6) == exact
    if exact:
        assert prediction.scale == 2
    else:
        assert "`top_k` (3) is not a multiple of `groups` (2)" in prediction.reason


def test_expert_rep_g_holds_shard_g():
    ffn = toy_ffn()
    experts = VirtualGroups(3).build(ffn, 6)
    for e, expert in enumerate(experts):
        g = e % 3
        assert torch.equal(expert.up, ffn.up[8 * g : 8 * g + 8])


def test_virtual_groups_need_the_router_rows_of_a_replica_to_be_equal():
    for router, exact in ((Normal(0.3), False), (Repeated(2), True), (Repeated(4), False), (None, True)):
        assert VirtualGroups(2).exactness(RN, 2, 8, router).exact == exact
    assert VirtualGroups(2).exactness(RN, 4, 8, Repeated(4)).exact
    assert VirtualGroups(2).exactness(RN, 8, 8, Zeros()).exact


def test_the_scale_for_plain_softmax_is_right_for_a_uniform_router():
    """NR: factor r G^2 / k."""
    prediction = VirtualGroups(2).exactness(NR, 2, 8, Repeated(2))
    assert not prediction.exact and prediction.scale == 4 * 2**2 / 2
    ffn, x = toy_ffn(), tokens()
    y, _ = moe(VirtualGroups(2), ffn, NR, Repeated(2, 1e-6), 2, 8, x)
    torch.testing.assert_close(y, ffn(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scaling", "exact"), [("down", True), ("sqrt", True), ("cube_root", False)])
def test_where_the_factor_goes(scaling, exact):
    ffn, x = toy_ffn(biased=True), tokens()
    y, prediction = moe(VirtualGroups(2, scaling), ffn, RN, Repeated(2), 2, 8, x)
    assert prediction.exact == exact
    gap = float((y - ffn(x)).abs().max())
    assert gap <= 2e-6 if exact else gap > 0.05


def test_the_cube_root_is_exact_for_squared_relu():
    from dataclasses import replace

    ffn, x = replace(toy_ffn(gated=False, biased=True), activation="relu2"), tokens()
    y, _ = moe(VirtualGroups(2, "cube_root"), ffn, RN, Repeated(2), 2, 8, x)
    torch.testing.assert_close(y, ffn(x), rtol=0, atol=2e-6)


def test_virtual_groups_refuse_what_is_impossible():
    with pytest.raises(ValueError, match=r"`num_experts` must be a multiple of `groups` \(3\).*got 8"):
        VirtualGroups(3).validate(8, 3)
    with pytest.raises(ValueError, match=r"24 channels .* `groups` = 5"):
        VirtualGroups(5).expert_width(24, 10)
    with pytest.raises(ValueError, match=r"`groups` must be at least 1"):
        VirtualGroups(0)
    with pytest.raises(ValueError, match=r"`scaling` must be one of"):
        VirtualGroups(2, "fourth_root")
    with pytest.raises(ValueError, match=r'`scaling="sqrt"` is for gated'):
        VirtualGroups(2, "sqrt").fold_scale(toy_ffn(gated=False), 2.0)


def test_virtual_groups_choose_their_router_start():
    assert VirtualGroups(4).default_router() == Repeated(4)
    assert Copy().default_router() == Normal(0.02)


# -- MoEBERT -------------------------------------------------------------------------------------------------------
def test_the_deal_of_importance_shared():
    importance = torch.tensor([0.9, 0.1, 0.8, 0.3, 0.7, 0.2, 0.6, 0.4])
    dealt = ImportanceShared(2).deal(importance, 2)
    assert [d.tolist() for d in dealt] == [[0, 2, 4, 7, 5], [0, 2, 6, 3, 1]]
    assert ImportanceShared(2).expert_width(8, 2) == 5


def test_importance_shared_is_never_the_dense_function():
    for k in (1, 2):
        assert not ImportanceShared(8).exactness(RN, k, 2).exact
    assert ImportanceShared(8).exactness(RN, 1, 1).exact


def test_importance_shared_refuses_uneven_rests():
    with pytest.raises(ValueError, match=r"16 are left, which 3 experts .* use `shared=9`"):
        ImportanceShared(8).expert_width(24, 3)
    assert ImportanceShared(9).expert_width(24, 3) == 14
    with pytest.raises(ValueError, match=r"`shared` must be below the 24 channels"):
        ImportanceShared(24).expert_width(24, 2)
    with pytest.raises(ValueError, match=r"`measure` must be one of"):
        ImportanceShared(8, "magnitude")
    with pytest.raises(ValueError, match=r"`shared` must not be negative"):
        ImportanceShared(-1)


@pytest.mark.parametrize(("builder", "name"), [
    (Split("importance"), "taylor"), (Split("coactivation"), "activations"), (ImportanceShared(8), "taylor")
])  # fmt: skip
def test_missing_statistics_are_named(builder, name):
    for stats in (None, LayerStatistics()):
        with pytest.raises(ValueError, match=f"reads the statistics '{name}', which were not collected"):
            builder.build(toy_ffn(), 4, stats)
