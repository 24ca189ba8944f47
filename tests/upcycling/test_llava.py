"""Upcycling of LLaVA: the language model becomes sparse, the function stays."""

import pytest
import torch
from common.tiny_llava import TEXT_TYPES, dense_llava, images, llava_inputs, make_processor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from hf_moe import MoeLlavaForConditionalGeneration, MoeLlavaModel, upcycle, upcycle_llava
from hf_moe.cli import main
from hf_moe.upcycling import Drop, Hash, locate_feed_forwards


@torch.no_grad()
def gap(a, b, **options) -> float:
    inputs = llava_inputs(**options)
    real = inputs["attention_mask"].bool()
    return float((a(**inputs).logits - b(**inputs).logits)[real].abs().max())


@pytest.mark.parametrize("text_type", TEXT_TYPES)
def test_every_language_model_keeps_its_logits_and_its_answers(text_type, tmp_path):
    dense = dense_llava(text_type)
    moe, report = upcycle_llava(dense)
    assert type(moe) is MoeLlavaForConditionalGeneration and moe.config.text_config.model_type == f"moe_{text_type}"
    assert report.predicted_exact and report.measured.max_difference <= 1e-5
    assert gap(moe, dense, padding="left") <= 1e-5 and gap(moe, dense, padding="right") <= 1e-5
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(moe.generate(**llava_inputs(), **options), dense.generate(**llava_inputs(), **options))
    moe.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and gap(again.eval(), moe) == 0


def test_the_settings_are_the_papers():
    moe, report = upcycle_llava(dense_llava())
    config = moe.config
    assert (config.num_experts, config.num_experts_per_tok, config.moe_layer_indices) == (4, 2, [0, 2])
    assert config.expert_capacity_factor == 1.5
    assert config.router_aux_loss_coef == 0.01 * 2  # the sum over two layers, as a mean
    assert config.router_config == {"norm_topk_prob": True, "balance_first_choice": True, "norm_survivors": True}
    assert config.upcycling["target"] == report.target == "moe_llava"
    for _, block in moe.moe_blocks():
        assert torch.equal(block.experts.down_proj, block.experts.down_proj[:1].expand(4, -1, -1))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("sparse", [0, 2]), ("dense", [0, 1, 2]), ("first_half", [0]), ("second_half", [1, 2]), ([1], [1]),
     ("every:2", [1]), ("every:2:0", [0, 2])],
)  # fmt: skip
def test_every_placement_is_exact(layers, expected):
    dense = dense_llava()
    moe, report = upcycle_llava(dense, num_experts=2, layers=layers)
    assert moe.config.moe_layer_indices == expected
    assert report.measured.max_difference <= 1e-5


@pytest.mark.parametrize("recipe", [{"residual": True}, {"shared": "dense", "experts": Drop()}, {"router": Hash()},
                                    {"weights": "softmax", "top_k": 4}], ids=str)  # fmt: skip
def test_other_recipes_are_exact_too(recipe):
    dense = dense_llava("stablelm")
    moe, report = upcycle_llava(dense, **recipe)
    assert report.predicted_exact and report.measured.max_difference <= 1e-5
    assert gap(moe, dense) <= 1e-5


def test_without_renormalising_the_function_changes_and_the_report_says_so():
    _, report = upcycle_llava(dense_llava(), weights="softmax", scale=1.0)
    assert not report.predicted_exact and report.measured.max_difference > 0.01


def test_upcycle_finds_the_language_model_among_the_towers():
    dense = dense_llava()
    names = [site.name for site in locate_feed_forwards(dense)]
    assert names == [f"model.language_model.layers.{i}.mlp" for i in range(3)]
    moe, report = upcycle(dense, num_experts=2, top_k=1, router_type="sigmoid_topk", image_seq_length=9)
    assert moe.config.router_type == "sigmoid_topk" and moe.config.image_seq_length == 9
    assert report.target == "moe_llava" and report.num_layers == 3
    moe, _ = upcycle(dense.model, num_experts=2, top_k=2)
    assert type(moe) is MoeLlavaModel
    inputs = llava_inputs()
    torch.testing.assert_close(moe(**inputs)[0], dense.model(**inputs)[0], rtol=0, atol=1e-5)


def test_a_tied_head_stays_tied(tmp_path):
    dense = dense_llava(tie_word_embeddings=True)
    assert dense.lm_head.weight is dense.model.language_model.embed_tokens.weight
    moe, report = upcycle_llava(dense)
    assert report.measured.max_difference <= 1e-5
    moe.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert gap(again.eval(), moe) == 0


def test_half_precision_stays_and_is_close():
    dense = dense_llava().bfloat16()
    moe, report = upcycle_llava(dense)
    assert moe.dtype == torch.bfloat16 and report.measured.is_rounding
    assert all(block.gate.weight.dtype == torch.float32 for _, block in moe.moe_blocks())


def test_the_dense_model_is_left_as_it_was():
    dense = dense_llava()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    moe, _ = upcycle_llava(dense)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_what_cannot_become_one_is_refused_before_anything_is_made():
    dense = dense_llava()
    with pytest.raises(ValueError, match=r"has no field 'num_expert'.*Did you mean 'num_experts'"):
        upcycle_llava(dense, num_expert=4)
    with pytest.raises(ValueError, match=r"`layers` has \[3\], but the model has 3 layers"):
        upcycle_llava(dense, layers=[3])
    with pytest.raises(ValueError, match=r"cannot hold.*`vision_tower\S+` is not in the language model"):
        upcycle_llava(dense, layers=r"vision_tower")
    gemma = dense.config.text_config.to_dict() | {"model_type": "gemma", "head_dim": 8}
    config = LlavaConfig(vision_config=dense.config.vision_config, text_config=gemma, image_token_index=63)
    other = LlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"its language model, gemma, has no backbone here"):
        upcycle_llava(other)
    with pytest.raises(ValueError, match=r"described by `text_config`.*its language model a MoE by itself"):
        upcycle(other, num_experts=2, top_k=2)


def test_the_command_writes_model_and_processor(tmp_path, tiny_tokenizer, capsys):
    processor = make_processor(tiny_tokenizer)
    size = len(processor.tokenizer)
    dense_llava(vocab_size=size).save_pretrained(tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    command = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), "--experts", "4", "--layers", "every:2:0"]
    assert main(command) == 0
    assert "target moe_llava" in capsys.readouterr().out
    moe = AutoModelForImageTextToText.from_pretrained(tmp_path / "moe")
    again = AutoProcessor.from_pretrained(tmp_path / "moe")
    inputs = again(images=images(1), text="<image>a river", return_tensors="pt")
    dense = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(moe(**inputs).logits, dense(**inputs).logits, rtol=0, atol=1e-5)
