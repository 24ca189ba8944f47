"""`weak="rank:2"` and the like."""

from types import SimpleNamespace

import pytest
import torch
from common.tiny_families import tiny_model

from hf_moe import record_routing
from hf_moe.generation import WeakRouting, parse_weak


@pytest.mark.parametrize(
    ("text", "kind", "number"), [("rank:2", "rank", 2), ("top:1", "top", 1), ("random:12", "random", 12)]
)
def test_the_three_forms(text, kind, number):
    assert parse_weak(text) == WeakRouting(kind, number, "native")
    assert parse_weak(text, "renormalised").weights == "renormalised"


@pytest.mark.parametrize("text", ["rank", "rank:0", "rank:-1", "rank:2.0", "best:1", "rank:2 ", "top:", "RANK:2", ""])
def test_another_form_is_refused_with_those_there_are(text):
    with pytest.raises(ValueError, match=r'`weak` must be "rank:k".*"top:m".*"random:r".*got ' + repr(text)):
        parse_weak(text)


def test_no_string_and_unknown_weights_are_refused():
    with pytest.raises(TypeError, match=r"`weak` must be a string such as \"rank:2\", got 2"):
        parse_weak(2)
    with pytest.raises(ValueError, match=r"`weak_weights` must be one of \['native', 'renormalised'\], got 'x'"):
        parse_weak("rank:1", "x")


@pytest.mark.parametrize("kind", ["rank", "top", "random"])
def test_a_number_beyond_the_smallest_layer_is_refused(kind):
    layers = [SimpleNamespace(name="layers.0.mlp", num_experts=8), SimpleNamespace(name="layers.1.mlp", num_experts=4)]
    WeakRouting(kind, 4).check(layers)
    with pytest.raises(ValueError, match=f'`weak="{kind}:5"` needs 5 experts, and `layers.1.mlp` has 4'):
        WeakRouting(kind, 5).check(layers)


def layer_zero(model, ids, text, weights="native"):
    """What the experts of layer 0 receive, with the router's probabilities."""
    received = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: received.extend(args[1:3]))
    with parse_weak(text, weights).override(model, generator=torch.Generator().manual_seed(0)):
        with record_routing(model) as recorder:
            model(ids)
    handle.remove()
    return received[0], received[1], recorder.layers[0].router_logits[0].softmax(-1)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_rank_is_counted_from_one_and_its_renormalised_weight_is_one(rank):
    model = tiny_model("mixtral")
    index, weights, probabilities = layer_zero(model, torch.arange(3, 20)[None], f"rank:{rank}")
    assert torch.equal(index, probabilities.argsort(-1, descending=True)[:, rank - 1 : rank])
    torch.testing.assert_close(weights, torch.ones_like(weights))


def test_native_weights_of_a_family_that_does_not_renormalise_are_its_probabilities():
    model = tiny_model("olmoe", norm_topk_prob=False)
    index, weights, probabilities = layer_zero(model, torch.arange(3, 20)[None], "rank:2")
    torch.testing.assert_close(weights, probabilities.gather(-1, index))
    _, weights, _ = layer_zero(model, torch.arange(3, 20)[None], "rank:2", "renormalised")
    torch.testing.assert_close(weights, torch.ones_like(weights))


def test_random_takes_one_expert_per_token_and_top_the_best():
    model = tiny_model("mixtral")
    ids = torch.arange(3, 103)[None]
    index, weights, _ = layer_zero(model, ids, "random:1")
    assert index.shape == (100, 1) and index.unique().numel() == 8
    torch.testing.assert_close(weights, torch.ones_like(weights))
    index, _, probabilities = layer_zero(model, ids, "top:3")
    assert torch.equal(index.sort(-1)[0], probabilities.topk(3, -1)[1].sort(-1)[0])
