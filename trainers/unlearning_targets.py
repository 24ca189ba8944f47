"""Which experts unlearn, and what of the model trains."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from hf_moe.attribution import ExpertScores, attribute_experts, pad_token_rows
from hf_moe.views import moe_layers, unwrap_model

from .unlearning_anchor import has_constant_weights
from .unlearning_data import TokenRows


__all__ = ["anchor_kind", "choose_targets", "freeze_routers", "slice_adapter"]


def slice_adapter(model: nn.Module) -> Any:
    """The config of the model's active expert-slice adapter, or `None`."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return None
    config = configs.get(getattr(model, "active_adapter", None))
    return config if config is not None and hasattr(config, "train_router") else None


def choose_targets(
    model: nn.Module, args: Any, forget: TokenRows, scores: ExpertScores | None, pad_token_id: int
) -> tuple[dict[str, list[int]], ExpertScores | None]:
    """The target experts by layer name: those given, or the best by attribution.

    Args:
        model (`nn.Module`): The model, as it is before unlearning.
        args ([`ExpertUnlearningConfig`]): With `target_experts`, `num_target_experts`, `target_same_layer`.
        forget ([`TokenRows`]): What to attribute.
        scores ([`~hf_moe.attribution.ExpertScores`], *optional*): Attribution that was made before.
        pad_token_id (`int`): Filler.

    Returns:
        `tuple`: Targets; scores, if there are any.

    Raises:
        ValueError: there is no such expert, or there are not that many.
    """
    from hf_moe.adapters.expert_slice import ExpertSliceConfig
    from hf_moe.adapters.expert_slice.model import resolve_layers

    moe_layers(model)  # says what is wrong with a model that has none
    if args.target_experts is not None:
        layers = ExpertSliceConfig(layers=args.target_experts).layers
    else:
        check_number(model, args)
        if scores is None:
            # Without shuffling, so that every process comes to the same result.
            loader = DataLoader(
                forget, args.eval_batch_size, collate_fn=lambda rows: pad_token_rows(rows, pad_token_id)
            )
            scores = attribute_experts(model, loader, args.attribution_tokens, show_progress=not args.disable_tqdm)
        layers = scores.targets(args.num_target_experts, same_layer=args.target_same_layer)
    return {view.name: experts for view, experts in resolve_layers(model, layers)}, scores


def check_number(model: nn.Module, args: Any) -> None:
    """Raises before attribution, which takes a while, where there are too few experts for it."""
    counts = [view.num_computing_experts for view in moe_layers(model)]
    limit = min(counts) if args.target_same_layer else sum(counts)
    if args.num_target_experts > limit:
        where = "in a layer" if args.target_same_layer else "in all layers"
        raise ValueError(
            f"`num_target_experts` must be at most the number of experts {where} ({limit}), got "
            f"{args.num_target_experts}."
        )


def anchor_kind(model: nn.Module, targets: dict[str, list[int]], args: Any, batch: dict[str, torch.Tensor]) -> str:
    """What the anchor is computed from: `"weights"` or `"probs"`.

    Args:
        model (`nn.Module`): The model.
        targets (`dict[str, list[int]]`): Target experts by layer name.
        args ([`ExpertUnlearningConfig`]): With `anchor_on`.
        batch (`dict[str, torch.Tensor]`): A batch to look at the weights with.

    Returns:
        `str`

    Raises:
        ValueError: `anchor_on="weights"` where they are constant.
    """
    if args.anchor_on == "probs":
        return "probs"
    views = [view for view in moe_layers(model) if view.name in targets]
    constant = [view.name for view in views if has_constant_weights(unwrap_model(model), view, batch)]
    if not constant:
        return "weights"
    if args.anchor_on == "weights":
        raise ValueError(
            f"`anchor_on='weights'` has gradient 0 in {constant[0]!r}: tokens go to one expert with a renormalised "
            "weight, which is constant. Use `anchor_on='probs'` (or 'auto')."
        )
    return "probs"


def freeze_routers(model: nn.Module) -> None:
    """Lets all parameters train but those of routers."""
    model.requires_grad_(True)
    for view in moe_layers(model):
        view.router.requires_grad_(False)
