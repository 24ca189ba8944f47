"""PILL: tokens of other modalities for a frozen language model, with one adapter per modality and gates on values."""

from hf_moe.registration import register_adapter

from .cells import HeadGate, improved_adapter
from .config import PillConfig
from .layers import AttentionNormLayer, FeedForwardNormLayer, PillLayer, ValueLayer
from .model import PillModel


__all__ = [
    "AttentionNormLayer",
    "FeedForwardNormLayer",
    "HeadGate",
    "PillConfig",
    "PillLayer",
    "PillModel",
    "ValueLayer",
    "improved_adapter",
]

register_adapter(PillConfig, PillModel)
