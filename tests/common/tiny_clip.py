"""A tiny CLIP with random weights, and inputs for it."""

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel


__all__ = ["END", "TEXT", "VISION", "clip_inputs", "make_clip", "make_moe_clip"]

END = 63
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "projection_dim": 24,
    "bos_token_id": 62,
    "eos_token_id": END,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 24,
}


def make_clip(seed: int = 0, **text) -> CLIPModel:
    """The same weights each time; biases are not zero."""
    config = CLIPConfig(text_config={**TEXT, **text}, vision_config=VISION, projection_dim=24, initializer_factor=3.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_moe_clip(seed: int = 0, text: dict | None = None, vision: dict | None = None, **fields):
    """A `MoeClipModel` without dropout."""
    from hf_moe import MoeClipConfig, MoeClipModel

    config = MoeClipConfig(
        text_config={**TEXT, "expert_dropout": 0.0, **(text or {})},
        vision_config={**VISION, "expert_dropout": 0.0, **(vision or {})},
        **{"projection_dim": 24, "initializer_factor": 3.0, **fields},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MoeClipModel(config).eval()


def clip_inputs(batch: int = 4, length: int = 10, padded: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Captions that end with the end token, and images; with `padded` the first caption is three tokens short."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (batch, length), generator=generator)
    ids[:, -1] = END
    mask = torch.ones_like(ids)
    if padded:
        ids[0, -4], ids[0, -3:], mask[0, -3:] = END, 1, 0
    pixels = torch.randn(batch, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
