import json
import math

import pytest
import torch
from common.upcycling_toys import generator, ids, tiny_dense, tokens

from hf_moe.upcycling import KMeans, Normal, Prompts, Repeated, Zeros, locate_feed_forwards
from hf_moe.upcycling.clustering import balanced_kmeans
from hf_moe.upcycling.router_init.base import RouterInit
from hf_moe.upcycling.router_init.prompts import prompt_row
from hf_moe.upcycling.statistics import LayerStatistics


PROMPTS = {0: [[3, 4, 5]], 1: {"positive": [[6, 7], [8, 9, 10]], "negative": [[11]]}}
STARTS = {
    "normal": Normal(),
    "repeated": Repeated(2),
    "kmeans": KMeans(),
    "prompts": Prompts({e: [[3 + e, 4, 5]] for e in range(4)}),
}


@pytest.mark.parametrize("name", STARTS)
def test_starts_give_one_float32_row_per_expert(name):
    model = tiny_dense("llama")
    start = STARTS[name].prepare(model, locate_feed_forwards(model))
    start.validate(4, 2)
    rows = start.build(4, 16, LayerStatistics(tokens(count=50)), generator(), 1)
    assert rows.shape == (4, 16) and rows.dtype == torch.float32
    assert rows.abs().max() > 0
    json.dumps(start.describe())


def test_normal_has_the_given_spread_and_repeats_with_the_seed():
    rows = Normal(0.1).build(64, 256, generator=generator(1))
    assert float(rows.std()) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(rows, Normal(0.1).build(64, 256, generator=generator(1)))
    with pytest.raises(ValueError, match=r"`std` must be above 0, got 0"):
        Normal(0)


def test_repeated_rows_stand_in_a_row():
    rows = Repeated(3).build(6, 8, generator=generator())
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2]) and torch.equal(rows[3], rows[5])
    assert not torch.equal(rows[0], rows[3])
    with pytest.raises(ValueError, match=r"`num_experts` must be a multiple of the `groups` \(3\)"):
        Repeated(3).validate(8, 3)


def test_zeros_are_refused_because_ties_starve_experts():
    with pytest.raises(ValueError, match=r"ties send every token to the same 2 experts, so the others never train"):
        Zeros().validate(4, 2)
    Zeros().validate(4, 4)
    assert not Zeros().build(4, 16).any()


