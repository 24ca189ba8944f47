"""`num_experts` may be a list: one number for each MoE layer. Whatever reads it has to read the layer's own."""

import copy
import json
import pickle

import pytest
import torch
from common.model_battery import HEADS, TYPES, make_config, make_inputs, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe import create_model_card, moe_layers
from hf_moe.layer_config import LayerConfig, layer_config
from hf_moe.routing import LayerRouting, RouterStats, expert_frequency, load_balance_loss


every_type = pytest.mark.parametrize("model_type", TYPES)
COUNTS = [2, 6]


def pyramid(model_type, head="ForCausalLM", **changes):
    return make_model(model_type, head, num_experts=COUNTS, num_hidden_layers=3, moe_layers=[0, 2], **changes)


# -- the config ------------------------------------------------------------------------------------------------------
@every_type
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": [4]}, r"a list with one for each of the 2 MoE layers \(`moe_layers='all'`\), got 1: \[4\]"),
        ({"num_experts": []}, "one for each of the 2 MoE layers"),
        ({"num_experts": [4, 4, 4]}, "one for each of the 2 MoE layers"),
        ({"num_experts": [4, 0]}, r"`num_experts` must be at least 1 in every MoE layer, got \[4, 0\]"),
        ({"num_experts": [4, 2], "num_experts_per_tok": 8}, r"`num_experts_per_tok` must be between 1 and .* got 8"),
    ],
    ids=str,
)
def test_bad_lists_are_refused(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(model_type, **{"moe_layers": "all", **fields})


def test_a_router_is_checked_against_every_layer():
    with pytest.raises(ValueError, match=r"`router_config\['num_expert_groups'\]` .*\(3\), got 2"):
        make_config("moe_llama", num_experts=[4, 3], router_config={"num_expert_groups": 2})


def test_one_number_is_for_all_layers():
    config = make_config("moe_llama", num_hidden_layers=5, moe_layers="every:2", num_experts=4)
    assert config.experts_per_layer == [4, 4]
    assert layer_config(config, 3) is config


def test_a_view_reads_through_to_the_config_and_survives_copies():
    config = make_config("moe_llama", num_experts=COUNTS)
    view = layer_config(config, 1)
    assert (view.num_experts, view.num_local_experts, view.num_routing_targets) == (6, 6, 6)
    assert view.previous_num_routing_targets == 2 and layer_config(view, 1) is view
    config.hidden_size = 40
    assert view.hidden_size == 40
    for other in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert isinstance(other, LayerConfig) and other.num_experts == 6 and other.hidden_size == 40


@pytest.mark.parametrize(
    ("moe_layers", "layers", "expected"), [("every:2:0", 5, [0, 2, 4]), ("every:3:1", 5, [1, 4])], ids=str
)
def test_the_first_moe_layer_may_be_given(moe_layers, layers, expected):
    assert make_config("moe_llama", moe_layers=moe_layers, num_hidden_layers=layers).moe_layer_indices == expected


@pytest.mark.parametrize("moe_layers", ["every:2:", "every:2:x", "every::1"])
def test_broken_steps_are_refused(moe_layers):
    with pytest.raises(ValueError, match=f"`moe_layers` must be .* got '{moe_layers}'"):
        make_config("moe_llama", moe_layers=moe_layers)


# -- the model -------------------------------------------------------------------------------------------------------
@every_type
@pytest.mark.parametrize("head", HEADS)
def test_every_layer_has_its_own_number(model_type, head):
    model = pyramid(model_type, head, num_labels=3)
    others = model.config.num_zero_computation_experts
    assert [block.experts.num_experts for _, block in model.moe_blocks()] == COUNTS
    assert [block.gate.num_experts for _, block in model.moe_blocks()] == [n + others for n in COUNTS]
    assert [view.num_experts for view in moe_layers(model)] == [n + others for n in COUNTS]
    assert model.base_model.load_balancer.num_experts == tuple(n + others for n in COUNTS)
    outputs = model(**make_inputs(), output_router_logits=True)
    extra = 0 if head == "Model" else others
    assert [logits.shape[-1] for logits in outputs.router_logits] == [n + extra for n in COUNTS]


@every_type
def test_the_balance_loss_is_per_layer_then_mean(model_type):
    model = pyramid(model_type, expert_capacity_factor=None)
    outputs = model(**make_inputs(), output_router_logits=True)
    values = []
    for (_, block), logits, index in zip(
        model.moe_blocks(), outputs.router_logits, outputs.router_indices, strict=True
    ):
        frequency = expert_frequency(index, block.gate.num_experts)
        values.append(load_balance_loss(block.gate.probabilities(logits), frequency, None, block.gate.balance_weights))
    torch.testing.assert_close(outputs.aux_loss, torch.stack(values).mean())


@every_type
def test_a_list_of_equal_numbers_is_that_number(model_type):
    fields = {"num_hidden_layers": 3, "moe_layers": [0, 2]}
    one, other = make_model(model_type, **fields), make_model(model_type, num_experts=[4, 4], **fields)
    inputs = make_inputs(padding="right")
    assert torch.equal(one(**inputs).logits, other(**inputs).logits)


@every_type
def test_saved_and_reloaded_it_is_the_same(model_type, tmp_path):
    model = pyramid(model_type)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_experts"] == COUNTS
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["num_experts"] == COUNTS
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(**make_inputs()).logits, again(**make_inputs()).logits)
    again.set_experts_implementation("batched_mm")
    assert {block.experts.config._experts_implementation for _, block in again.moe_blocks()} == {"batched_mm"}
    torch.testing.assert_close(model(**make_inputs()).logits, again(**make_inputs()).logits)


@every_type
def test_capacity_is_per_layer(model_type):
    model = pyramid(model_type, expert_capacity_factor=0.5, num_experts_per_tok=1).train()
    if model.config.router_type in ("top_p", "gating_residual"):
        pytest.skip("its number of assignments is not one per token and expert")
    outputs = model(**make_inputs(), output_router_logits=True)
    for count, index in zip(COUNTS, outputs.router_indices, strict=True):
        limit = max(-(-16 // (2 * count)), getattr(model.moe_blocks()[0][1].gate, "min_capacity", 0))
        assert index[index < count].bincount().max() <= limit


def test_statistics_take_layers_of_different_sizes():
    model = pyramid("moe_llama")
    outputs = model(**make_inputs(), output_router_logits=True)
    stats = RouterStats()
    stats.update(map(LayerRouting, outputs.router_logits, outputs.router_indices))
    assert stats.num_experts == tuple(COUNTS)
    assert "2, 6" in str(create_model_card(model))
