"""mergekit's MoE YAML."""

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_moe import upcycle
from hf_moe.upcycling import Normal, Prompts, read_mergekit


@pytest.fixture
def sources(tmp_path, tiny_llama_config, tiny_tokenizer):
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_llama_config)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    for name in ("code", "poems"):
        with torch.no_grad():
            for layer in base.model.layers:
                layer.mlp.down_proj.weight.add_(0.1 * torch.randn(layer.mlp.down_proj.weight.shape))
        base.save_pretrained(tmp_path / name)
    return tmp_path


def write(folder, text):
    path = folder / "moe.yaml"
    path.write_text(text.replace("FOLDER", folder.as_posix()), encoding="utf-8")
    return path


GOOD = """
base_model: FOLDER/base
gate_mode: hidden
dtype: float32
experts_per_token: 1
experts:
  - source_model: FOLDER/code
    positive_prompts: ["def add(a, b):"]
  - source_model: FOLDER/poems
    positive_prompts: ["The river runs"]
    negative_prompts: ["print(add)"]
    residual_scale: 0.5
"""


def test_a_configuration_becomes_arguments_of_upcycle(sources):
    recipe, dtype = read_mergekit(write(sources, GOOD))
    assert (recipe["num_experts"], recipe["top_k"], dtype) == (2, 1, "float32")
    assert recipe["router"] == Prompts(
        {
            0: {"positive": ["def add(a, b):"], "negative": []},
            1: {"positive": ["The river runs"], "negative": ["print(add)"]},
        },
        mode="hidden",
    )
    assert list(recipe["experts"].residual_scales) == [1.0, 0.5]


def test_the_experts_are_the_feed_forwards_of_the_sources(sources):
    recipe, _ = read_mergekit(write(sources, GOOD))
    moe, _ = upcycle(**recipe, check=False, target="moe_llama")
    code, poems = (LlamaForCausalLM.from_pretrained(sources / name) for name in ("code", "poems"))
    down = moe.model.layers[1].mlp.experts.down_proj
    assert torch.equal(down[0], code.model.layers[1].mlp.down_proj.weight)
    assert torch.equal(down[1], 0.5 * poems.model.layers[1].mlp.down_proj.weight)


def test_random_gates_need_no_prompts(sources):
    text = GOOD.replace("hidden", "random").replace('    positive_prompts: ["def add(a, b):"]\n', "")
    assert read_mergekit(write(sources, text))[0]["router"] == Normal()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts: [", "is not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("base_model: a", "needs `base_model` and a list of `experts`"),
        ("base_model: a\nexperts: [{positive_prompts: [x]}]", r"experts\[0\].*needs a `source_model`"),
        ("base_model: a\nexperts: [{source_model: b}]\nspeed: 3", "unknown field 'speed'"),
        ("base_model: a\nexperts: [{source_model: b}]", r"needs `positive_prompts` for each expert; \[0\] have none"),
        ("base_model: a\nexperts: [{source_model: b}]\ngate_mode: magic", "`gate_mode`.*got 'magic'"),
        ("base_model: a\nexperts: [{source_model: b}]\ndtype: int3", "`dtype`.*got 'int3'"),
        ("base_model: a\nexperts: [{source_model: b}]\nshared_experts: [{source_model: c}]", "shared_experts"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_mergekit(write(tmp_path, text))