def test_the_tie_trap_is_real():
    """Mixtral with a zero router sends every token to the same two of four experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    model.model.layers[0].mlp.gate.weight.data.zero_()
    chosen = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda m, a, out: chosen.append(out[2]))
    with torch.no_grad():
        model(input_ids=ids())
    assert len(chosen[0].unique()) == 2
    assert all(torch.equal(row, chosen[0][0]) for row in chosen[0])


def test_the_base_says_what_to_define():
    with pytest.raises(TypeError, match=r"must define `build`"):
        RouterInit().build(2, 4)


# -- balanced k-means ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("points", "clusters"), [(24, 4), (25, 4), (7, 7), (5, 1)])
def test_clusters_are_balanced(points, clusters):
    labels, centroids = balanced_kmeans(tokens(count=points), clusters, generator())
    sizes = torch.bincount(labels, minlength=clusters)
    assert int(sizes.max() - sizes.min()) <= 1 and int(sizes.sum()) == points
    for c in range(clusters):
        torch.testing.assert_close(centroids[c], tokens(count=points)[labels == c].mean(0))


def test_identical_points_are_still_dealt_out_evenly():
    labels, _ = balanced_kmeans(torch.ones(8, 3), 4, generator())
    assert torch.bincount(labels).tolist() == [2, 2, 2, 2]


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match=r"4 clusters need at least as many points, got 3"):
        balanced_kmeans(torch.ones(3, 2), 4)


def test_kmeans_rows_send_planted_clusters_to_different_experts():
    centers = torch.randn(4, 16, generator=generator(1)) + 20.0  # a large common part, as hidden states have
    x = centers.repeat_interleave(20, dim=0) + 0.05 * torch.randn(80, 16, generator=generator(2))
    order = torch.randperm(80, generator=generator(3))
    rows = KMeans().build(4, 16, LayerStatistics(x[order]), generator(4))
    assert float(rows.norm(dim=-1).mean()) == pytest.approx(1.0)
    # Rows are centroids without their mean, in some order.
    expected = centers - centers.mean(0)
    cosine = torch.nn.functional.normalize(rows, dim=-1) @ torch.nn.functional.normalize(expected, dim=-1).T
    assert sorted(cosine.argmax(-1).tolist()) == [0, 1, 2, 3] and float(cosine.amax(-1).min()) > 0.99
    choice = ((x - x.mean(0)) @ rows.T).argmax(-1).reshape(4, 20)
    assert all(len(set(group.tolist())) == 1 for group in choice)
    assert len(set(choice[:, 0].tolist())) == 4


def test_kmeans_without_centering_keeps_the_centroids():
    x = tokens(count=40) + 5.0
    _, centroids = balanced_kmeans(x, 2, generator())
    rows = KMeans(center=False, norm=3.0).build(2, 16, LayerStatistics(x), generator())
    torch.testing.assert_close(rows, centroids * 3.0 / centroids.norm(dim=-1).mean())


@pytest.mark.parametrize("bad", [{"norm": 0}, {"max_points": 0}])
def test_kmeans_refuses_wrong_values(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must"):
        KMeans(**bad)


# -- prompts -------------------------------------------------------------------------------------------------------
def test_the_row_of_known_prompts():
    row = prompt_row(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(row, torch.tensor([2.0, 1.0]) / math.sqrt(5), rtol=0, atol=1e-6)
    assert row.tolist() == pytest.approx([0.8944, 0.4472], abs=1e-4)


def hidden_of(model, layer, text, tap):
    """The state at the tap, read with plain hooks."""
    seen = []
    decoder = model.model.layers[layer]
    module = decoder.post_attention_layernorm if tap == "router_input" else decoder
    if tap == "router_input":
        handle = module.register_forward_hook(lambda m, a, out: seen.append(out))
    else:
        handle = module.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([text]))
    handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("tap", ["router_input", "layer_input"])
@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_prompt_rows_come_from_the_tapped_states(tap, mode):
    model = tiny_dense("llama")
    start = Prompts(PROMPTS, mode=mode, tap=tap).prepare(model, locate_feed_forwards(model))
    for layer in (0, 1):

        def vector(text, layer=layer):
            states = hidden_of(model, layer, text, tap)
            return states[-1] if mode == "hidden" else states.mean(0)

        first = prompt_row(vector([3, 4, 5])[None])
        second = prompt_row(torch.stack([vector([6, 7]), vector([8, 9, 10])]), vector([11])[None])
        rows = start.build(2, 16, layer_idx=layer)
        torch.testing.assert_close(rows, torch.stack([first, second]), rtol=0, atol=1e-6)


def test_cheap_embed_rows_are_mean_embeddings_for_all_layers():
    model = tiny_dense("llama")
    start = Prompts({0: [[3, 4]], 1: [[5]]}, mode="cheap_embed").prepare(model, locate_feed_forwards(model))
    embeddings = model.get_input_embeddings().weight.detach()
    expected = prompt_row(embeddings[[3, 4]].mean(0, keepdim=True))
    torch.testing.assert_close(start.build(2, 16, layer_idx=0)[0], expected)
    assert torch.equal(start.build(2, 16, layer_idx=0), start.build(2, 16, layer_idx=1))


def test_prompts_leave_no_hooks_and_no_mode_behind():
    model = tiny_dense("llama").train()
    Prompts(PROMPTS).prepare(model, locate_feed_forwards(model))
    assert model.training and model.model.layers[0].training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_text_prompts_use_the_tokenizer(tiny_tokenizer):
    model = tiny_dense("llama", vocab_size=384)
    sites = locate_feed_forwards(model)
    text = Prompts({0: "the cats", 1: ["def add(a, b):"]})
    encoded = Prompts({e: [tiny_tokenizer(t)["input_ids"]] for e, t in enumerate(["the cats", "def add(a, b):"])})
    assert text.reads_text and not encoded.reads_text
    assert torch.equal(text.prepare(model, sites, tiny_tokenizer).rows[0], encoded.prepare(model, sites).rows[0])
    with pytest.raises(ValueError, match=r"`prompts` has text, which needs `tokenizer`"):
        text.prepare(model, sites)


def test_alike_prompts_are_warned_about(monkeypatch):
    from hf_moe.upcycling.router_init import prompts

    said = []
    monkeypatch.setattr(prompts.logger, "warning", said.append)
    model = tiny_dense("llama")
    Prompts({0: [[3, 4, 5]], 1: [[3, 4, 5]]}).prepare(model, locate_feed_forwards(model))
    assert len(said) == 1 and "look alike to the router (condition number" in said[0]


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(prompts={0: []}), r"`prompts\[0\]` has no positive prompt"),
    (dict(prompts={0: {"good": ["x"]}}), "may have 'positive' and 'negative', got"),
    (dict(prompts={0: ["x"]}, mode="mean"), "`mode` must be one of"),
    (dict(prompts={0: ["x"]}, tap="output"), "`tap` must be one of"),
])  # fmt: skip
def test_prompts_refuse_wrong_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        Prompts(**arguments)


def test_every_expert_needs_prompts():
    with pytest.raises(ValueError, match=r"one entry for each expert 0 to 2, got \[0, 1\]"):
        Prompts(PROMPTS).validate(3, 1)
    with pytest.raises(ValueError, match=r"must see the dense model first"):
        Prompts(PROMPTS).build(2, 16)
