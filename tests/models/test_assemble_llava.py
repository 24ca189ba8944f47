"""A LLaVA of parts that were trained apart: both parts compute what they did, only the projector is new."""

import pytest
import torch
from common.tiny_llava import TEXT, VISION, images
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from hf_moe import assemble_llava, upcycle_llava


@pytest.fixture
def parts():
    fields = {name: value for name, value in VISION.items() if name != "model_type"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = CLIPVisionModel(CLIPVisionConfig(**fields)).eval()
        sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        yield tower, CLIPImageProcessorPil(**sizes)


def language_model(tokenizer, cls=LlamaForCausalLM, config=LlamaConfig, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(config(**{**TEXT, "vocab_size": len(tokenizer), **changes})).eval()


@torch.no_grad()
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_text_is_answered_as_before_and_images_are_seen(tied, spare, parts, tiny_tokenizer, tmp_path):
    known = len(tiny_tokenizer)
    model = language_model(tiny_tokenizer, tie_word_embeddings=tied, vocab_size=known + spare)
    ids = tiny_tokenizer("The river runs", return_tensors="pt")["input_ids"]
    expected = model(ids).logits
    tower, image_processor = parts
    llava, processor = assemble_llava(tower, model, tiny_tokenizer, image_processor)
    assert processor.image_token_id == llava.config.image_token_index == known
    rows = llava.get_input_embeddings().weight.shape[0]
    assert rows == (known + spare if spare else -(-(known + 1) // 8) * 8)
    torch.testing.assert_close(llava(input_ids=ids).logits[..., :known], expected[..., :known])
    assert (llava.lm_head.weight is llava.get_input_embeddings().weight) is tied
    assert llava.model.vision_tower is tower
    text = tiny_tokenizer.decode(ids[0])
    assert processor(text=text, return_tensors="pt")["input_ids"].tolist() == ids.tolist()
    batch = processor(images=images(1), text=f"<image>{text}", return_tensors="pt")
    logits = llava(**batch).logits
    moe, report = upcycle_llava(llava)
    assert report.measured.max_difference <= 1e-5
    moe.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, logits, rtol=0, atol=1e-5)


def test_a_new_row_is_the_mean_of_the_others(parts, tiny_tokenizer):
    model = language_model(tiny_tokenizer)
    mean = model.lm_head.weight.mean(0).detach().clone()
    llava, processor = assemble_llava(parts[0], model, tiny_tokenizer, parts[1])
    torch.testing.assert_close(llava.lm_head.weight[processor.image_token_id], mean)


def test_the_projector_depends_on_the_seed_alone(parts, tiny_tokenizer):
    made = [
        assemble_llava(parts[0], language_model(tiny_tokenizer), tiny_tokenizer, parts[1], seed=seed)[0]
        for seed in (0, 0, 1)
    ]
    first, same, other = (llava.model.multi_modal_projector.linear_1.weight for llava in made)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_what_llava_cannot_hold_is_refused(parts, tiny_tokenizer):
    phi = language_model(tiny_tokenizer, PhiForCausalLM, PhiConfig)
    with pytest.raises(ValueError, match=r"`language_model` \(PhiForCausalLM\) has a head with a bias"):
        assemble_llava(parts[0], phi, tiny_tokenizer, parts[1])
    with pytest.raises(ValueError, match=r"`vision_feature_select_strategy` must be 'default' or 'full', got 'all'"):
        assemble_llava(
            parts[0], language_model(tiny_tokenizer), tiny_tokenizer, parts[1], vision_feature_select_strategy="all"
        )
