"""MoTE: the dense feed-forward stays as shared expert, beside routed experts that are trained to be ternary."""

from typing import Any

from transformers import PreTrainedModel

from .builders.copy import Copy
from .recipe import upcycle
from .report import UpcycleReport


__all__ = ["upcycle_mote"]


def upcycle_mote(
    model: PreTrainedModel | str,
    *,
    num_experts: int = 4,
    top_k: int = 1,
    init_output_scale: float = 1.0,
    activation_bits: int | None = 8,
    weight_scale: str = "matrix",
    **options: Any,
) -> tuple[PreTrainedModel, UpcycleReport]:
    r"""y = F(x) + \sum_{e \in S} p_e E_e(x): F the dense feed-forward, E_e ternary experts that start from its
    weights, p the softmax over all experts, not renormalised ([MoTE](https://huggingface.co/papers/2506.14435), Sec.
    3; that routed outputs are weighted by p is our reading: renormalised top-1 weights give the router no gradient).

    Train the result with [`~hf_moe.trainers.MoteTrainer`], which leaves everything but routers and routed experts as
    it is, and pack it with [`~hf_moe.export_ternary`].

    Args:
        model (`PreTrainedModel` or `str`): Dense model, Hub id or folder; of a family with a backbone of this package.
        num_experts (`int`, defaults to 4): Ternary experts per layer, N.
        top_k (`int`, defaults to 1): Experts each token is sent to, K.
        init_output_scale (`float`, defaults to 1.0): Factor on what the routed experts start with. The output of the
            dense model jumps by p_e E_e(x); 0 starts from the dense model exactly.
        activation_bits (`int`, *optional*, defaults to 8): Bits of the experts' inputs; `None` leaves them alone.
        weight_scale (`str`, defaults to `"matrix"`): What shares a scale: `"matrix"` or `"row"`.
        **options: Further arguments of [`upcycle`], such as `layers`, `calibration` or `router_aux_loss_coef`.

    Returns:
        `tuple[PreTrainedModel, UpcycleReport]`: As [`upcycle`].

    Raises:
        ValueError: `init_output_scale` is negative, or what [`upcycle`] refuses.

    Example:

    ```python
    >>> moe, report = upcycle_mote("HuggingFaceTB/SmolLM2-135M-Instruct", num_experts=4)
    ```
    """
    if not 0 <= init_output_scale < float("inf"):
        raise ValueError(f"`init_output_scale` must be at least 0 and finite, got {init_output_scale}.")
    return upcycle(
        model,
        num_experts=num_experts,
        top_k=top_k,
        experts=Copy(),
        shared="dense",
        weights="softmax",
        scale=init_output_scale or "auto",
        expert_type="ternary",
        expert_config={"scale": weight_scale, "activation_bits": activation_bits},
        **options,
    )
