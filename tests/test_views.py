"""Views: what they say of a model, what is refused, wrappers, and recording. Families: test_view_families.py."""

import pytest
import torch
from common.experts_inputs import received_by_experts
from common.tiny_families import tiny_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from hf_moe.views import moe_layers, record_routing, unwrap_model


# PEFT 0.21 asks transformers for an attribute it has renamed.
peft_asks_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def random_ids(generator, shape=(2, 9)):
    return torch.randint(3, 384, shape, generator=generator)


def hook_count(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_recorded_logits_are_those_the_model_returns(generator):
    model = tiny_model("qwen3_moe")
    with torch.no_grad(), record_routing(model) as recorder:
        outputs = model(input_ids=random_ids(generator), output_router_logits=True)
    for layer, router_logits in zip(recorder.layers, outputs.router_logits, strict=True):
        assert torch.equal(layer.router_logits[0], router_logits)


def test_views_carry_names_sizes_and_the_modules_themselves():
    model = tiny_model("mixtral")
    views = moe_layers(model)
    assert [view.name for view in views] == [f"model.layers.{i}.mlp" for i in range(4)]
    assert [view.index for view in views] == [0, 1, 2, 3]
    assert all((view.num_experts, view.num_experts_per_tok) == (8, 2) for view in views)
    block = model.model.layers[1].mlp
    assert (views[1].block, views[1].router, views[1].experts) == (block, block.gate, block.experts)


def test_dense_layers_between_moe_layers_are_skipped():
    model = tiny_model("qwen3_moe", mlp_only_layers=[0, 2])
    assert [view.name for view in moe_layers(model)] == ["model.layers.1.mlp", "model.layers.3.mlp"]


def test_base_model_and_head_give_the_same_layers():
    model = tiny_model("mixtral")
    assert [view.router for view in moe_layers(model.model)] == [view.router for view in moe_layers(model)]


def test_dense_model_is_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\) has no MoE layer"):
        moe_layers(tiny_llama)


def test_moe_family_whose_layers_are_all_dense_is_refused():
    with pytest.raises(ValueError, match="has no MoE layer"):
        moe_layers(tiny_model("qwen3_moe", mlp_only_layers=[0, 1, 2, 3]))


@pytest.mark.parametrize("family,router", [("dbrx", "DbrxRouter"), ("doge", "DogeCDMoE"), ("jetmoe", "JetMoe")])
def test_refused_family_is_named_by_its_router_with_the_reason(family, router):
    with pytest.raises(ValueError, match=rf"do not support {router}.*: it"):
        moe_layers(tiny_model(family))


def test_unknown_family_is_refused_by_the_name_of_its_router():
    class NewTopKRouter(nn.Module):
        pass

    class NewModel(PreTrainedModel):
        config_class = PreTrainedConfig
        _can_record_outputs = {"router_logits": OutputRecorder(NewTopKRouter, index=0)}

        def __init__(self, config):
            super().__init__(config)
            self.gate = NewTopKRouter()

    with pytest.raises(ValueError, match=r"NewTopKRouter.*FAMILY_RULES"):
        moe_layers(NewModel(PreTrainedConfig()))


def test_fields_say_how_weights_are_made():
    views = {name: moe_layers(tiny_model(name))[0] for name in ("mixtral", "deepseek_v3", "gemma4_text", "moe_llama")}
    assert {name: (view.score_function, view.normalisation, view.top_k_source) for name, view in views.items()} == {
        "mixtral": ("softmax", "sum", "top_k"),
        "deepseek_v3": ("sigmoid", "sum", "top_k"),
        "gemma4_text": ("none", "sum", "config.top_k_experts"),
        "moe_llama": ("softmax_topk", "sum", "top_k"),
    }


def test_sigmoid_router_of_ours_brings_its_own_probabilities(generator):
    model = tiny_model("moe_llama", router_type="sigmoid_topk")
    with torch.no_grad(), record_routing(model) as recorder:
        model(input_ids=random_ids(generator))
    layer = recorder.layers[0]
    scores = layer.router_logits[0].sigmoid()
    torch.testing.assert_close(layer.view.probabilities(layer.router_logits[0]), scores / scores.sum(-1, keepdim=True))


def test_zero_computation_experts_are_counted_and_named():
    view = moe_layers(tiny_model("moe_plus_plus", num_experts=4, num_zero_experts=1, num_copy_experts=1))[0]
    constants = view.block.zero_experts.num_constant
    assert view.num_experts == 6 + constants and view.num_computing_experts == 4
    assert view.expert_labels[:4] == ["0", "1", "2", "3"] and view.expert_labels[-2:] == ["copy 0", "zero 0"]
    assert len(view.expert_labels) == view.num_experts


