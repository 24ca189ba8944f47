"""Packed models: the same outputs, a fraction of the bytes, and back again."""

import json
import subprocess
import sys

import pytest
import torch
from common.tiny_llava import dense_llava, llava_inputs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hf_moe import (
    MoeLlamaConfig,
    MoeLlamaForCausalLM,
    MoeLlavaForConditionalGeneration,
    export_ternary,
    upcycle_mote,
)
from hf_moe.experts import TernaryExperts
from hf_moe.quantization.mote.experts import PackedTernaryExperts


IDS = torch.arange(24).view(2, 12)


def make_model(**fields):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "num_shared_experts": 1,
        "expert_type": "ternary",
        "router_config": {"norm_topk_prob": False},
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return MoeLlamaForCausalLM(MoeLlamaConfig(**{**sizes, **fields})).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module", params=["2bit", "base3"])
def packing(request):
    return request.param


def test_packed_logits_equal_those_of_the_trained_model(packing):
    model = make_model()
    model.set_experts_implementation("eager")
    expected = logits(model)
    export_ternary(model, packing)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("scale", ["matrix", "row"])
def test_saved_bytes_load_as_the_same_model(tmp_path, packing, scale):
    model = make_model(expert_config={"scale": scale})
    export_ternary(model, packing)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(isinstance(module, PackedTernaryExperts) for module in loaded.modules())
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.quantization_config.packing == packing
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_routed_experts_take_at_most_the_promised_bits_on_disk(tmp_path, packing):
    model = make_model(hidden_size=64, intermediate_size=96)
    report = export_ternary(model, packing)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stored = sum(t.nbytes for name, t in tensors.items() if ".mlp.experts." in name)
    assert stored == report.bytes_after
    assert 8 * stored / report.weights == report.bits_per_weight <= {"2bit": 2.2, "base3": 1.8}[packing]
    assert report.weights == 2 * 4 * 3 * 64 * 96 and report.bytes_before == 4 * report.weights
    assert not [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    saved = report.model_bytes_before - report.model_bytes_after
    assert saved == report.bytes_before - report.bytes_after
    assert f"{report.bits_per_weight:.3f} bits per weight" in str(report)


def test_a_packed_model_becomes_trainable_again_with_the_same_outputs(tmp_path):
    model = make_model()
    export_ternary(model)
    model.save_pretrained(tmp_path)
    model.set_experts_implementation("eager")
    packed = logits(model)
    again = model.dequantize()
    assert not hasattr(again.config, "quantization_config")
    assert any(isinstance(module, TernaryExperts) for module in again.modules())
    torch.testing.assert_close(logits(again), packed)
    report = export_ternary(again)
    assert report.banks == 2
    torch.testing.assert_close(logits(again), packed)


def test_bfloat16_models_are_packed_too(tmp_path):
    make_model().save_pretrained(tmp_path / "trained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.bfloat16)
    export_ternary(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.model.layers[0].mlp.experts.gate_up_packed.dtype == torch.uint8


def test_a_packed_model_generates(packing):
    model = make_model()
    before = model.generate(IDS[:, :4], max_new_tokens=6, do_sample=False)
    export_ternary(model, packing)
    assert torch.equal(model.generate(IDS[:, :4], max_new_tokens=6, do_sample=False), before)


def test_what_cannot_be_exported_is_refused():
    with pytest.raises(ValueError, match="has no ternary experts in full precision: build the model with"):
        export_ternary(make_model(expert_type="swiglu"))
    model = make_model()
    with pytest.raises(ValueError, match=r"`packing` must be one of \['2bit', 'base3'\], got '4bit'"):
        export_ternary(model, "4bit")
    assert not hasattr(model.config, "quantization_config")
    export_ternary(model)
    with pytest.raises(ValueError, match="they are packed already"):
        export_ternary(model)


def test_rounding_while_loading_is_refused_with_the_way_to_do_it(tmp_path):
    from hf_moe.quantization import MoteQuantizationConfig

    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"call `hf_moe.export_ternary\(model\)`"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MoteQuantizationConfig())


def test_damaged_files_are_refused(tmp_path):
    model = make_model()
    export_ternary(model)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`version` of the packed experts must be 1, got 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["down_packed", "gate_up_packed", "down_scale"])
def test_a_checkpoint_without_some_packed_tensor_is_refused(tmp_path, name):
    model = make_model()
    export_ternary(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in tensors if key.endswith(f".experts.{name}"))
    kept = {key: tensor for key, tensor in tensors.items() if key != lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 tensors of packed experts, '{lost}' among them"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    cut = {**tensors, lost: tensors[lost][:-1].contiguous()}
    save_file(cut, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@torch.no_grad()
def test_an_image_text_model_is_made_ternary_packed_and_loaded(tmp_path):
    dense, inputs = dense_llava(), llava_inputs()
    moe, _ = upcycle_mote(dense, init_output_scale=0.0)
    assert type(moe) is MoeLlavaForConditionalGeneration
    torch.testing.assert_close(moe.eval()(**inputs).logits, dense(**inputs).logits, rtol=0, atol=1e-5)
    moe, _ = upcycle_mote(dense)
    expected = moe.eval()(**inputs).logits
    report = export_ternary(moe)
    assert report.bits_per_weight <= 2.2
    torch.testing.assert_close(moe(**inputs).logits, expected, rtol=0, atol=1e-5)
    moe.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert any(isinstance(module, PackedTernaryExperts) for module in again.modules())
    assert torch.equal(again(**inputs).logits, moe(**inputs).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(again.generate(**inputs, **options), moe.generate(**inputs, **options))


def test_a_fresh_process_loads_packed_experts(tmp_path):
    model = make_model()
    export_ternary(model)
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch, hf_moe; from transformers import AutoModelForCausalLM as A\n"
        "model = A.from_pretrained(sys.argv[1]).eval()\n"
        "with torch.no_grad(): print(model(input_ids=torch.arange(24).view(2, 12)).logits.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(logits(model).double().sum().item(), rel=1e-6)
