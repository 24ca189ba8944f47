"""Denoisers of a few thousand weights: a plain torch one, and diffusers' own classes with random weights."""

import torch
from torch import nn
from torch.nn import functional as F

from hf_moe.adapters.agd.encoders import sinusoid


__all__ = ["PlainDenoiser", "latents", "tiny_dit", "tiny_sd3", "tiny_unet"]


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x):
        return self.proj(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1)))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn = Attention(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        x = x + self.attn(F.layer_norm(x, x.shape[-1:]))
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


class PlainDenoiser(nn.Module):
    """`net(x, t, c)`: x `(B, 4, 6)` is 6 tokens of 4 channels, t `(B,)` up to 1000, c `(B,)` a class, 5 for none."""

    def __init__(self, d=32, blocks=3, classes=5, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.d = d
        self.enter = nn.Linear(4, d)
        self.time = nn.Linear(16, d)
        self.label = nn.Embedding(classes + 1, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(blocks))
        self.leave = nn.Linear(d, 4)
        self.eval()

    def forward(self, x, t, c):
        dtype = self.enter.weight.dtype
        tokens = self.enter(x.to(dtype).transpose(1, 2))  # (B, 6, d)
        tokens = tokens + (self.time(sinusoid(t, 16).to(dtype)) + self.label(c))[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.leave(F.layer_norm(tokens, (self.d,))).transpose(1, 2)  # (B, 4, 6)


def tiny_dit(out_channels=4, **settings):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 2, "sample_size": 8, "num_layers": 2}
    sizes |= {"num_embeds_ada_norm": 5, "norm_num_groups": 1, "out_channels": out_channels} | settings
    return DiTTransformer2DModel(**sizes).eval()


def tiny_unet(**settings):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16)}
    sizes |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    sizes |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 12}
    return UNet2DConditionModel(**(sizes | {"attention_head_dim": 4, "norm_num_groups": 2} | settings)).eval()


def tiny_sd3():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 2, "out_channels": 2, "num_layers": 2}
    sizes |= {"attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 12}
    return SD3Transformer2DModel(
        caption_projection_dim=8, pooled_projection_dim=6, pos_embed_max_size=8, **sizes
    ).eval()


def latents(rows=3, shape=(2, 8, 8), seed=1):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))
