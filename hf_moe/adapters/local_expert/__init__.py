"""A local expert and a gate beside the head of a frozen classifier (https://huggingface.co/papers/1811.00056)."""

from hf_moe.registration import register_adapter

from .config import LocalExpertConfig
from .layer import LocalExpertLayer, mix
from .model import LocalExpertModel


__all__ = ["LocalExpertConfig", "LocalExpertLayer", "LocalExpertModel", "mix"]

register_adapter(LocalExpertConfig, LocalExpertModel)
