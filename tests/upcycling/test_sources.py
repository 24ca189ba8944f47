import json

import pytest
import torch
from common.upcycling_toys import tiny_dense
from torch import nn

from hf_moe import upcycle
from hf_moe.upcycling.sources import is_adapter, load_source, source_name


def test_folders_are_loaded_in_their_own_dtype(tmp_path):
    tiny_dense("llama").bfloat16().save_pretrained(tmp_path / "model")
    moe, report = upcycle(str(tmp_path / "model"), num_experts=2, top_k=1)
    assert moe.dtype == torch.bfloat16 and report.source == "model"
    moe, _ = upcycle(tmp_path / "model", num_experts=2, top_k=1)
    assert moe.config.upcycling["source"] == "model"


def test_the_head_of_a_folder_is_that_of_its_config(tmp_path):
    tiny_dense("llama", auto="AutoModelForTokenClassification").save_pretrained(tmp_path)
    moe, _ = upcycle(tmp_path, num_experts=2, top_k=1)
    assert type(moe).__name__ == "MixtralForTokenClassification"


def test_quantised_models_are_refused_before_their_weights_are_read(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is quantised \(gptq\).*upcycle the unquantised checkpoint"):
        upcycle(tmp_path, num_experts=2, top_k=1)


def test_quantised_instances_are_refused():
    model = tiny_dense("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match=r"`model` is quantised \(bitsandbytes\)"):
        upcycle(model, num_experts=2, top_k=1)


# PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_unmerged_adapters_are_refused_with_the_call_that_merges_them():
    from peft import LoraConfig, get_peft_model

    base = tiny_dense("llama")
    model = get_peft_model(base, LoraConfig(target_modules=["up_proj"]))
    for given in (model, base):  # PEFT changes the base model in place
        with pytest.raises(ValueError, match=r"unmerged PEFT adapters; merge them first: .*merge_and_unload\(\)"):
            upcycle(given, num_experts=2, top_k=1)
    _, report = upcycle(model.merge_and_unload(), num_experts=2, top_k=1)
    assert report.predicted_exact and report.measured.is_rounding


def test_an_adapter_folder_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert is_adapter(str(tmp_path))
    with pytest.raises(ValueError, match=r"is a PEFT adapter, not a model.*`FromModels`"):
        upcycle(tmp_path, num_experts=2, top_k=1)


@pytest.mark.parametrize("damage", ["truncated", "garbled"])
def test_damaged_weights_are_named(tmp_path, damage):
    tiny_dense("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"\xff" * len(data))
    with pytest.raises(ValueError, match=r"cannot be read .*truncated or damaged; download it again"):
        upcycle(tmp_path, num_experts=2, top_k=1)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_dense("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fill a LlamaForCausalLM: 1 weights are missing .*layers.0.mlp.up"):
        upcycle(tmp_path, num_experts=2, top_k=1)


@pytest.mark.parametrize("given", [nn.Linear(2, 2), 3, None])
def test_other_things_are_refused(given):
    with pytest.raises(TypeError, match=f"`model` must be a transformers model.*got {type(given).__name__}"):
        load_source(given)


def test_names_are_hub_ids_folder_names_or_classes(tmp_path):
    model = tiny_dense("llama")
    assert source_name(model) == "LlamaForCausalLM"
    model.name_or_path = "me/model"
    assert source_name(model) == "me/model" == source_name("me/model")
    (tmp_path / "mine").mkdir()
    assert source_name(str(tmp_path / "mine")) == source_name(tmp_path / "mine") == "mine"


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] = 24
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"does not fill a LlamaForCausalLM: 6 weights are missing or of another shape"
    ):
        upcycle(tmp_path, num_experts=2, top_k=1)
