"""Where PILL stands in each architecture, and where it says that it cannot."""

import pytest
import torch
from common.adapter_cases import tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hf_moe.adapters.pill import AttentionNormLayer, FeedForwardNormLayer, PillConfig, PillLayer, ValueLayer


TEXT = torch.tensor([[5, 6, 7, 8, 9]])
SEPARATE = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "stablelm",
    "starcoder2", "olmo", "nemotron", "moe_llama", "moe_plus_plus",
)  # fmt: skip
FUSED = ("phi3", "gpt_neox", "gpt2", "moe_gpt2")


def tiny(model_type, **fields):
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if model_type.startswith(("gemma", "qwen3")):
        settings["head_dim"] = 16  # not hidden_size / num_attention_heads
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings | fields)).eval()


def config(**fields):
    return PillConfig(**({"modality_token_ids": {"image": 60}, "r": 4} | fields))


def logits(model, ids=TEXT):
    with torch.no_grad():
        return model(input_ids=ids).logits


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PillLayer)}


@pytest.mark.parametrize("model_type", SEPARATE)
def test_known_architectures_get_all_three_layers(model_type):
    base = tiny(model_type)
    expected = logits(base)
    model = get_peft_model(base, config()).eval()
    assert torch.equal(logits(model), expected)
    found = list(layers(model).values())
    for kind in (AttentionNormLayer, FeedForwardNormLayer, ValueLayer):
        assert sum(isinstance(module, kind) for module in found) == 2
    assert [m.last for m in found if isinstance(m, FeedForwardNormLayer)] == [False, True]
    assert {m.heads for m in found if isinstance(m, ValueLayer)} == {2}
    norm = "pre_feedforward_layernorm" if model_type in ("gemma2", "gemma3_text") else "post_attention_layernorm"
    assert all(n.endswith(norm) for n, m in layers(model).items() if isinstance(m, FeedForwardNormLayer))
    mixed = torch.tensor([[5, 60, 60, 8, 9]])
    assert not torch.equal(logits(model, mixed), logits(model.unload(), mixed))


@pytest.mark.parametrize("model_type", FUSED)
def test_fused_projections_have_no_gate(model_type):
    base = tiny(model_type)
    expected, kinds = logits(base), [type(module) for module in base.modules()]
    with pytest.raises(NotImplementedError, match=r"queries, keys and values in one layer.*attention_gate=False"):
        get_peft_model(base, config())
    assert [type(module) for module in base.modules()] == kinds
    model = get_peft_model(base, config(attention_gate=False)).eval()
    assert torch.equal(logits(model), expected) and len(layers(model)) == 4


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("phi", {}, "'phi': attention and feed-forward read the same norm"),
        ("cohere", {}, "same norm"),
        ("stablelm", {"use_parallel_residual": True}, "'stablelm': attention and feed-forward read the same norm"),
        ("olmo2", {}, "its norms come after"),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "does not know the layers of model type 'opt'"),
    ],
)
def test_architectures_without_such_places_are_refused(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny(model_type, **fields), config())


def test_an_unknown_architecture_works_with_the_names_of_its_modules():
    names = {"attention_norm": "self_attn_layer_norm", "feedforward_norm": "final_layer_norm"}
    targets = r".*layers\.\d+\..*(self_attn_layer_norm|final_layer_norm|v_proj)"
    base = tiny("xglm", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, num_key_value_heads=4)
    expected = logits(base)
    model = get_peft_model(base, config(value_projection="v_proj", target_modules=targets, **names)).eval()
    assert len(layers(model)) == 6 and torch.equal(logits(model), expected)
    mixed = torch.tensor([[5, 60, 60, 8, 9]])
    assert not torch.equal(logits(model, mixed), logits(model.unload(), mixed))


def test_norms_that_see_tokens_without_rows_are_refused():
    names = {"attention_norm": "self_attn_layer_norm", "feedforward_norm": "final_layer_norm"}
    model = get_peft_model(
        tiny("opt", ffn_dim=48, word_embed_proj_dim=32, num_key_value_heads=4),
        config(attention_gate=False, target_modules=r".*layers\.\d+\..*layer_norm", **names),
    )
    with pytest.raises(ValueError, match=r"'model.decoder.layers.0.final_layer_norm' has the shape \(5, 32\)"):
        logits(model)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_modules": ["self_attn", "v_proj"]}, ValueError, "'model.layers.0.self_attn', but PILL stands at"),
        ({"attention_norm": "self_attn"}, ValueError, "and, inside of it, 'model.layers.0.self_attn.v_proj'"),
        ({"target_modules": "all-linear"}, ValueError, "all-linear"),
        ({"target_modules": ["q_proj"]}, ValueError, "stands at modules named"),
        ({"target_modules": ["v_proj"], "attention_gate": False}, ValueError, "`attention_gate=False`"),
        ({"target_modules": ["input_layernorm"], "adapt_attention": False}, ValueError, "`adapt_attention=False`"),
        ({"value_projection": "up_proj"}, NotImplementedError, "makes more than the values"),
        ({"target_modules": [], "target_parameters": ["v_proj.weight"]}, ValueError, "`target_parameters`"),
    ],
)
def test_targets_that_cannot_be_are_refused_and_nothing_is_changed(fields, error, message):
    base = tiny_llama()
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(error, match=message):
        get_peft_model(base, config(**fields))
    assert [type(module) for module in base.modules()] == kinds


