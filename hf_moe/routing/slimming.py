"""Running a model with another number of experts per token than it was built with.

Shapes: N experts, K per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .discovery import find_routers
from .variable import VariableRouter


__all__ = ["num_experts_per_tok", "set_num_experts_per_tok"]


def set_num_experts_per_tok(model: nn.Module, k: int) -> None:
    """Has every router choose `k` experts from now on. (A change of `config.num_experts_per_tok` reaches no model that
    is built.)

    For models of hf_moe; on any other, [`~hf_moe.routing_override`] with `top_m=k` does it for the length of a block.
    The config is changed too, so that a saved model keeps it.

    Args:
        model (`nn.Module`): Its routers choose a fixed number (`softmax_topk`, `sigmoid_topk`, ...), or one that may
            change (`fixed_random`: SMoE-Dropout, [2303.01610](https://huggingface.co/papers/2303.01610), Sec. 3.3).
        k (`int`): Experts per token.

    Raises:
        ValueError: the model has no router of ours, a router decides the number itself, or has fewer experts or slots.
            Nothing is changed then.

    Example:

    ```python
    >>> set_num_experts_per_tok(model, 8)
    ```
    """
    routers: list[Any] = list(find_routers(model).values())
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no router of hf_moe. Use `hf_moe.routing_override(model, top_m=k)` on others."
        )
    for router in routers:
        if not _has_k(router):
            raise ValueError(
                f"`router_type={router.router_type!r}` does not choose a fixed number of experts: `k` cannot be set."
            )
        most = router.max_experts if isinstance(router, VariableRouter) else router.num_experts
        if not 1 <= k <= most:
            raise ValueError(f"`k` must be between 1 and {most}, the most experts a token may get, got {k}.")
    for router in routers:
        _set_k(router, k)
    config = getattr(model, "config", None)
    if config is not None:
        config.get_text_config().num_experts_per_tok = k


@contextmanager
def num_experts_per_tok(model: nn.Module, k: int) -> Iterator[Any]:
    """[`set_num_experts_per_tok`] for the length of a block; afterwards everything is as it was.

    Args:
        model (`nn.Module`): As there.
        k (`int`): Experts per token.

    Yields:
        `nn.Module`: The model.

    Raises:
        ValueError: as there.

    Example:

    ```python
    >>> for k in (1, 2, 4, 8):
    ...     with num_experts_per_tok(model, k):
    ...         model.generate(ids)
    ```
    """
    routers: list[Any] = list(find_routers(model).values())
    before = [int(router.k) if hasattr(router, "k") else router.top_k for router in routers]
    config = getattr(model, "config", None)
    configured = None if config is None else config.get_text_config().num_experts_per_tok
    set_num_experts_per_tok(model, k)
    try:
        yield model
    finally:
        for router, value in zip(routers, before, strict=True):
            _set_k(router, value)
        if config is not None:
            config.get_text_config().num_experts_per_tok = configured


def _has_k(router: Any) -> bool:
    own = isinstance(router, VariableRouter) or router.has_trees or hasattr(router, "table")
    return hasattr(router, "k") or not own


@torch.no_grad()
def _set_k(router: Any, k: int) -> None:
    if hasattr(router, "k"):
        router.k.fill_(k)
    else:
        router.top_k = k
