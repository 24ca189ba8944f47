"""The shared core of the adapter types, through three toy types. What all real types must do is in the battery."""

import copy
import pickle

import pytest
import torch
from common.toy_adapters import ToyBlockConfig, ToyGateConfig, ToyLinearConfig
from peft import PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_moe.adapters.core import condition, runtime_of
from hf_moe.registration import ensure_peft_type, register_adapter


CONFIGS = (ToyLinearConfig, ToyGateConfig, ToyBlockConfig)
IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 2, 1]])


def tiny_llama(**kwargs):
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **settings, **kwargs)).eval()


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


def test_fresh_adapter_is_the_base(config_class):
    base = tiny_llama()
    expected = logits(base)
    assert torch.equal(logits(get_peft_model(base, config_class()).eval()), expected)


@pytest.mark.parametrize("name", ["default", "other", "cell", "expert", "hfmoe"])
def test_saved_adapters_reload_under_any_name(config_class, name, tmp_path):
    model = get_peft_model(tiny_llama(), config_class(init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name=name, low_cpu_mem_usage=name == "other")
    assert torch.equal(logits(again.eval()), logits(model))
    keys = get_peft_model_state_dict(again, adapter_name=name)
    assert all(config_class.type_name.lower() in key for key in keys)
    assert keys.keys() == get_peft_model_state_dict(model).keys()


def test_transformers_loads_saved_adapters(config_class, tmp_path):
    model = get_peft_model(tiny_llama(), config_class(init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    plain = tiny_llama()
    plain.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(logits(plain.eval()), logits(model))


def test_disabling_and_unloading_give_the_base_back(config_class):
    base = tiny_llama()
    expected, kinds = logits(base), [type(m) for m in base.modules()]
    model = get_peft_model(base, config_class(init_weights=False)).eval()
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    plain = model.unload()
    assert torch.equal(logits(plain), expected)
    assert [type(m) for m in plain.modules()] == kinds
    assert runtime_of(plain) is None and not plain._forward_pre_hooks


def test_mixed_batch_equals_rows_alone(config_class):
    model = get_peft_model(tiny_llama(), config_class(init_weights=False))
    torch.manual_seed(1)
    model.add_adapter("second", config_class(init_weights=False))
    model.eval()
    expected = []
    for row, name in enumerate(("second", "default")):
        model.set_adapter(name)
        expected.append(logits(model)[row])
    mixed = logits(model, adapter_names=["second", "default"])
    torch.testing.assert_close(mixed, torch.stack(expected))
    mixed = logits(model, adapter_names=["__base__", "default"])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[0], logits(model)[0])
    torch.testing.assert_close(mixed[1], expected[1])


def test_mixed_batch_refuses_what_it_cannot_do(config_class):
    model = get_peft_model(tiny_llama(), config_class())
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=IDS, adapter_names=["default", "default"])
    model.eval()
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(input_ids=IDS, adapter_names=["default", "nobody"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(input_ids=IDS, adapter_names=["default"])


def test_merging(config_class):
    base = tiny_llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, config_class(init_weights=False)).eval()
    expected = logits(model)
    if config_class is ToyLinearConfig:
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), expected)
        torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=True)), expected)
    else:
        with pytest.raises(NotImplementedError, match="unload"):
            model.merge_and_unload()
        assert torch.equal(logits(model), expected)
        after = model.unload().state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(config_class, reentrant):
    model = get_peft_model(tiny_llama(), config_class(init_weights=False)).train()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert expected
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), expected)


def test_compiled_model_gives_the_same(config_class):
    model = get_peft_model(tiny_llama(), config_class(init_weights=False)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))
    if config_class is ToyBlockConfig:
        strength = torch.tensor([0.5, 2.0])
        torch.testing.assert_close(logits(compiled, strength=strength), logits(model, strength=strength))


def test_bfloat16_base_keeps_float32_cells(config_class):
    base = tiny_llama().bfloat16()
    expected = logits(base)
    model = get_peft_model(base, config_class()).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits(model), expected)


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

    from common.toy_adapters import ToyLinearTuner

    register_adapter(ToyLinearConfig, ToyLinearTuner)
    with pytest.raises(ValueError, match="already"):
        register_adapter(Foreign, ToyLinearTuner)
    with pytest.raises(ValueError, match="HFMOE_"):
        ensure_peft_type("SOMETHING")
