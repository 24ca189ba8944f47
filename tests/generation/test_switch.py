"""Weak routing that is turned on and off is the routing override, and leaves nothing behind."""

import pytest
import torch
from common.decoding import prompt, spread_model

from hf_moe import moe_layers
from hf_moe.generation import parse_weak
from hf_moe.generation.switch import WeakSwitch


FAMILIES = ("mixtral", "olmoe", "deepseek_v3", "gpt_oss", "phimoe", "ernie4_5_moe", "afmoe", "moe_llama")


@pytest.mark.parametrize("weights", ["native", "renormalised"])
@pytest.mark.parametrize("weak", ["rank:1", "rank:3", "top:1", "top:4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_override(family, weak, weights):
    model, ids, routing = spread_model(family), prompt(2), parse_weak(weak, weights)
    with torch.no_grad():
        native = model(ids).logits
        with routing.override(model):
            expected = model(ids).logits
        with WeakSwitch(model, moe_layers(model), routing, second_half=False) as switch:
            assert torch.equal(model(ids).logits, native)
            with switch():
                assert torch.equal(model(ids).logits, expected)
            assert torch.equal(model(ids).logits, native)
        with WeakSwitch(model, moe_layers(model), routing, second_half=True) as switch, switch():
            both = model(torch.cat([ids, ids])).logits
    scale = native.abs().max()
    torch.testing.assert_close(both[:2] / scale, native / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[2:] / scale, expected / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("second_half", [False, True])
def test_nothing_is_left_after_the_block(second_half):
    model = spread_model("mixtral")
    layers = moe_layers(model)
    before = [dict(vars(layer.experts)) for layer in layers]
    with pytest.raises(RuntimeError, match="stop"):
        with WeakSwitch(model, layers, parse_weak("rank:2"), second_half) as switch, switch():
            assert all(layer.router._forward_hooks for layer in layers)
            raise RuntimeError("stop")
    assert not any(layer.router._forward_hooks for layer in layers)
    assert [layer.experts._is_expert_parallel for layer in layers] == [one["_is_expert_parallel"] for one in before]


def test_it_nests_in_an_override_and_decides():
    model, ids = spread_model("mixtral"), prompt()
    with torch.no_grad():
        with parse_weak("rank:3").override(model):
            expected = model(ids).logits
        with parse_weak("rank:1").override(model):
            with WeakSwitch(model, moe_layers(model), parse_weak("rank:3"), False) as switch, switch():
                assert torch.equal(model(ids).logits, expected)
