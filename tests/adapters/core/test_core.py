"""The shared core of the adapter types, through three toy types. What all real types must do is in the battery."""

import copy
import pickle

import pytest
import torch
from common.adapter_cases import tiny_llama
from common.toy_adapters import ToyBlockConfig, ToyGateConfig, ToyLinearConfig, ToyLinearTuner
from peft import PeftType, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from hf_moe.adapters.core import condition, runtime_of
from hf_moe.registration import ensure_peft_type, register_adapter


CONFIGS = (ToyLinearConfig, ToyGateConfig, ToyBlockConfig)
IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 2, 1]])


def tiny_mixtral():
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **settings)
    ).eval()


@pytest.fixture(params=CONFIGS, ids=lambda config: config.type_name)
def config_class(request):
    return request.param


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


def test_frozen_containers_stay_frozen():
    model = get_peft_model(tiny_llama(), ToyGateConfig(stage="gate"))

    def trained():
        return {
            name.split("hfmoe_toy_gate_")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad
        }

    assert trained() == {"gate"}
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    assert trained() == {"gate"}
    model.set_stage("default", "both")
    assert trained() == {"gate", "expert"}
    with pytest.raises(ValueError, match="stage"):
        model.set_stage("default", "nothing")
    assert model.peft_config["default"].stage == "both"


def test_copies_and_pickles_are_independent(config_class):
    model = get_peft_model(tiny_llama(), config_class(init_weights=False)).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        if config_class is ToyBlockConfig:
            assert runtime_of(other) is not runtime_of(model)
            assert torch.equal(logits(other, strength=2.0), logits(model, strength=2.0))
            assert not torch.equal(logits(other, strength=2.0), logits(other))


def test_compiled_model_gives_the_same(config_class):
    model = get_peft_model(tiny_llama(), config_class(init_weights=False)).eval()
    torch.compiler.reset()  # other tests have compiled the same code for other modules
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))
    if config_class is ToyBlockConfig:
        strength = torch.tensor([0.5, 2.0])
        torch.testing.assert_close(logits(compiled, strength=strength), logits(model, strength=strength))


def test_condition_reaches_generate_and_ends():
    model = get_peft_model(tiny_llama(), ToyBlockConfig(init_weights=False)).eval()
    with condition(model, strength=0.0):
        off = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(logits(model, strength=3.0), logits(model, strength=torch.tensor(3.0)))  # a call's own wins
    with model.disable_adapter():
        assert torch.equal(off, model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False))
    assert not torch.equal(logits(model), logits(model, strength=0.0))
    with pytest.raises(ValueError, match="takes \\['strength'\\]"), condition(model, power=1.0):
        pass
    with pytest.raises(ValueError, match="nothing"), condition(tiny_llama(), strength=1.0):
        pass


def test_a_rows_condition_follows_it_into_a_mixed_batch():
    model = get_peft_model(tiny_llama(), ToyBlockConfig(init_weights=False))
    model.add_adapter("second", ToyBlockConfig(init_weights=False))
    model.eval()
    strength = torch.tensor([0.5, 2.0])
    mixed = logits(model, adapter_names=["__base__", "second"], strength=strength)
    model.set_adapter("second")
    torch.testing.assert_close(mixed[1], logits(model, strength=strength)[1])


def test_checkpointing_refuses_conditions_that_were_replaced():
    model = get_peft_model(tiny_llama(), ToyBlockConfig(init_weights=False)).train()
    model.base_model.model.gradient_checkpointing_enable()
    model(input_ids=IDS, labels=IDS, strength=1.0).loss.backward()
    model(input_ids=IDS, labels=IDS, strength=2.0).loss.backward()
    first = model(input_ids=IDS, labels=IDS, strength=1.0).loss
    second = model(input_ids=IDS, labels=IDS, strength=2.0).loss
    with pytest.raises(RuntimeError, match="Gradient checkpointing"):
        (first + second).backward()
    model.base_model.model.gradient_checkpointing_disable()
    first = model(input_ids=IDS, labels=IDS, strength=1.0).loss
    (first + model(input_ids=IDS, labels=IDS, strength=2.0).loss).backward()


def test_parameters_of_stacked_experts_and_routers():
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    base = tiny_mixtral()
    expected = logits(base)
    fresh = get_peft_model(base, ToyLinearConfig(target_modules=[], target_parameters=targets)).eval()
    assert torch.equal(logits(fresh), expected)
    model = get_peft_model(
        fresh.unload(), ToyLinearConfig(target_modules=[], target_parameters=targets, init_weights=False)
    )
    model.eval()
    adapted = logits(model)
    assert not torch.allclose(adapted, expected)
    model.add_adapter("second", ToyLinearConfig(target_modules=[], target_parameters=targets))
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["default"])), adapted)


def test_parameter_adapters_refuse_mixed_batches():
    model = get_peft_model(tiny_mixtral(), ToyLinearConfig(target_modules=[], target_parameters=["mlp.gate.weight"]))
    with pytest.raises(ValueError, match=r"mlp\.gate\.weight"):
        model.eval()(input_ids=IDS, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="target_parameters"):
        get_peft_model(tiny_mixtral(), ToyGateConfig(target_modules=[], target_parameters=["mlp.gate.weight"]))


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    base = tiny_llama()
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(AttributeError):  # an embedding has no `in_features`
        get_peft_model(base, ToyGateConfig(target_modules=["down_proj", "lm_head", "embed_tokens", "norm"]))
    assert [type(module) for module in base.modules()] == kinds
    assert not base._forward_pre_hooks
    assert torch.equal(logits(get_peft_model(base, ToyGateConfig()).eval()), logits(tiny_llama()))


def test_config_errors_come_at_construction():
    with pytest.raises(ValueError, match="`r` must be at least 1, got 0"):
        ToyLinearConfig(r=0)
    with pytest.raises(ValueError, match="bias"):
        ToyLinearConfig(bias="all")
    with pytest.raises(ValueError, match="layers_to_transform"):
        ToyLinearConfig(target_modules=".*q_proj", layers_to_transform=[0])


def test_registration_happens_once():
    members = len(PeftType)
    assert ensure_peft_type("HFMOE_TOY_LINEAR") is PeftType.HFMOE_TOY_LINEAR
    assert len(PeftType) == members
    assert PeftType("HFMOE_TOY_LINEAR") is PeftType["HFMOE_TOY_LINEAR"]

    class Foreign(ToyLinearConfig):
        pass

    register_adapter(ToyLinearConfig, ToyLinearTuner)
    with pytest.raises(ValueError, match="already"):
        register_adapter(Foreign, ToyLinearTuner)
    with pytest.raises(ValueError, match="HFMOE_"):
        ensure_peft_type("SOMETHING")


@pytest.mark.parametrize("reentrant", [False, True])
def test_calls_that_are_not_repeated_do_not_count(reentrant):
    model = get_peft_model(tiny_llama(), ToyBlockConfig(init_weights=False)).train()
    model(input_ids=IDS, labels=IDS, strength=1.0).loss.backward()
    model(input_ids=IDS, labels=IDS, strength=2.0)  # without a backward pass
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for strength in (3.0, 4.0):
        model(input_ids=IDS, labels=IDS, strength=strength).loss.backward()
    loss = model(input_ids=IDS, labels=IDS, strength=5.0).loss
    with torch.no_grad():
        model.eval()(input_ids=IDS, labels=IDS, strength=6.0)
    with pytest.raises(RuntimeError, match="Gradient checkpointing"):
        loss.backward()
