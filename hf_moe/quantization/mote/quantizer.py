"""Loads packed checkpoints through `from_pretrained`, and turns packed models back into trainable ones."""

from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

from hf_moe.experts.ternary import TernaryExperts

from .config import MoteQuantizationConfig
from .experts import PackedTernaryExperts


__all__ = ["MoteQuantizer", "replace_banks"]


def replace_banks(model: Any, make: Any, kind: type = TernaryExperts) -> list[str]:
    """Puts `make(bank)` in the place of every bank of a kind.

    Returns:
        `list[str]`: Names of the replaced modules.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    for name, module in found:
        model.set_submodule(name, make(module))
    return [name for name, _ in found]


class MoteQuantizer(HfQuantizer):
    """transformers' side of [`~hf_moe.export_ternary`]: packed banks before the weights are read, and `dequantize`.

    Raises:
        ValueError: asked to quantise a checkpoint while loading it: rounding is part of training here; or a checkpoint
            that lacks some of the packed tensors, which would otherwise be whatever was in memory.
    """

    quantization_config: MoteQuantizationConfig

    def __init__(self, quantization_config: MoteQuantizationConfig, **kwargs: Any):
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                "`quantization_config=MoteQuantizationConfig(...)` cannot round weights while they are loaded: load "
                'the model without it, train it with `expert_type="ternary"` and call `hf_moe.export_ternary(model)`.'
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        packing = self.quantization_config.packing
        with torch.device("meta"):
            names = replace_banks(model, lambda bank: PackedTernaryExperts.like(bank, packing))
        if not names:
            found = getattr(model.config.get_text_config(), "expert_type", None)
            raise ValueError(
                f"`quantization_config` says that the experts of this {type(model).__name__} are packed ternary ones, "
                f"but its config has `expert_type={found!r}` instead of 'ternary'."
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        tensors = model.state_dict(keep_vars=True)
        read = {name for name, tensor in tensors.items() if getattr(tensor, "_is_hf_initialized", False)}
        if not read:  # nothing says what came from the files
            return
        banks = [name for name, module in model.named_modules() if isinstance(module, PackedTernaryExperts)]
        missing = [n for bank in banks for n in tensors if n.startswith(f"{bank}.") and n not in read]
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of packed experts, {missing[0]!r} among them: a file is "
                "missing, cut or changed. Copy the checkpoint again, or export the model again with "
                "`hf_moe.export_ternary`."
            )

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        def latent_bank(packed: PackedTernaryExperts) -> TernaryExperts:
            with torch.device("meta"):
                bank = TernaryExperts(packed.config)
            pairs = [packed.latent(e) for e in range(packed.num_experts)]
            bank.gate_up_proj = torch.nn.Parameter(torch.stack([up for up, _ in pairs]))
            bank.down_proj = torch.nn.Parameter(torch.stack([down for _, down in pairs]))
            return bank.train(packed.training)

        replace_banks(model, latent_bank, PackedTernaryExperts)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
