"""What the kernels need to know about an experts module: its matrices, their layout, and what happens between them.

Shapes: N experts, D hidden, I intermediate, W = 2I for gated experts and I for plain ones.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from .epilogue import Epilogue, callable_epilogue, known_epilogue


__all__ = ["ExpertBank", "read_bank"]


class ExpertBank(NamedTuple):
    """The contract's flags and parameters, read once per call.

    Args:
        up (`torch.Tensor` of shape `(N, W, D)`, or `(N, D, W)` if transposed): First projection.
        up_bias (`torch.Tensor` of shape `(N, W)`, *optional*): Its bias.
        down (`torch.Tensor` of shape `(N, D, I)`, or `(N, I, D)` if transposed): Second projection.
        down_bias (`torch.Tensor` of shape `(N, D)`, *optional*): Its bias.
        is_transposed (`bool`): Layout of both.
        epilogue ([`Epilogue`], *optional*): What lies between the projections; `None` where it has parameters of its
            own, so that autograd must see it.
        norm (`torch.nn.Module`, *optional*): Norm after each expert.
    """

    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    is_transposed: bool
    epilogue: Epilogue | None
    norm: nn.Module | None

    @property
    def parameters(self) -> tuple[Any, ...]:
        """`(up, up_bias, down, down_bias)`."""
        return self.up, self.up_bias, self.down, self.down_bias

    def require_epilogue(self) -> Epilogue:
        """`epilogue`.

        Raises:
            ValueError: There is none.
        """
        if self.epilogue is None:
            raise ValueError("`bank.epilogue` must not be `None`: a gate with parameters needs `composed_experts`.")
        return self.epilogue

    @property
    def num_experts(self) -> int:
        """N."""
        return self.up.shape[0]

    @property
    def is_plain(self) -> bool:
        """Whether every parameter is an ordinary dense tensor of one floating dtype on one device."""
        present = [p for p in self.parameters if p is not None]
        return all(
            type(p) in (torch.Tensor, nn.Parameter)
            and p.layout == torch.strided
            and p.is_floating_point()
            and p.dtype.itemsize >= 2
            and p.dtype == self.up.dtype
            and p.device == self.up.device
            for p in present
        )


def read_bank(experts: Any) -> ExpertBank:
    """Reads a module decorated with `use_experts_implementation`.

    Args:
        experts (`torch.nn.Module`): The experts module of one layer.

    Returns:
        [`ExpertBank`]
    """
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    return ExpertBank(
        up=getattr(experts, name),
        up_bias=getattr(experts, f"{name}_bias") if experts.has_bias else None,
        down=experts.down_proj,
        down_bias=experts.down_proj_bias if experts.has_bias else None,
        is_transposed=experts.is_transposed,
        epilogue=None if experts.has_post_expert_norm else _epilogue(experts),
        norm=experts.post_expert_norm if experts.has_post_expert_norm else None,
    )


def _epilogue(experts: Any) -> Epilogue | None:
    from transformers.integrations.moe import _default_apply_gate  # here: importing the registry imports our front

    activation: Any = getattr(experts, "act_fn", None)
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        return None
    if not experts.has_gate:
        return known_epilogue(activation, gated=False) or callable_epilogue(activation)
    if type(experts)._apply_gate is _default_apply_gate and "_apply_gate" not in vars(experts):
        known = known_epilogue(activation, gated=True)
        if known is not None:
            return known
    return callable_epilogue(experts._apply_gate)
