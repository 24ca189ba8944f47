"""Every model type is the same after saving and loading, whole, in half precision, sharded, tied or resized."""

import json
import pickle

import pytest
import torch
import transformers
from common.model_battery import (
    GPT2_LIKE,
    HEADS,
    TYPES,
    force_routers,
    make_config,
    make_inputs,
    make_model,
    model_class,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe.routing import BaseRouter


every_type = pytest.mark.parametrize("model_type", TYPES)
every_head = pytest.mark.parametrize("head", HEADS)
# Everything a block may hold at once; each type has its own router.
RICH = {
    "num_shared_experts": 1,
    "shared_expert_gate": True,
    "residual_expert": True,
    "num_constant_experts": 1,
    "num_copy_experts": 1,
    "num_zero_experts": 1,
    "num_hidden_layers": 3,
    "moe_layers": [0, 2],
}


def auto(head):
    return transformers.AutoModel if head == "Model" else getattr(transformers, f"AutoModel{head}")


def assert_same_model(actual, expected):
    assert type(actual) is type(expected)
    wanted, found = expected.state_dict(), actual.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    inputs = make_inputs(padding="right")
    for a, e in zip(actual(**inputs).to_tuple(), expected(**inputs).to_tuple(), strict=True):
        if isinstance(e, torch.Tensor):
            # The same numbers at another address: sums may round otherwise.
            torch.testing.assert_close(a, e, rtol=1e-4 if e.dtype == torch.float32 else 2e-2, atol=1e-5)


@every_type
@every_head
def test_a_reloaded_model_is_the_same(model_type, head, tmp_path):
    model = make_model(model_type, head, num_labels=3, **RICH)
    force_routers(model, temperature=0.7)  # what a schedule wrote is part of the checkpoint
    model.save_pretrained(tmp_path)
    reloaded, report = auto(head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_model(reloaded, model)
    assert all(router.temperature == 0.7 for router in reloaded.modules() if isinstance(router, BaseRouter))


@every_type
def test_a_reloaded_config_is_the_same(model_type, tmp_path):
    fields = {"router_aux_loss_coef": 0.125, "expert_type": "mlp", "moe_intermediate_size": 20}
    config = make_config(model_type, **RICH, **fields, router_config={"temperature": 2.0})
    config.save_pretrained(tmp_path)
    for reloaded in (AutoConfig.from_pretrained(tmp_path), type(config).from_pretrained(tmp_path)):
        reloaded._name_or_path = config._name_or_path
        assert type(reloaded) is type(config) and reloaded.to_dict() == config.to_dict()
    twin = pickle.loads(pickle.dumps(config))
    assert type(twin) is type(config) and twin.to_dict() == config.to_dict()


@every_type
def test_names_of_the_checkpoint_are_those_that_other_tools_look_for(model_type, tmp_path):
    make_model(model_type).save_pretrained(tmp_path)
    names = {name.split(".mlp.", 1)[1] for name in load_file(tmp_path / "model.safetensors") if ".mlp." in name}
    gated = model_type not in (*GPT2_LIKE, "moe_phi")
    assert {"gate.weight", "experts.down_proj", "experts.gate_up_proj" if gated else "experts.up_proj"} <= names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == model_type and config["num_experts"] == 4


@every_type
def test_a_base_model_becomes_a_language_model_and_back(model_type, tmp_path):
    base = make_model(model_type, "Model")
    base.save_pretrained(tmp_path / "base")
    language_model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not report["unexpected_keys"] and set(report["missing_keys"]) <= {"lm_head.weight", "lm_head.bias"}
    inputs = make_inputs()
    expected = base(**inputs).last_hidden_state
    torch.testing.assert_close(language_model.base_model(**inputs).last_hidden_state, expected)
    language_model.save_pretrained(tmp_path / "lm")
    again = transformers.AutoModel.from_pretrained(tmp_path / "lm")
    torch.testing.assert_close(again(**inputs).last_hidden_state, expected)


@every_type
def test_shards_hold_the_same_model(model_type, tmp_path):
    model = make_model(model_type, **RICH)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@every_type
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied_and_untied_ones_apart(model_type, tied, tmp_path):
    model = make_model(model_type, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tied)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for one in (model, reloaded):
        same = one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert same == tied
    assert_same_model(reloaded, model)


@every_type
@pytest.mark.parametrize("tied", [True, False])
def test_resized_vocabularies_work_and_survive_saving(model_type, tied, tmp_path):
    model = make_model(model_type, tie_word_embeddings=tied)
    inputs = make_inputs()
    expected = model(**inputs).logits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 and model(**inputs).logits.shape[-1] == 70
    torch.testing.assert_close(model(**inputs).logits[..., :64], expected)
    loss = model(**inputs, labels=inputs["input_ids"] + 4).loss
    assert loss.isfinite()
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model)


# -- precision -------------------------------------------------------------------------------------------------------
@every_type
@pytest.mark.parametrize("how", ["load", "cast"])
def test_half_precision_keeps_routers_in_full_precision(model_type, how, tmp_path):
    model = make_model(model_type, **RICH, router_bias_update_speed=0.0)
    model.save_pretrained(tmp_path)
    if how == "load":
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        half = AutoModelForCausalLM.from_pretrained(tmp_path).to(torch.bfloat16)
    for name, tensor in (*half.named_parameters(), *half.named_buffers()):
        if tensor.is_floating_point() and "rotary" not in name:
            in_router = ".mlp.gate." in name and how == "load"  # `.to` casts everything, as torch does
            assert tensor.dtype == (torch.float32 if in_router else torch.bfloat16), name
    outputs = half(**make_inputs(padding="right"), output_router_logits=True)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.logits.isfinite().all()
    assert all(logits.dtype == torch.float32 for logits in outputs.router_logits)
    torch.testing.assert_close(
        outputs.logits.float(), model(**make_inputs(padding="right")).logits, rtol=0.1, atol=0.5
    )


@every_type
def test_half_precision_checkpoints_round_trip_exactly(model_type, tmp_path):
    make_model(model_type, **RICH).save_pretrained(tmp_path / "full")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    routers = [tensor for name, tensor in stored.items() if ".mlp.gate.weight" in name]
    assert routers and all(tensor.dtype == torch.float32 for tensor in routers)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half")  # dtype: that of the checkpoint
    assert reloaded.dtype == torch.bfloat16
    assert_same_model(reloaded, half)


@pytest.mark.parametrize("model_type", ["moe_llama", "moe_gpt2"])
def test_selection_biases_are_saved_in_full_precision(model_type, tmp_path):
    fields = {"router_type": "sigmoid_topk", "router_bias_update_speed": 0.001}
    model = make_model(model_type, **fields)
    force_routers(model, e_score_correction_bias=1.0 + 2**-12)  # rounds to 1 in half precision
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for _, block in half.moe_blocks():
        assert (block.gate.e_score_correction_bias == 1.0 + 2**-12).all()


@every_type
def test_counters_of_the_load_balancer_are_zero_after_loading(model_type, tmp_path):
    model = make_model(model_type, balance_mode="running")
    model.base_model.load_balancer.counts.fill_(7)
    model.save_pretrained(tmp_path)
    assert not any("load_balancer" in name for name in load_file(tmp_path / "model.safetensors"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, buffer in reloaded.base_model.load_balancer.named_buffers():
        assert not buffer.any(), name


@every_type
def test_missing_weights_are_initialised_and_reported(model_type, tmp_path):
    model = make_model(model_type)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    removed = {name for name in state if ".1.mlp." in name}
    save_file(
        {name: t for name, t in state.items() if name not in removed}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) >= {name for name in removed if "temperature" not in name}
    for name, parameter in reloaded.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 10, name
        if name not in removed:
            assert torch.equal(parameter, model.get_parameter(name)), name
    assert reloaded(**make_inputs()).logits.isfinite().all()


# -- what can be wrong with a checkpoint -----------------------------------------------------------------------------
def spoil(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbled header":
        path.write_bytes(b"\xff" * 16 + data[16:])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "empty", "garbled header", "missing"])
@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_weights_are_an_error_that_names_the_file(how, sharded, tmp_path):
    model = make_model("moe_llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB" if sharded else "1GB")
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    spoil(path, how)
    with pytest.raises(OSError if how == "missing" else ValueError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert path.name in str(error.value)
    assert how == "missing" or "is truncated or corrupt" in str(error.value)


@every_type
def test_a_shape_that_does_not_fit_names_the_parameter(model_type, tmp_path):
    make_model(model_type).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_experts"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"mlp\.gate\.weight|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# -- auto_map --------------------------------------------------------------------------------------------------------
@every_type
@pytest.mark.parametrize("trust", [None, True, False])
def test_a_checkpoint_with_auto_map_loads_our_classes_without_a_prompt(model_type, trust, tmp_path):
    model = make_model(model_type)
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == f"hf_moe_shim.{type(model).__name__}"
    kwargs = {} if trust is None else {"trust_remote_code": trust}
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
    assert type(reloaded) is type(model) and reloaded.config.auto_map == auto_map
    config = AutoConfig.from_pretrained(tmp_path, **kwargs)
    assert type(config) is type(model.config)


@every_type
def test_configs_declare_auto_map_because_trl_reads_it(model_type, tmp_path):
    config = make_config(model_type)
    assert config.auto_map == {} and (config.auto_map or {}) == {}
    assert model_class(config).config_class is type(config)