def test_padding_is_an_empty_slot_of_our_routers(generator):
    model, input_ids = tiny_model("moe_llama"), random_ids(generator)
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    with torch.no_grad(), record_routing(model) as recorder:
        model(input_ids=input_ids, attention_mask=mask)
    index = recorder.layers[0].top_k_index[0]
    assert (index[~mask.bool().flatten()] == 8).all() and (index[mask.bool().flatten()] < 8).all()


# -- wrappers --------------------------------------------------------------------------------------------------------
@peft_asks_old_name
def test_lora_leaves_names_and_modules_alone(generator):
    peft = pytest.importorskip("peft")
    model = tiny_model("mixtral")
    before = moe_layers(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert moe_layers(wrapped) == before
    recorder, received = received_by_experts(wrapped, random_ids(generator))
    assert torch.equal(recorder.layers[3].top_k_index[0], received[3][0])


@peft_asks_old_name
def test_lora_on_experts_still_shows_the_stacked_bank():
    peft = pytest.importorskip("peft")
    model = tiny_model("mixtral")
    banks = [view.experts for view in moe_layers(model)]
    config = peft.LoraConfig(
        target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2
    )
    views = moe_layers(peft.get_peft_model(model, config))
    assert [view.experts for view in views] == banks
    assert [view.name for view in views] == [f"model.layers.{i}.mlp" for i in range(4)]


@peft_asks_old_name
def test_router_trained_through_modules_to_save_is_the_one_recorded(generator):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])
    model = peft.get_peft_model(tiny_model("mixtral"), config)
    views, input_ids = moe_layers(model), random_ids(generator)
    assert len(views) == 4
    with torch.no_grad():
        views[0].router.modules_to_save["default"].weight.neg_()
        with record_routing(model) as trained:
            model(input_ids=input_ids)
        with record_routing(model) as original, model.disable_adapter():
            model(input_ids=input_ids)
    torch.testing.assert_close(trained.layers[0].router_logits[0], -original.layers[0].router_logits[0])


def test_data_parallel_and_compiled_models_are_unwrapped():
    model = tiny_model("mixtral")
    assert unwrap_model(nn.DataParallel(model)) is model
    assert unwrap_model(torch.compile(model, backend="eager")) is model


# -- recording -------------------------------------------------------------------------------------------------------
def test_hooks_are_removed_also_after_an_exception(generator):
    model = tiny_model("mixtral")
    before = hook_count(model)
    with pytest.raises(RuntimeError, match="stop"), record_routing(model):
        assert hook_count(model) == before + 4
        raise RuntimeError("stop")
    assert hook_count(model) == before


def test_recorders_nest(generator):
    model, input_ids = tiny_model("mixtral"), random_ids(generator)
    with torch.no_grad(), record_routing(model) as outer:
        model(input_ids=input_ids)
        with record_routing(model) as inner:
            model(input_ids=input_ids)
        model(input_ids=input_ids)
    assert [len(layer.top_k_index) for layer in outer.layers] == [3] * 4
    assert [len(layer.top_k_index) for layer in inner.layers] == [1] * 4
    assert torch.equal(outer.layers[2].top_k_index[1], inner.layers[2].top_k_index[0])


def test_records_are_detached_and_can_be_cleared(generator):
    model = tiny_model("mixtral")
    with record_routing(model, offload=True) as recorder:
        model(input_ids=random_ids(generator))
    layer = recorder.layers[0]
    assert not layer.router_logits[0].requires_grad and layer.router_logits[0].device.type == "cpu"
    recorder.clear()
    assert layer.router_logits == layer.top_k_weights == layer.top_k_index == []


def test_recording_does_not_change_outputs(generator):
    model, input_ids = tiny_model("deepseek_v3"), random_ids(generator)
    with torch.no_grad():
        plain = model(input_ids=input_ids).logits
        with record_routing(model):
            recorded = model(input_ids=input_ids).logits
    assert torch.equal(plain, recorded)


def test_a_compiled_model_is_recorded_too(generator):
    # Code compiled before the hooks were there does not call them.
    model, input_ids = tiny_model("mixtral", num_hidden_layers=1), random_ids(generator)
    with torch.no_grad():
        with record_routing(model) as eager:
            model(input_ids=input_ids, use_cache=False)
        compiled = torch.compile(model, backend="eager")
        compiled(input_ids=input_ids, use_cache=False)
        with record_routing(compiled) as recorder:
            compiled(input_ids=input_ids, use_cache=False)
    assert torch.equal(recorder.layers[0].top_k_index[0], eager.layers[0].top_k_index[0])


def test_recomputation_under_gradient_checkpointing_is_not_recorded(generator):
    model = tiny_model("mixtral").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    input_ids = random_ids(generator)
    calls = []
    handle = moe_layers(model)[0].router.register_forward_hook(lambda *_: calls.append(1))
    with record_routing(model) as recorder:
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    handle.remove()
    assert len(calls) == 2  # the router did run twice
    assert [len(layer.top_k_index) for layer in recorder.layers] == [1] * 4
