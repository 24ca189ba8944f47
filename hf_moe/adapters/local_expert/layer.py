"""The head of a classifier with a local expert beside it."""

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from hf_moe.adapters.core import CellLayer, Runtime

from .cells import GateCell, LinearExpert, LowRankResidual, MlpExpert, ResidualExpert
from .features import pool


__all__ = ["LocalExpertLayer", "mix"]


def mix(z_global: torch.Tensor, z_local: torch.Tensor, gate: torch.Tensor, kind: str, threshold: Any) -> torch.Tensor:
    """The answer of both experts together.

    Args:
        z_global (`torch.Tensor` of shape `(..., C)`): Logits of the global expert.
        z_local (`torch.Tensor` of shape `(..., C)`): Logits of the local expert.
        gate (`torch.Tensor` of shape `(..., 1)`): Probability that the local expert should answer.
        kind (`str`): `"hard"`, `"soft"` or `"prob"`.
        threshold (`float` or `torch.Tensor`): For `"hard"`.

    Returns:
        `torch.Tensor` of shape `(..., C)`.
    """
    if kind == "hard":
        return torch.where(gate >= threshold, z_local, z_global)
    gate = gate.to(z_local.dtype)
    if kind == "soft":
        return z_global + gate * (z_local - z_global)  # equal logits stay what they are, bit for bit
    p_global, p_local = F.softmax(z_global, dim=-1), F.softmax(z_local, dim=-1)
    mixture = p_global + gate * (p_local - p_global)
    return mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()


class LocalExpertLayer(CellLayer):
    """See [`LocalExpertConfig`]."""

    prefix = "hfmoe_local_expert_"
    containers = ("expert", "gate")
    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module, runtime: Runtime | None = None, name: str = ""):
        super().__init__(base_layer, runtime, name)
        self.configs: dict[str, Any] = {}
        self.merged_deltas: dict[str, list[torch.Tensor | None]] = {}

    def build(self, adapter_name: str, config: Any) -> dict[str, nn.Module]:
        head: Any = self.get_base_layer()
        bias, init = head.bias is not None, config.init_weights
        out_features, in_features = head.weight.shape
        if config.expert == "mlp":
            expert: nn.Module = MlpExpert(in_features, out_features, config.expert_hidden)
        elif config.expert == "linear":
            expert = LinearExpert(head, bias, init)
        elif config.expert_rank is not None:
            expert = LowRankResidual(in_features, out_features, config.expert_rank, bias, init)
        else:
            expert = ResidualExpert(in_features, out_features, bias, init)
        width = config.gate_features or in_features
        self.configs[adapter_name] = config
        return {"expert": expert, "gate": GateCell(width, config.gate_hidden, config.threshold, init)}

    def gate_features(self, adapter_name: str, f: torch.Tensor) -> torch.Tensor:
        """What the adapter's gate reads in this call.

        Args:
            adapter_name (`str`): The adapter.
            f (`torch.Tensor` of shape `(B, D)` or `(B, S, D)`): The head's input.

        Returns:
            `torch.Tensor` of shape `(B, Q)`, or `(B, S, Q)` where the head answers for each position.
        """
        config, runtime = self.configs[adapter_name], self.runtime
        if config.gate_feature_module is None or runtime is None:
            return f
        name = config.gate_feature_module
        if name == "input":
            q = runtime.get("input")
            if not q.is_floating_point():
                raise ValueError(
                    "`gate_feature_module='input'` needs an input of numbers; this model's are token ids."
                )
            return q.flatten(1)
        return pool(runtime.kept_output(name), f, config.gate_pooling, runtime.get("attention_mask"))

    def gate_logit(self, adapter_name: str, q: torch.Tensor) -> torch.Tensor:
        """Logit of the gate `(..., 1)` for features `q` `(..., Q)`."""
        dtype = next(self.cell("gate", adapter_name).parameters()).dtype
        return self.cell("gate", adapter_name)(q.to(dtype))

    def adapt(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        config = self.configs[adapter_name]
        z_local = self.cell("expert", adapter_name)(x, output)
        if self.training and config.stage == "expert":
            return z_local
        gate = self.gate_logit(adapter_name, self.gate_features(adapter_name, x)).sigmoid()
        kind = "soft" if self.training and config.mix == "hard" and config.stage == "joint" else config.mix
        return mix(output, z_local, gate, kind, self.cell("gate", adapter_name).threshold)

    def merge_refusal(self, adapter_name: str) -> str | None:
        expert, gate = self.cell("expert", adapter_name), self.cell("gate", adapter_name)
        if self.configs[adapter_name].mix != "hard" or gate.threshold.item() > 0:
            return "its gate decides by the input (with `mix='hard'` and threshold 0 the local expert always answers)"
        if not hasattr(expert, "delta"):
            return "this kind of local expert is no linear head"
        return super().merge_refusal(adapter_name)

    def delta_weight(self, adapter_name: str) -> torch.Tensor | None:
        expert = self.cell("expert", adapter_name)
        return expert.delta(self.get_base_layer())[0] if hasattr(expert, "delta") else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes the head the local expert, weight and bias; possible where the local expert always answers."""
        head: Any = self.get_base_layer()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        for name in names:
            if (refusal := self.merge_refusal(name)) is not None:
                raise NotImplementedError(f"Adapter {name!r} cannot be merged: {refusal}. Use `unload()`.")
            # Kept for `unmerge`: the difference of a linear expert changes with the head.
            deltas = [
                None if d is None else d.detach().to(head.weight.dtype) for d in self.cell("expert", name).delta(head)
            ]
            if safe_merge and not all(d is None or torch.isfinite(d).all() for d in deltas):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._add(deltas, 1)
            self.merged_deltas[name] = deltas
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Gives the head back to the global expert."""
        while self.merged_adapters:
            self._add(self.merged_deltas.pop(self.merged_adapters.pop()), -1)

    def _add(self, deltas: list[torch.Tensor | None], sign: int) -> None:
        head: Any = self.get_base_layer()
        for parameter, delta in zip((head.weight, head.bias), deltas, strict=True):
            if delta is not None:
                parameter.data.add_(delta, alpha=sign)
