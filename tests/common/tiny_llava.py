"""A tiny LLaVA: random vision tower, random language model, a processor, and inputs for them."""

import torch
from torch import nn


__all__ = [
    "IMAGE_TOKEN",
    "PATCHES",
    "TEXT_TYPES",
    "dense_llava",
    "images",
    "llava_inputs",
    "make_processor",
    "moe_llava",
]

IMAGE_TOKEN = 63
PATCHES = 4  # of an image of 16 x 16 pixels in patches of 8
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
#: Dense language models with a backbone of ours, and what distinguishes them.
TEXT_TYPES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "stablelm": {"use_qkv_bias": True},
    "phi": {},
}


def _fill(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():  # biases start at zero and would hide mistakes
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def dense_llava(text_type: str = "llama", seed: int = 0, vision: dict | None = None, **text):
    """A `LlavaForConditionalGeneration` with random weights, the same each time."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config={**VISION, **(vision or {})},
        text_config={"model_type": text_type, **TEXT, **TEXT_TYPES[text_type], **text},
        image_token_index=text.get("vocab_size", 64) - 1,
        image_seq_length=PATCHES,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _fill(LlavaForConditionalGeneration(config), seed)


def moe_llava(text_type: str = "llama", seed: int = 0, text: dict | None = None, implementation=None, **moe_fields):
    """A `MoeLlavaForConditionalGeneration` with random weights, without capacity unless asked for."""
    from hf_moe import MoeLlavaConfig, MoeLlavaForConditionalGeneration

    config = MoeLlavaConfig(
        vision_config=VISION,
        text_config={"model_type": text_type, **TEXT, **TEXT_TYPES[text_type], **(text or {})},
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        **{"expert_capacity_factor": None, **moe_fields},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MoeLlavaForConditionalGeneration._from_config(config, **(implementation or {}))
        return _fill(model, seed)


def llava_inputs(batch: int = 2, length: int = 10, padding: str | None = None, seed: int = 0, image_token=IMAGE_TOKEN):
    """One image per row, its tokens after the second word; with `padding` the first row is three tokens short."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, image_token, (batch, length), generator=generator)
    image = torch.full((batch, PATCHES), image_token)
    ids = torch.cat([ids[:, :2], image, ids[:, 2:]], dim=1)
    mask = torch.ones_like(ids)
    if padding == "right":
        ids[0, -3:], mask[0, -3:] = 0, 0
    elif padding == "left":
        ids[0], mask[0, :3] = torch.cat([torch.zeros(3, dtype=torch.long), ids[0, :-3]]), 0
    pixels = torch.randn(batch, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def images(count: int, seed: int = 0):
    """PIL images of noise."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 20, 24, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def make_processor(tokenizer, **changes):
    """A `LlavaProcessor` with Pillow's image processor; the tokenizer gains `<image>` and a chat template."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for message in messages %}<|{{ message['role'] }}|>"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    options = {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    return LlavaProcessor(CLIPImageProcessorPil(**size), tokenizer, chat_template=template, **{**options, **changes})
