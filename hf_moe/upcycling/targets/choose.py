"""Which target: what the caller asked for, or the first that can hold the recipe."""

import difflib

from transformers import PreTrainedModel
from transformers.utils import logging

from hf_moe.upcycling.plan import UpcyclePlan

from .backbone import backbone_targets
from .base import Target
from .native import native_targets


__all__ = ["choose_target", "list_targets"]

logger = logging.get_logger(__name__)

# Presets with routers or experts of their own: only on request.
ON_REQUEST = ("moe_plus_plus",)


def list_targets() -> list[str]:
    """Names accepted by `target` besides `"auto"`."""
    return [*(t.name for t in (*native_targets(), *backbone_targets())), "generic"]


def choose_target(target: str | Target, model: PreTrainedModel, plan: UpcyclePlan) -> Target:
    """The target writer.

    Args:
        target (`str` or [`Target`]): `"auto"`, a name of [`list_targets`], or a target with settings of its own.
        model (`PreTrainedModel`): Dense model.
        plan ([`UpcyclePlan`]): What it has to hold.

    Returns:
        [`Target`]

    Raises:
        ValueError: unknown name, or a target that cannot hold the plan (the message says why).
        TypeError: neither a string nor a target.
    """
    if isinstance(target, Target):
        return _checked(target, model, plan)
    if not isinstance(target, str):
        raise TypeError(f"`target` must be a string or a Target, got {type(target).__name__}.")
    known = {t.name: t for t in (*native_targets(), *backbone_targets())}
    if target in known:
        return _checked(known[target], model, plan)
    if target == "generic":
        return _checked(_generic(), model, plan)
    if target != "auto":
        near = difflib.get_close_matches(target, list_targets(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`target={target!r}` is not known; use 'auto' or one of {list_targets()}.{hint}")
    source = model.config.model_type
    for candidate in known.values():
        if candidate.name in ON_REQUEST or source not in candidate.source_types:
            continue
        refusal = candidate.refusal(model, plan)
        if refusal is None:
            return candidate
        logger.info(f"Target {candidate.name} does not fit: {refusal}.")
    return _checked(_generic(), model, plan)


def _checked(target: Target, model: PreTrainedModel, plan: UpcyclePlan) -> Target:
    refusal = target.refusal(model, plan)
    if refusal is not None:
        raise ValueError(
            f"`target={target.name!r}` cannot hold this recipe for {type(model).__name__}: {refusal}. "
            'Use `target="auto"`.'
        )
    return target


def _generic() -> Target:
    from .generic import GenericTarget

    return GenericTarget()
