"""MoE-LLaVA with any vision tower that transformers' LLaVA accepts."""

import pytest
import torch
from common.tiny_llava import IMAGE_TOKEN, TEXT
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from hf_moe import upcycle_llava
from hf_moe.trainers.teachers import check_teacher, image_tokens


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"image_size": 16, "patch_size": 8}
# model type -> strategy, rows of an image of four patches, further fields
TOWERS = {
    "clip_vision_model": ("default", 4, {}),
    "moe_clip_vision_model": ("full", 5, {"num_experts": 2, "num_experts_per_tok": 1}),
    "siglip_vision_model": ("full", 4, {}),
    "dinov2": ("default", 4, {}),
    "dinov2_with_registers": ("full", 9, {}),
    "vit": ("default", 4, {}),
    "pixtral": ("full", 4, {"head_dim": 8}),
}


def llava(tower: str, seed: int = 0):
    strategy, _, fields = TOWERS[tower]
    config = LlavaConfig(
        vision_config={"model_type": tower, **SIZES, **SQUARE, **fields},
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1 if tower == "pixtral" else -2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).eval()


def inputs_for(tower: str):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, IMAGE_TOKEN, (2, 10), generator=generator)
    image = torch.full((2, TOWERS[tower][1]), IMAGE_TOKEN)
    ids = torch.cat([ids[:, :2], image, ids[:, 2:]], 1)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    sizes = {"image_sizes": torch.tensor([[16, 16], [16, 16]])} if tower == "pixtral" else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **sizes}


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_upcycling_keeps_what_every_tower_sees(tower, tmp_path):
    dense, inputs = llava(tower), inputs_for(tower)
    moe, _ = upcycle_llava(dense, check=False)
    expected = dense(**inputs).logits
    torch.testing.assert_close(moe(**inputs).logits, expected, rtol=0, atol=1e-5)
    blind = moe(**{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
    assert (blind - expected).abs().max() > 1e-4
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(moe.generate(**inputs, **options), dense.generate(**inputs, **options))
    moe.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=0, atol=1e-5)


def test_tokens_of_an_image_are_counted_for_every_tower():
    counts = {tower: image_tokens(llava(tower)) for tower in TOWERS}
    assert counts == {tower: rows for tower, (_, rows, _) in TOWERS.items()} | {"pixtral": None}  # by image
    # another tower with as many tokens fits, one with registers does not
    assert check_teacher(llava("clip_vision_model"), llava("siglip_vision_model", 1)) == 64
    with pytest.raises(ValueError, match="an image takes 4 tokens of the student and 9 of the teacher"):
        check_teacher(llava("siglip_vision_model"), llava("dinov2_with_registers"))