def test_a_regular_expression_may_choose_layers():
    model = get_peft_model(tiny_llama(), config(target_modules=r".*layers\.1\..*(layernorm|v_proj)"))
    assert len(layers(model)) == 3 and all(".layers.1." in name for name in layers(model))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_lora_stands_beside_it_but_not_at_the_same_module():
    inner = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "up_proj"]), adapter_name="beside")
    outer = get_peft_model(inner.base_model.model, config(), adapter_name="outer").eval()
    assert torch.equal(logits(outer), logits(tiny_llama()))
    inner = get_peft_model(tiny_llama(), LoraConfig(target_modules=["v_proj"]), adapter_name="beside")
    with pytest.raises(ValueError, match="another type"):
        get_peft_model(inner.base_model.model, config(), adapter_name="outer")


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=64, hidden_size=4096, intermediate_size=8, num_hidden_layers=1, num_attention_heads=32
        ))  # fmt: skip
        model = get_peft_model(base, PillConfig(), low_cpu_mem_usage=True)
    assert model.get_nb_trainable_parameters()[0] == 3 * 393_216 + 131_072
    model.set_stage("default", "align")
    assert model.get_nb_trainable_parameters()[0] == 393_216


def tiny_llava():
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=60, image_seq_length=4)
    ).eval()


PICTURE = {
    "input_ids": torch.tensor([[5, 60, 60, 60, 60, 8, 9]]),
    "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
}


def test_inside_a_vision_language_model_only_the_language_model_is_adapted():
    base = tiny_llava()
    with torch.no_grad():
        expected, expected_text = base(**PICTURE).logits, base(input_ids=TEXT).logits
    model = get_peft_model(base, PillConfig(r=4, modules_to_save=["multi_modal_projector"])).eval()
    assert model.peft_config["default"].modality_token_ids == {"image": [60]}
    assert len(layers(model)) == 6 and all(".language_model.layers." in name for name in layers(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("multi_modal_projector" in name for name in trained)
    assert torch.equal(logits(model), expected_text)
    with torch.no_grad():
        assert not torch.allclose(model(**PICTURE).logits, expected)
        model.set_stage("default", "align")
        assert torch.equal(model(**PICTURE).logits, expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_vision_language_model_generates_with_and_without_a_cache(beams):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llava(), PillConfig(r=4, init_weights=False)).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    cached = model.generate(**PICTURE, **settings)
    assert cached.shape[1] > 8
    assert torch.equal(cached, model.generate(**PICTURE, use_cache=False, **settings))


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
}
LANGUAGE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("model_type", "text", "vision", "token"),
    [
        ("smolvlm", {"model_type": "llama"}, {**VISION, "patch_size": 4}, "image_token_id"),
        ("gemma3", {"head_dim": 8}, {**VISION, "patch_size": 4}, "image_token_index"),
        ("paligemma", {"model_type": "gemma", "head_dim": 8}, {**VISION, "patch_size": 4}, "image_token_index"),
        ("qwen2_vl", {"rope_parameters": ROPE}, QWEN, "image_token_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_vision_language_models_are_found_their_way_into(model_type, text, vision, token):
    torch.manual_seed(0)
    settings = {"text_config": {**LANGUAGE, **text}, "vision_config": vision, token: 60}
    if model_type == "gemma3":
        settings["mm_tokens_per_image"] = 4
    base = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    expected = logits(base)
    model = get_peft_model(base, PillConfig(r=4)).eval()
    assert model.peft_config["default"].modality_token_ids == {"image": [60]}
    assert len(layers(model)) == 6 and all("vision" not in name and "visual" not in name for name in layers(model))
    assert torch.equal(logits(model), expected)


def test_layers_of_a_vision_language_model_can_be_chosen_and_saved(tmp_path):
    model = get_peft_model(tiny_llava(), PillConfig(r=4, layers_to_transform=[1]))
    assert len(layers(model)) == 3 and all(".layers.1." in name for name in layers(model))
    model.save_pretrained(tmp_path)
    assert PillConfig.from_pretrained(tmp_path).target_modules == model.peft_config["default"].target_modules


def test_a_language_model_taken_out_of_its_vision_model_says_what_it_misses():
    base = tiny_llava()
    base.model.language_model = get_peft_model(base.model.language_model, config())
    with pytest.raises(ValueError, match="`inputs_embeds` does not say which tokens are image"):
        base(**PICTURE)


def test_a_vision_language_model_without_known_placeholders_is_refused():
    with pytest.raises(ValueError, match=r"does not say which tokens stand for audio. Pass `modality_token_ids="):
        get_peft_model(tiny_llava(), PillConfig(modalities=["text", "audio"]))
