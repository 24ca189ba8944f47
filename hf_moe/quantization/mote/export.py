"""From trained ternary experts to packed ones, and what that saves."""

from dataclasses import asdict, dataclass
from typing import Any

from hf_moe.experts.ternary import TernaryExperts

from .config import MoteQuantizationConfig
from .experts import PackedTernaryExperts
from .quantizer import MoteQuantizer, replace_banks


__all__ = ["TernaryReport", "export_ternary"]


@dataclass(frozen=True)
class TernaryReport:
    """Sizes before and after.

    Args:
        banks (`int`): Banks that were packed.
        weights (`int`): Weights of the routed experts.
        bytes_before (`int`): Of the routed experts' parameters, in their type.
        bytes_after (`int`): Of their packed weights and scales.
        model_bytes_before (`int`): Of the whole model.
        model_bytes_after (`int`): Of the whole model.
    """

    banks: int
    weights: int
    bytes_before: int
    bytes_after: int
    model_bytes_before: int
    model_bytes_after: int

    @property
    def bits_per_weight(self) -> float:
        """Of a routed expert, scales included."""
        return 8 * self.bytes_after / self.weights

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-serialisable."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}

    def __str__(self) -> str:
        return (
            f"{self.banks} banks, {self.weights:,} weights: {self.bytes_before / 2**20:.1f} -> "
            f"{self.bytes_after / 2**20:.1f} MiB ({self.bits_per_weight:.3f} bits per weight); whole model "
            f"{self.model_bytes_before / 2**20:.1f} -> {self.model_bytes_after / 2**20:.1f} MiB"
        )


def export_ternary(model: Any, packing: str = "2bit") -> TernaryReport:
    """Replaces the trained experts of a model with `expert_type="ternary"` by packed ones, in place. Outputs stay the
    same; `save_pretrained` then writes the packed bytes, which `from_pretrained` reads (with `hf_moe` imported), and
    `model.dequantize()` makes it trainable again.

    Args:
        model (`PreTrainedModel`): The trained model.
        packing (`str`, defaults to `"2bit"`): `"2bit"`, 2 bits per weight, or `"base3"`, 1.6 and slower to read.

    Returns:
        [`TernaryReport`]

    Raises:
        ValueError: the model has no ternary experts, or they are packed already; an unknown packing.

    Example:

    ```python
    >>> report = export_ternary(model)
    >>> model.save_pretrained("packed")
    ```
    """
    config = MoteQuantizationConfig(packing)
    modules = list(model.modules())
    banks = [module for module in modules if isinstance(module, TernaryExperts)]
    if not banks:
        packed = any(isinstance(module, PackedTernaryExperts) for module in modules)
        state = "they are packed already" if packed else 'build the model with `expert_type="ternary"`'
        raise ValueError(f"`model` ({type(model).__name__}) has no ternary experts in full precision: {state}.")
    parameters = [parameter for bank in banks for parameter in bank.parameters()]
    weights, bytes_before = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    model_bytes = model.get_memory_footprint()
    names = replace_banks(model, lambda bank: PackedTernaryExperts.from_bank(bank, packing))
    packed_bytes = sum(buffer.nbytes for name in names for buffer in model.get_submodule(name).buffers())
    model.hf_quantizer = MoteQuantizer(config, pre_quantized=True)
    model.quantization_method = config.quant_method
    model.is_quantized = True
    model.config.quantization_config = config
    return TernaryReport(len(names), weights, bytes_before, packed_bytes, model_bytes, model.get_memory_footprint())
