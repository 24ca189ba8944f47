"""The last linear map of a feed-forward network with domain adapters, gate and task adapter beside it."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_moe.adapters.core import Bottleneck, CellLayer, Runtime

from .cells import DomainGate, mix
from .config import MixdaConfig
from .sources import DomainSource


__all__ = ["MixdaLayer"]


class MixdaLayer(CellLayer):
    """`o = sum_j w_j(x) K_j(x) + w_n(x) F(x)`, and then `o + T(o)` where there is a task adapter `T`.

    Containers: `expert` (domain adapters by domain name), `gate`, `task`. Shapes: B batch, S sequence, F width of the
    input, D width of the output.
    """

    prefix = "hfmoe_mixda_"
    containers = ("expert", "gate", "task")

    def __init__(self, base_layer: nn.Module, runtime: Runtime | None = None, name: str = ""):
        super().__init__(base_layer, runtime, name)
        base: Any = self.get_base_layer()
        if isinstance(base, Conv1D):
            self.in_features, self.out_features = base.weight.shape
        elif hasattr(base, "in_features") and hasattr(base, "out_features"):
            self.in_features, self.out_features = base.in_features, base.out_features
        else:
            raise ValueError(
                f"`target_modules` must name linear maps, but {name!r} is a {type(base).__name__}. MixDA adapts the "
                "last linear map of a feed-forward network."
            )

    def build(self, adapter_name: str, config: MixdaConfig) -> dict[str, nn.Module]:
        """Makes the cells this layer has: domain adapters and gate, or a task adapter, or all of them."""
        cells: dict[str, nn.Module] = {}
        if config.domains and config.hosts(self.name):
            experts = {domain: self.new_expert(config) for domain in config.domains}
            gate = DomainGate(
                self.in_features,
                config.domains,
                config.gate_hidden or (),
                activation=config.gate_activation,
                pooling=config.gate_pooling,
                mix_form=config.mix_form,
                dropout=config.gate_dropout,
                init_bias=config.gate_init_bias,
                init_weights=config.init_weights,
            )
            gate.enabled = config.in_use
            cells = {"expert": nn.ModuleDict(experts), "gate": gate}
        if config.task_reduction is not None:
            cells["task"] = Bottleneck(
                self.out_features,
                self.out_features,
                max(1, self.out_features // config.task_reduction),
                activation=config.task_activation,
                init_weights=config.init_weights,
            )
        return cells

    def new_expert(self, config: MixdaConfig) -> Bottleneck:
        """A domain adapter for this layer; it gives zeros."""
        return Bottleneck(
            self.in_features,
            self.out_features,
            max(1, self.in_features // config.reduction),
            activation=config.activation,
            init_weights=config.init_weights,
        )

    def adapt(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The mixture of the enabled domains with the base's output, then the task adapter."""
        gate = self.cell("gate", adapter_name)
        if gate is not None and gate.enabled:
            weights = gate(self.gate_input(gate.pooling, x))  # (B, S or 1, n + 1)
            experts = self.cell("expert", adapter_name)
            output = mix(weights, [experts[domain](x) for domain in gate.enabled], output, gate.mix_form)
        task = self.cell("task", adapter_name)
        return output if task is None else output + task(output)

    def gate_input(self, pooling: str, x: torch.Tensor) -> torch.Tensor:
        """What the gate reads: `x`, its mean over the positions that are no padding, or its last position.

        Args:
            pooling (`str`): `"token"`, `"mean"` or `"last"`.
            x (`torch.Tensor` of shape `(B, S, F)`): The input.

        Returns:
            `torch.Tensor` of shape `(B, S, F)` or `(B, 1, F)`.

        Raises:
            ValueError: The mean is asked for and the attention mask has no entry per position.
        """
        if pooling == "token":
            return x
        if x.ndim != 3:
            raise ValueError(
                f"`gate_pooling={pooling!r}` needs inputs with batch and sequence, but {self.name!r} gets the shape "
                f"{tuple(x.shape)}. Use 'token'."
            )
        if pooling == "last":
            return x[:, -1:]
        name, runtime = "attention_mask", self.runtime
        if runtime is not None and "decoder" in self.name.split(".") and f"decoder_{name}" in runtime.parameters:
            name = f"decoder_{name}"
        mask = None if runtime is None else runtime.get(name)
        if mask is None:
            return x.mean(1, keepdim=True)
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"`gate_pooling='mean'` needs a `{name}` of the shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}."
            )
        mask = mask.to(x).unsqueeze(-1)  # (B, S, 1)
        return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1.0)

    @torch.no_grad()
    def load_domain(self, adapter_name: str, source: DomainSource) -> None:
        """Copies the weights of a finished domain adapter.

        Args:
            adapter_name (`str`): The adapter here.
            source ([`DomainSource`]): The file.

        Raises:
            ValueError: It does not fit this layer.
        """
        expert = self.cell("expert", adapter_name)[source.name]
        for name, value in source.check_shapes(self.name, expert).items():
            expert.get_parameter(name).copy_(value)

    @torch.no_grad()
    def load_gate(self, adapter_name: str, source: DomainSource) -> None:
        """Copies the gate that was trained with a domain adapter, if it is of the same form.

        Args:
            adapter_name (`str`): The adapter here.
            source ([`DomainSource`]): The file.
        """
        gate = self.cell("gate", adapter_name)
        tensors = source.find(source.gate, self.name) or {}
        state = gate.state_dict()
        if {name: value.shape for name, value in tensors.items()} == {name: v.shape for name, v in state.items()}:
            gate.load_state_dict(tensors)

    def add_domain(self, adapter_name: str, source: DomainSource, config: MixdaConfig) -> None:
        """Adds a finished domain adapter and its row of the gate.

        Args:
            adapter_name (`str`): The adapter here.
            source ([`DomainSource`]): The file.
            config ([`MixdaConfig`]): The adapter's config, without the new domain.
        """
        experts, gate = self.cell("expert", adapter_name), self.cell("gate", adapter_name)
        device = next(gate.parameters())
        experts[source.name] = self.new_expert(config).to(device)
        gate.add(source.name)
        self.load_domain(adapter_name, source)

    def remove_domain(self, adapter_name: str, domain: str) -> None:
        """Removes a domain adapter and its row of the gate.

        Args:
            adapter_name (`str`): The adapter.
            domain (`str`): The domain.
        """
        del self.cell("expert", adapter_name)[domain]
        self.cell("gate", adapter_name).remove(domain)
