"""Training of ternary experts: only routers and routed experts, without weight decay."""

from typing import Any

from torch import nn

from hf_moe.experts.ternary import TernaryExperts
from hf_moe.routing import BaseRouter
from hf_moe.views import unwrap_model

from .moe_trainer import MoeTrainer


__all__ = ["MoteTrainer", "train_only_experts"]


def train_only_experts(model: nn.Module) -> int:
    """Leaves gradients to the routers and the ternary experts alone: the dense feed-forward stays what it was.

    Args:
        model (`PreTrainedModel`): A model with `expert_type="ternary"`.

    Returns:
        `int`: Number of trainable parameters.

    Raises:
        ValueError: there are no ternary experts in full precision.
    """
    modules = [m for m in unwrap_model(model).modules() if isinstance(m, (TernaryExperts, BaseRouter))]
    if not any(isinstance(module, TernaryExperts) for module in modules):
        raise ValueError(
            f"`model` ({type(model).__name__}) has no ternary experts to train. Make it with `hf_moe.upcycle_mote`, "
            'or with `expert_type="ternary"`; a packed one becomes trainable by `model.dequantize()`.'
        )
    # A router may keep some of its parameters as they are (`fixed_random`).
    trained = [p for m in modules for p in m.parameters() if p.requires_grad or isinstance(m, TernaryExperts)]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return sum(parameter.numel() for parameter in trained)


class MoteTrainer(MoeTrainer):
    """[`MoeTrainer`] for the last stage of [MoTE](https://huggingface.co/papers/2506.14435): freezes everything but
    routers and ternary experts before the optimizer is made, and keeps weight decay from the experts, whose scale
    is the mean of their weights.

    Args:
        model (`PreTrainedModel`): A model with ternary experts, such as [`~hf_moe.upcycle_mote`] makes.
        *args, **kwargs: As in [`MoeTrainer`].

    Raises:
        ValueError: the model has no ternary experts in full precision.
    """

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any):
        if model is not None:
            train_only_experts(model)
        super().__init__(model, *args, **kwargs)
        if model is None:  # made by `model_init`
            train_only_experts(self.model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay: none of a ternary bank."""
        banks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, TernaryExperts))
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith(banks)]
