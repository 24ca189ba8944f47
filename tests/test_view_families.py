"""Every family that views claim, as a tiny random model: what its rule reads and ranks is what its router does."""

import copy

import pytest
import torch
from common.experts_inputs import computing_slots, received_by_experts
from common.tiny_families import FAMILIES, OWN_FAMILIES, tiny_inputs, tiny_model
from common.view_document import DOCUMENT, document_text

from hf_moe.routing_override import routing_override
from hf_moe.view_families import BLOCKS_OF_ROUTERS, FAMILY_RULES, REFUSED_FAMILIES
from hf_moe.view_listing import supported_families
from hf_moe.views import moe_layers, record_routing


# Weights that are more than the chosen probabilities over a constant.
OWN_WEIGHTS = {"diffusion_gemma_text", "gemma4_text", "phimoe", "zaya"}
# Families that read the number of experts per token elsewhere, or divide by it.
OWN_TOP_K = {"diffusion_gemma_text", "gemma4_text", "openai_privacy_filter", "phimoe"}


@pytest.fixture(scope="module", params=(*FAMILIES, *OWN_FAMILIES, "moe_plus_plus"))
def family(request):
    """`(name, model)`; routers and selection biases are pushed apart, so that no step of a rule can be left out."""
    model = tiny_model(request.param)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for view in moe_layers(model):
            tensors = [*view.router.parameters()]
            tensors += [t for name, t in view.router.named_buffers() if "bias" in name]
            tensors += [t for name, t in view.block.named_buffers(recurse=False) if "bias" in name]
            tensors += [t for name, t in view.block.named_parameters(recurse=False) if "bias" in name]
            for tensor in tensors:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return request.param, model


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(3, 384, (2, 9), generator=torch.Generator().manual_seed(2))


def run(model, input_ids):
    with torch.no_grad(), record_routing(model) as recorder:
        output = model(**tiny_inputs(model, input_ids), use_cache=False)[0]
    recorder.layers = [layer for layer in recorder.layers if layer.top_k_index]
    return output, recorder.layers


def test_what_is_read_is_what_the_experts_receive(family, input_ids):
    recorder, received = received_by_experts(family[1], input_ids)
    assert len(received) == len(recorder.layers) > 0
    for layer, (top_k_index, top_k_weights) in zip(recorder.layers, received, strict=True):
        exact = {"rtol": 1e-5, "atol": 0} if family[0] == "llama4_text" else {"rtol": 0, "atol": 0}
        index, weights = computing_slots(layer.view, layer.top_k_index[0], layer.top_k_weights[0])
        assert torch.equal(index, top_k_index)
        torch.testing.assert_close(weights, top_k_weights, check_dtype=False, **exact)


def test_weights_are_proportional_to_the_probabilities_of_the_chosen(family, input_ids):
    # This is what tells softmax from sigmoid: both order the experts alike.
    for layer in run(family[1], input_ids)[1]:
        probabilities = layer.view.probabilities(layer.router_logits[0])
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(18))
        assert probabilities.shape == (18, layer.view.num_experts) == (18, len(layer.view.expert_labels))
        if family[0] in OWN_WEIGHTS:
            continue
        index, weights = layer.top_k_index[0], layer.top_k_weights[0].float()
        kept = (index < layer.view.num_experts).all(dim=-1)  # Switch drops tokens beyond its capacity
        chosen, weights = probabilities[kept].gather(-1, index[kept]), weights[kept]
        torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), chosen / chosen.sum(-1, keepdim=True))


def test_native_ranks_change_nothing(family, input_ids):
    _, model = family
    plain, routed = run(model, input_ids)
    for first in {layer.view.num_experts_per_tok for layer in routed}:
        with routing_override(model, range(first)):
            output, overridden = run(model, input_ids)
        assert torch.equal(output, plain)
        for layer, native in zip(overridden, routed, strict=True):
            assert torch.equal(layer.top_k_index[0], native.top_k_index[0])
            assert torch.equal(layer.top_k_weights[0], native.top_k_weights[0])
            assert torch.equal(layer.router_logits[0], native.router_logits[0])


