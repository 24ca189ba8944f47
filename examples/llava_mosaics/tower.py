"""A small CLIP that learns to tell which caption belongs to which mosaic; its eyes are the LLaVA's vision tower."""

import math
import time
from typing import Any

import numpy as np
import torch
from mosaics import PLACES, SIDE, WORDS, Mosaic, caption, draw_mosaics, picture
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig


__all__ = ["image_processor", "make_tower", "retrieval", "train_tower"]

# Words of captions; the text side starts from scratch and needs no more.
_WORDS = ("<end>", "nothing", *dict.fromkeys(" ".join(PLACES).split()), *WORDS)
_MEAN, _STD = 0.29, 0.35  # of the pixels of the training pictures


def image_processor() -> CLIPImageProcessorPil:
    """Turns mosaics into pixels: no resizing, no cropping."""
    return CLIPImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[_MEAN] * 3,
        image_std=[_STD] * 3,
    )


def make_tower(hidden_size: int, layers: int, seed: int = 0) -> CLIPModel:
    """A random CLIP for images of 4 x 4 patches.

    Args:
        hidden_size (`int`): Of images; a multiple of 32. The text side is half as wide.
        layers (`int`): Of images; the text side has two.
        seed (`int`): Of the weights.
    """
    text = CLIPTextConfig(
        vocab_size=len(_WORDS),
        hidden_size=hidden_size // 2,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=max(1, hidden_size // 64),
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        image_size=SIDE,
        patch_size=SIDE // 4,
    )
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=hidden_size // 2))


def encode(mosaics: list[Mosaic]) -> torch.Tensor:
    """Captions as ids `(B, 13)`; all are equally long."""
    numbers = {word: number for number, word in enumerate(_WORDS)}
    texts = [caption(mosaic).replace(",", "").split() for mosaic in mosaics]
    return torch.tensor([[*(numbers[word] for word in words), 0] for words in texts])


def pixels(mosaics: list[Mosaic], images: np.ndarray) -> torch.Tensor:
    """What [`image_processor`] makes of the mosaics, `(B, 3, 56, 56)`."""
    drawn = np.stack([np.asarray(picture(mosaic, images)) for mosaic in mosaics])
    return (torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD


def train_tower(
    tower: CLIPModel, images: np.ndarray, labels: np.ndarray, *, steps: int, batch_size: int, learning_rate: float
) -> float:
    """Trains in place on new mosaics in every step; returns seconds."""
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(tower.parameters(), learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    mosaics = draw_mosaics(labels, steps * batch_size, seed=17)
    tower.train()
    for step in range(steps):
        batch = mosaics[step * batch_size : (step + 1) * batch_size]
        loss: Any = tower(input_ids=encode(batch), pixel_values=pixels(batch, images), return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        rate.step()
    tower.eval()
    return time.perf_counter() - start


@torch.no_grad()
def retrieval(tower: CLIPModel, images: np.ndarray, labels: np.ndarray, count: int = 400) -> float:
    """Share of held-out mosaics whose own caption is the best of 100."""
    mosaics = draw_mosaics(labels, count, seed=18)
    right = []
    for start in range(0, count, 100):
        batch = mosaics[start : start + 100]
        logits = tower(input_ids=encode(batch), pixel_values=pixels(batch, images)).logits_per_image
        own = logits.diagonal()
        right.append((own >= logits.max(dim=1).values).float().mean().item())
    return float(np.mean(right))
