"""`quant_method="mote"`: ternary experts in packed bytes ([MoTE](https://huggingface.co/papers/2506.14435))."""

from hf_moe.registration import register_quantization


__all__ = ["register"]


def register() -> None:
    """Enters the method in transformers; called once its registry is imported."""
    from .config import MoteQuantizationConfig
    from .quantizer import MoteQuantizer

    register_quantization("mote", MoteQuantizationConfig, MoteQuantizer)