def test_native_ranks_are_exact_in_bfloat16(family, input_ids):
    name, model = family
    if name == "inkling2_text":
        pytest.skip("its router computes in float32 and needs weights that `from_pretrained` keeps so")
    model = copy.deepcopy(model).bfloat16()
    _, routed = run(model, input_ids)
    with routing_override(model, range(routed[0].view.num_experts_per_tok)):
        _, overridden = run(model, input_ids)
    for layer, native in zip(overridden, routed, strict=True):
        assert torch.equal(layer.top_k_index[0], native.top_k_index[0])
        assert layer.top_k_weights[0].dtype == native.top_k_weights[0].dtype
        assert torch.equal(layer.top_k_weights[0], native.top_k_weights[0])


def test_the_best_alone_is_the_router_with_top_k_1(family, input_ids):
    name, model = family
    if name in OWN_TOP_K:
        pytest.skip("does not read `top_k` of its router, or divides by it")
    with routing_override(model, [0]):
        output, overridden = run(model, input_ids)
    views = [view for view in moe_layers(model) if hasattr(view.router, "top_k")]
    before = [view.router.top_k for view in views]
    try:
        for view in views:
            view.router.top_k = 1
        if name == "longcat_flash":  # its experts fail on a table of one column: compare what its routers return
            first = overridden[0].view
            hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
            expected = first.router(hidden)
            with routing_override(model, [0]):
                found = first.router(hidden)
            torch.testing.assert_close(found[1][:, :1], expected[1])
            assert torch.equal(found[2][:, :1], expected[2]) and not found[1][:, 1:].any()
            return
        expected, _ = run(model, input_ids)
    finally:
        for view, value in zip(views, before, strict=True):
            view.router.top_k = value
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)


def test_the_second_best_reaches_the_experts(family, input_ids):
    _, model = family
    _, native = run(model, input_ids)
    with routing_override(model, [1]):
        recorder, received = received_by_experts(model, input_ids)
    for layer, (top_k_index, top_k_weights) in zip(recorder.layers, received, strict=True):
        index, weights = computing_slots(layer.view, layer.top_k_index[0], layer.top_k_weights[0])
        assert torch.equal(index, top_k_index)
        torch.testing.assert_close(weights, top_k_weights, check_dtype=False, rtol=1e-5, atol=0)
    first, native_first = recorder.layers[0], native[0]
    assert torch.equal(first.router_logits[0], native_first.router_logits[0])
    second = first.top_k_index[0][:, 0]
    used = second < first.view.num_experts  # Switch drops tokens
    if first.view.num_experts_per_tok > 1:
        assert (second[:, None] == native_first.top_k_index[0]).any(dim=-1)[used].all()
    else:
        assert not (second[:, None] == native_first.top_k_index[0]).any(dim=-1)[used].any()


def test_rows_that_are_not_overridden_keep_their_weights_bit_for_bit(family, input_ids):
    _, model = family
    _, native = run(model, input_ids)
    ranks = [1] if native[0].view.max_slots == 1 else [1, 2, 4]
    with routing_override(model, ranks, rows=slice(1, None)):
        _, mixed = run(model, input_ids)
    layer, before = mixed[0], native[0]  # later layers see other hidden states
    slots = before.top_k_weights[0].shape[-1]
    assert torch.equal(layer.top_k_weights[0][:9, :slots], before.top_k_weights[0][:9])
    assert torch.equal(layer.top_k_index[0][:9, :slots], before.top_k_index[0][:9])
    assert not layer.top_k_weights[0][:9, slots:].any()
    with routing_override(model, ranks):
        _, whole = run(model, input_ids)
    width = whole[0].top_k_weights[0].shape[-1]
    torch.testing.assert_close(layer.top_k_weights[0][9:, :width], whole[0].top_k_weights[0][9:])


# -- the list ---------------------------------------------------------------------------------------------------------
def test_every_rule_is_proved_by_a_model():
    routers = {type(view.router).__name__ for family in FAMILIES for view in moe_layers(tiny_model(family))}
    assert routers == set(FAMILY_RULES)


def test_every_router_that_transformers_records_is_supported_or_refused_with_a_reason():
    families = supported_families()
    named = {family.router for family in families}
    assert named - set(FAMILY_RULES) - set(REFUSED_FAMILIES) - set(BLOCKS_OF_ROUTERS) == set()
    assert set(REFUSED_FAMILIES) <= named and set(BLOCKS_OF_ROUTERS) <= named
    assert len({family.name for family in families}) > 70 and sum(family.supported for family in families) > 65


def test_the_document_lists_exactly_these_families():
    assert DOCUMENT.read_text() == document_text(), "run `cd tests && python -m common.view_document`"
