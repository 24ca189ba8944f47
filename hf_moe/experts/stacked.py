"""Feed-forward experts stacked in 3-D parameters, on transformers' experts contract.

`experts(hidden_states (T, D), top_k_index (T, K), top_k_weights (T, K)) -> (T, D)`; a slot whose index equals the
number of experts is empty. Any registered implementation (`experts_implementation=`) can run them.

Shapes: T tokens, D hidden, I intermediate, N experts, K per token.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .registry import register_experts


__all__ = ["BiasedMlpExperts", "BiasedSwiGLUExperts", "MlpExperts", "StackedExperts", "SwiGLUExperts", "sort_slots"]


def sort_slots(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The slots expert by expert, empty ones last.

    Args:
        top_k_index (`torch.Tensor` of shape `(T, K)`): Experts; N marks an empty slot.
        num_experts (`int`): N.

    Returns:
        `token, order` of shape `(T K,)`: the token of each slot in this order, and the slot itself; and where the
        slots of each expert end.
    """
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    ends = torch.searchsorted(expert, torch.arange(num_experts, device=expert.device), right=True)
    return order // top_k_index.shape[-1], order, ends.tolist()


class StackedExperts(nn.Module):
    """Base of the banks: `N` experts of one kind in parameters whose first axis is the expert.

    Args:
        config: A model config with `num_experts` (N), `hidden_size` (D), `moe_intermediate_size` (I),
            `expert_activation` and `initializer_range`.
    """

    expert_type: str = ""
    gated = True
    biased = False

    def __init__(self, config: Any):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.initializer_range = config.initializer_range
        self.act_fn = ACT2FN[config.expert_activation]
        if getattr(config, "expert_dropout", 0.0):
            self.act_fn = nn.Sequential(self.act_fn, nn.Dropout(config.expert_dropout))
        up_width = (2 if self.gated else 1) * self.intermediate_dim
        up_name = "gate_up_proj" if self.gated else "up_proj"
        self.register_parameter(up_name, self._parameter(up_width, self.hidden_dim))
        self.down_proj = self._parameter(self.hidden_dim, self.intermediate_dim)
        if self.biased:
            self.register_parameter(f"{up_name}_bias", self._parameter(up_width))
            self.down_proj_bias = self._parameter(self.hidden_dim)
        self.reset_parameters()

    @classmethod
    def validate_options(cls, options: dict[str, Any]) -> None:
        """Checks `config.expert_config` when a config is constructed. A bank with options overrides this.

        Raises:
            ValueError: an option the bank does not know, or a value it refuses.
        """
        if options:
            raise ValueError(
                f"`expert_config` has {sorted(options)}, but `expert_type={cls.expert_type!r}` takes no options."
            )

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.num_experts, *shape))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """y_t = sum over the slots of t of w * E_e(x_t), computed expert by expert; empty slots cost nothing.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): Tokens.
            top_k_index (`torch.Tensor` of shape `(T, K)`): Experts; N marks an empty slot.
            top_k_weights (`torch.Tensor` of shape `(T, K)`): Weights, 0 on empty slots.

        Returns:
            `torch.Tensor` of shape `(T, D)`.
        """
        token, order, ends = sort_slots(top_k_index, self.num_experts)
        weight = top_k_weights.reshape(-1)[order]
        output = torch.zeros_like(hidden_states)
        # Views made by one `unbind` share one backward; indexing in the loop would add a full gradient per expert.
        parameters = [None if p is None else p.unbind(0) for p in self._stacked()]
        start = 0
        for e, end in enumerate(ends):
            if end > start:
                rows = token[start:end]
                up, up_bias, down, down_bias = (None if p is None else p[e] for p in parameters)
                state = F.linear(hidden_states[rows], up, up_bias)
                state = self._apply_gate(state) if self.gated else self.act_fn(state)
                state = F.linear(state, down, down_bias) * weight[start:end, None]
                output.index_add_(0, rows, state.to(output.dtype))
            start = end
        if start == 0 and torch.is_grad_enabled():
            # Nothing was routed: keep experts and router in the graph, else DDP and FSDP see unused parameters.
            touched = sum(p.flatten()[0] for p in self.parameters()) + top_k_weights.sum()
            output = output + (0.0 * touched).to(output.dtype)
        return output

    def _stacked(self) -> tuple:
        up_name = "gate_up_proj" if self.gated else "up_proj"
        up_bias = getattr(self, f"{up_name}_bias", None)
        return getattr(self, up_name), up_bias, self.down_proj, getattr(self, "down_proj_bias", None)

    def reset_parameters(self) -> None:
        """Initial values, through `transformers.initialization` so that loaded values are kept."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=self.initializer_range)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"


class _EmptySlots(StackedExperts):
    """Mixed in first: lets transformers' batched_mm and grouped_mm work where slots are empty.

    They mask the empty-slot index only where `_is_expert_parallel` is set (the decorator resets it in `__init__`, and
    expert parallelism sets it again); without it batched_mm raises and grouped_mm reads uninitialised rows. But the
    masks, and the empty rows they leave in every pass but the products, cost a tenth of the time on a CPU. There,
    where asking which slots are active does not wait for a device, only those are handed on.
    """

    config: Any  # set by the decorator

    def __init__(self, config: Any):
        super().__init__(config)
        self._is_expert_parallel = True

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        forward = super().forward
        masks = self.config._experts_implementation in ("batched_mm", "grouped_mm")  # others pass over empty slots
        if not masks or hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
            return forward(hidden_states, top_k_index, top_k_weights)
        slot = torch.nonzero(top_k_index.reshape(-1) < self.num_experts).squeeze(-1)  # (A,) active ones of T * K
        if slot.numel() == 0:
            return forward(hidden_states, top_k_index, top_k_weights)
        filled = _Filled(self)
        if slot.numel() == top_k_index.numel():
            return forward.__func__(filled, hidden_states, top_k_index, top_k_weights)
        token = slot // top_k_index.shape[-1]
        index, weights = top_k_index.reshape(-1)[slot], top_k_weights.reshape(-1)[slot]
        output = forward.__func__(filled, hidden_states[token], index.unsqueeze(-1), weights.unsqueeze(-1))  # (A, D)
        return torch.zeros_like(hidden_states).index_add_(0, token, output.to(hidden_states.dtype))


class _Filled:
    """A bank as implementations see it in a call without empty slots: the same in everything but the flag."""

    _is_expert_parallel = False

    def __init__(self, bank: nn.Module):
        self._bank = bank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bank, name)


@use_experts_implementation
class _SwiGLU(StackedExperts):
    pass


@use_experts_implementation(has_bias=True)
class _BiasedSwiGLU(StackedExperts):
    biased = True


@use_experts_implementation(has_gate=False)
class _Mlp(StackedExperts):
    gated = False


@use_experts_implementation(has_gate=False, has_bias=True)
class _BiasedMlp(StackedExperts):
    gated, biased = False, True


@register_experts("swiglu")
class SwiGLUExperts(_EmptySlots, _SwiGLU):
    """E(x) = W_d (act(W_g x) * W_u x), no biases: Llama, Mistral, Qwen (`gate_up_proj` (N, 2I, D) = [W_g; W_u])."""


@register_experts("swiglu_bias")
class BiasedSwiGLUExperts(_EmptySlots, _BiasedSwiGLU):
    """Gated experts with biases (Llama with `mlp_bias=True`)."""


@register_experts("mlp")
class MlpExperts(_EmptySlots, _Mlp):
    """E(x) = W_d act(W_u x), no biases (`up_proj` (N, I, D))."""


@register_experts("mlp_bias")
class BiasedMlpExperts(_EmptySlots, _BiasedMlp):
    """E(x) = W_d act(W_u x + b_u) + b_d: GPT-2, with GELU."""
