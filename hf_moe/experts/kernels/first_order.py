"""Gradients that refuse to be differentiated, with the way out."""

from typing import Any

import torch


__all__ = ["first_order_only"]


def first_order_only(grads: tuple[torch.Tensor | None, ...], cause: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients which say, when they are differentiated again, that they cannot be.

    Args:
        grads (`tuple`): Gradients, `None` where none was asked for.
        cause (`torch.Tensor`): The incoming gradient.
    """
    if not torch.is_grad_enabled():
        return grads
    return tuple(None if g is None else _FirstOrder.apply(g, cause.detach().requires_grad_()) for g in grads)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, cause: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise RuntimeError(
            '`experts_implementation="hf_moe"` has no second derivative. Call '
            '`model.set_experts_implementation("eager")` for what differentiates gradients.'
        )
