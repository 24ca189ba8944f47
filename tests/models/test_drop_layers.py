"""Shallower students: which layers and expert counts go, and what a copy keeps."""

import pytest
import torch
from common.model_battery import TYPES, make_config, make_inputs, make_model
from transformers import LlamaConfig

from hf_moe import PrMoeConfig, drop_layers


every_type = pytest.mark.parametrize("model_type", TYPES)


@pytest.mark.parametrize(("num_experts", "width"), [(32, 1024), (64, 2048)])
def test_the_papers_student_loses_two_early_entries(num_experts, width):
    teacher = PrMoeConfig.pyramid(num_experts, n_embd=width)
    student = drop_layers(teacher, every=8)
    assert (teacher.num_hidden_layers, student.num_hidden_layers) == (24, 21)
    assert student.num_experts == [num_experts] * 8 + [2 * num_experts] * 2
    assert student.moe_layers == "every:2" and student.moe_layer_indices == list(range(1, 21, 2))
    changed = {k for k, v in student.to_dict().items() if v != teacher.to_dict().get(k)}
    assert changed == {"n_layer", "num_experts"}
    assert teacher.num_experts == [num_experts] * 10 + [2 * num_experts] * 2  # unchanged


@every_type
@pytest.mark.parametrize("moe_layers", ["all", "every:2", "second_half", [0, 1, 4]], ids=str)
def test_everything_else_stays(model_type, moe_layers):
    teacher = make_config(model_type, num_hidden_layers=5, moe_layers=moe_layers, num_experts=4)
    student = drop_layers(teacher, every=2)
    assert student.num_hidden_layers == 3 and student.num_experts == 4 and type(student) is type(teacher)
    if getattr(teacher, "layer_types", None):
        assert len(student.layer_types) == 3
    if isinstance(moe_layers, list):  # layers 0, 2 and 4 stay, of which 0 and 4 are MoE layers
        assert student.moe_layers == [0, 2]


def test_listed_layers_go_with_their_experts():
    teacher = make_config("moe_llama", num_hidden_layers=6, moe_layers=[0, 2, 3, 5], num_experts=[2, 3, 4, 5])
    student = drop_layers(teacher, every=3)  # layers 2 and 5 go
    assert student.moe_layers == [0, 2] and student.num_experts == [2, 4]


@every_type
@pytest.mark.parametrize("moe_layers", ["all", "every:2", [0, 1, 4]], ids=str)
def test_a_model_keeps_the_weights_of_what_stays(model_type, moe_layers):
    teacher = make_model(model_type, num_hidden_layers=5, moe_layers=moe_layers)
    student = drop_layers(teacher, every=3)
    kept = [0, 1, 3, 4]
    assert student.config.num_hidden_layers == 4 and type(student) is type(teacher)
    assert [kept[place] for place in student.config.moe_layers] == [
        layer for layer in teacher.config.moe_layer_indices if layer in kept
    ]
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    layers = [getattr(model.base_model, model.base_model.layers_attribute) for model in (student, teacher)]
    for place, source in enumerate(kept):
        theirs = layers[1][source].state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in layers[0][place].state_dict().items())
    assert student(**make_inputs()).logits.isfinite().all()
    assert teacher.config.num_hidden_layers == 5 and teacher.config.moe_layers == moe_layers


@pytest.mark.parametrize("every", [0, 1, 6, 2.0, True], ids=str)
def test_bad_steps_are_refused(every):
    config = make_config("moe_llama", num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"`every` must be between 2 and the number of layers \(5\), got"):
        drop_layers(config, every=every)


def test_dense_configs_are_refused():
    with pytest.raises(TypeError, match="must be a config or a model of this package's backbones, got LlamaConfig"):
        drop_layers(LlamaConfig())
