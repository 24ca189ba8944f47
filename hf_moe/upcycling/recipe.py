"""`upcycle`: a dense model in, a Mixture-of-Experts and a report out."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .builders.base import ExpertBuilder
from .builders.copy import Copy
from .exactness import Exactness
from .feed_forward import FeedForwardSite, count_layers, extract_feed_forward, locate_feed_forwards
from .plan import UpcycledLayer, UpcyclePlan, build_layer
from .probes import complete, probe_batch, vocabulary
from .report import MeasuredGap, UpcycleReport, count_parameters, measure_gap
from .router_init.base import RouterInit
from .sources import load_source, source_name
from .statistics import LayerStatistics, calibration_batches, collect_statistics
from .targets.base import Target
from .targets.choose import choose_target
from .weight_rules import WeightRule, resolve_weight_rule


__all__ = ["make_plan", "make_report", "resolve_choices", "upcycle"]

logger = logging.get_logger(__name__)

#: Calibration batches the check runs on, at most.
MAX_CHECK_BATCHES = 4


def upcycle(
    model: PreTrainedModel | str,
    *,
    num_experts: int,
    top_k: int,
    layers: str | list[int] = "all",
    experts: ExpertBuilder | None = None,
    shared: str | float | None = None,
    router: RouterInit | str = "auto",
    weights: str | WeightRule = "renormalise",
    scale: str | float = "auto",
    target: str | Target = "auto",
    calibration: Any = None,
    tokenizer: Any = None,
    check: bool = True,
    seed: int = 0,
    **config_overrides,
) -> tuple[PreTrainedModel, UpcycleReport]:
    """Turns a dense model into a Mixture-of-Experts. The dense model is left as it is.

    Args:
        model (`PreTrainedModel` or `str`): Dense model, Hub id or folder.
        num_experts (`int`): Experts per MoE layer, N.
        top_k (`int`): Experts each token is sent to, K.
        layers (`str` or `list[int]`, defaults to `"all"`): `"all"`, `"every:m"`, `"first_half"`, `"second_half"`,
            indices, or a regular expression for module paths; see [`locate_feed_forwards`].
        experts ([`ExpertBuilder`], *optional*): How experts are made; copies by default.
        shared (`str` or `float`, *optional*): `"dense"`: the dense feed-forward stays as shared expert and the routed
            ones start at zero; `"residual"`: it stays as a weighted branch (PR-MoE); a number: this share of its
            channels becomes a shared expert (the most important ones with `calibration`, else random ones).
        router ([`RouterInit`] or `"auto"`): How routers start; `Normal(0.02)` unless the builder needs another one.
        weights (`str`, defaults to `"renormalise"`): `"renormalise"`, `"softmax"` or `"sigmoid"`, see [`WeightRule`].
        scale (`str` or `float`, defaults to `"auto"`): Factor on the experts' outputs; `"auto"` is the one that
            preserves the function, or the mean size of the output where nothing does. A number together with
            `shared="dense"` keeps the routed experts beside the dense one instead of silencing them.
        target (`str` or [`Target`], defaults to `"auto"`): `"auto"` takes a MoE family of transformers where one
            fits, else a backbone of this package, else generic classes. Or a name of `list_targets()`.
        calibration (*optional*): Texts, token ids or model inputs, for recipes that look at data, and for the check.
        tokenizer (*optional*): For texts in `calibration` and `Prompts`; the model's own by default.
        check (`bool`, defaults to `True`): Run both models and report the largest difference of their logits.
        seed (`int`, defaults to 0): Seed of everything random.
        **config_overrides: Fields of the result's config, e.g. `router_aux_loss_coef=0.001`.

    Returns:
        `tuple[PreTrainedModel, UpcycleReport]`: The MoE in evaluation mode, and what is known about it.

    Raises:
        ValueError: what cannot work, with the argument, its value and the fix.
        TypeError: an argument of the wrong type.

    Example:

    ```python
    >>> moe, report = upcycle("HuggingFaceTB/SmolLM2-135M-Instruct", num_experts=4, top_k=2)
    >>> print(report)
    ```
    """
    choices = resolve_choices(num_experts, top_k, experts, shared, router, weights, scale, seed)
    name = source_name(model)
    model = load_source(model)
    sites = locate_feed_forwards(model, layers)
    plan = make_plan(model, sites, name, overrides=config_overrides, **choices)
    writer = choose_target(target, model, plan)
    config = writer.config(model.config, plan)  # refuses wrong overrides before the long part

    tokenizer = tokenizer if tokenizer is not None else _find_tokenizer(model, calibration, plan.router)
    batches = None
    if calibration is not None:
        batches = [complete(model, batch) for batch in calibration_batches(calibration, tokenizer)]
    if batches is None and (check or writer.needs) and vocabulary(model) is None:
        raise ValueError(
            f"{type(model).__name__} does not read tokens, so there are no random ones to try it on: pass "
            "`calibration` (a list of model inputs), or `check=False`."
        )
    plan = _prepared(plan, model, sites, tokenizer)
    stats = _statistics(plan, writer, model, sites, batches)
    done: list[UpcycledLayer] = []
    moe = writer.build(model, config, plan, _layers(plan, writer, config, sites, stats, done))
    if _grouped_mm_refuses(plan, moe.dtype):
        moe.set_experts_implementation("eager")
    # Preparing may have shown more (identical fine-tunes) than could be known before.
    exactness = writer.exactness(config, plan)
    moe.config.upcycling = {**plan.provenance(exactness), "target": writer.name}

    gap = None
    if check:
        tokens = "calibration" if batches else "random"
        # Another seed than calibration on random tokens had: a check on the very tokens would prove nothing.
        batches = batches or [probe_batch(model, seed + 1)]
        gap = measure_gap(model, moe, batches[:MAX_CHECK_BATCHES], tokens)
        moe.config.upcycling["max_difference"] = gap.max_difference
        if exactness.exact and not gap.is_rounding:
            logger.warning(
                f"The recipe should preserve the dense model, but the {gap.output} differ by {gap.max_difference:.3g} "
                f"(largest {gap.largest:.3g}, {gap.dtype}). Please report this with the config of the source."
            )
    return moe, make_report(plan, writer, exactness, model, moe, done, gap)


def resolve_choices(
    num_experts: int,
    top_k: int,
    experts: ExpertBuilder | None = None,
    shared: str | float | None = None,
    router: RouterInit | str = "auto",
    weights: str | WeightRule = "renormalise",
    scale: str | float = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Checks the arguments of [`upcycle`] that need no model, and fills in their defaults.

    Returns:
        `dict`: Arguments of [`make_plan`].

    Raises:
        ValueError: what cannot work, with the argument, its value and the fix.
        TypeError: an argument of the wrong type.
    """
    _check_numbers(num_experts, top_k, scale, shared, seed)
    experts = Copy() if experts is None else experts
    if not isinstance(experts, ExpertBuilder):
        raise TypeError(f"`experts` must be an expert builder such as Copy(), got {experts!r}{_call_hint(experts)}.")
    router = experts.default_router() if isinstance(router, str) and router == "auto" else router
    if not isinstance(router, RouterInit):
        raise TypeError(
            f"`router` must be 'auto' or a router start such as Normal(0.02), got {router!r}{_call_hint(router)}."
        )
    rule = resolve_weight_rule(weights)
    experts.validate(num_experts, top_k)
    router.validate(num_experts, top_k)
    return {
        "num_experts": num_experts,
        "top_k": top_k,
        "experts": experts,
        "shared": shared,
        "router": router,
        "rule": rule,
        "scale": scale,
        "seed": seed,
    }


def make_report(
    plan: UpcyclePlan,
    writer: Target,
    exactness: Exactness,
    model: PreTrainedModel,
    moe: PreTrainedModel,
    done: list[UpcycledLayer],
    gap: MeasuredGap | None,
) -> UpcycleReport:
    """The report of one run. Of the models only the shapes of their parameters are read."""
    parameters, num_bytes = count_parameters(moe)
    idle = (plan.num_experts - min(plan.top_k, plan.num_experts)) * plan.expert_parameters * len(done)
    provenance = plan.provenance(exactness)
    return UpcycleReport(
        source=plan.source,
        target=writer.name,
        architecture=type(moe).__name__,
        num_experts=plan.num_experts,
        num_experts_per_tok=plan.top_k,
        num_layers=plan.num_layers,
        predicted_exact=exactness.exact,
        reason=exactness.reason,
        scale=exactness.scale,
        recipe={key: provenance[key] for key in ("experts", "router", "shared", "weights")},
        seed=plan.seed,
        dense_parameters=count_parameters(model)[0],
        parameters=parameters,
        active_parameters=parameters - idle,
        num_bytes=num_bytes,
        measured=gap,
        layers=[
            {"layer": la.layer_idx, "module": la.name, "expert_width": plan.expert_width, "scale": la.scale}
            for la in done
        ],
    )


def make_plan(
    model: PreTrainedModel,
    sites: list[FeedForwardSite],
    source: str,
    *,
    num_experts: int,
    top_k: int,
    experts: ExpertBuilder,
    shared: str | float | None,
    router: RouterInit,
    rule: WeightRule,
    scale: str | float,
    seed: int,
    overrides: dict[str, Any],
) -> UpcyclePlan:
    """Collects the decisions and checks that the sizes work out. Only shapes of `model` are read.

    Raises:
        ValueError: feed-forwards of different shapes, or a width that the recipe cannot divide.
    """
    forms = [extract_feed_forward(site.module, verify=False) for site in sites]
    shapes = {tuple((name, tuple(t.shape)) for name, t in form.tensors().items()) for form in forms}
    if len(shapes) > 1:
        raise ValueError(
            f"The selected feed-forwards of {type(model).__name__} differ in shape; select layers of one shape with "
            "`layers`."
        )
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    plan = UpcyclePlan(
        source=source,
        source_config=model.config,
        num_layers=count_layers(model, sites),
        layers=tuple(site.layer_idx for site in sites),
        modules=tuple(site.name.removeprefix(prefix) for site in sites),
        form=forms[0].map(lambda t: t.to("meta")),
        num_experts=num_experts,
        top_k=top_k,
        experts=experts,
        shared=shared,
        router=router,
        rule=rule,
        scale=scale,
        seed=seed,
        overrides=overrides,
    )
    if plan.split_share is not None and not 0 < plan.shared_width < plan.form.intermediate_size:
        raise ValueError(
            f"`shared={shared}` leaves {plan.shared_width} of {plan.form.intermediate_size} channels to the shared "
            "expert; both parts need at least one."
        )
    refusal = _grouped_mm_refuses(plan, model.dtype)
    if refusal:
        logger.warning(
            f'{refusal}, which `experts_implementation="grouped_mm"` (the default) refuses. The result runs with '
            '"eager"; '
            'load it with `experts_implementation="eager"` too.'
        )
    return plan


def _grouped_mm_refuses(plan: UpcyclePlan, dtype: torch.dtype) -> str:
    """What the default experts implementation cannot run, as half a sentence; empty where it can."""
    name = str(dtype).removeprefix("torch.")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"The experts are in {name}"
    if plan.expert_width * dtype.itemsize % 16 or plan.form.hidden_size * dtype.itemsize % 16:
        sizes = f"{plan.expert_width} (hidden size {plan.form.hidden_size})"
        return f"Experts of width {sizes} in {name} are not multiples of 16 bytes"
    return ""


def _check_numbers(num_experts: Any, top_k: Any, scale: Any, shared: Any, seed: Any) -> None:
    for name, value in (("num_experts", num_experts), ("top_k", top_k), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be a whole number, got {value!r}.")
    if num_experts < 1:
        raise ValueError(f"`num_experts` must be at least 1, got {num_experts}.")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"`top_k` must be between 1 and `num_experts` ({num_experts}), got {top_k}.")
    if seed < 0:
        raise ValueError(f"`seed` must not be negative, got {seed}.")
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale != "auto" and not (is_number and math.isfinite(scale) and scale > 0):
        raise ValueError(f"`scale` must be 'auto' or a number above 0, got {scale!r}.")
    if isinstance(shared, str):
        if shared not in ("dense", "residual"):
            raise ValueError(f"`shared` must be None, 'dense', 'residual' or a number in (0, 1), got {shared!r}.")
    elif shared is not None and (isinstance(shared, bool) or not 0 < shared < 1):
        raise ValueError(f"`shared` must be None, 'dense', 'residual' or a number in (0, 1), got {shared!r}.")


def _call_hint(value: Any) -> str:
    """For a class where an instance of it was meant."""
    return f": write {value.__name__}(...)" if inspect.isclass(value) else ""


def _find_tokenizer(model: PreTrainedModel, calibration: Any, router: RouterInit) -> Any:
    """The model's own tokenizer, where there is text to encode and it can be found."""
    first = calibration[0] if isinstance(calibration, (list, tuple)) and calibration else calibration
    if not (isinstance(first, str) or router.reads_text):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError):
        return None  # whoever needs it says so, with the name of its argument


def _prepared(plan: UpcyclePlan, model: PreTrainedModel, sites: list[FeedForwardSite], tokenizer: Any) -> UpcyclePlan:
    """The plan with builder and router start that have seen the model, where they need to."""
    router = plan.router.prepare(model, sites, tokenizer)
    return replace(plan, experts=plan.experts.prepare(model, sites), router=router)


def _statistics(
    plan: UpcyclePlan,
    writer: Target,
    model: PreTrainedModel,
    sites: list[FeedForwardSite],
    batches: list[dict] | None,
) -> dict[int, LayerStatistics]:
    for argument, part in (("experts", plan.experts), ("router", plan.router)):
        if part.needs and batches is None:
            raise ValueError(
                f"`{argument}={type(part).__name__}(...)` looks at data ({', '.join(sorted(part.needs))}): pass "
                "`calibration`, such as a list of texts."
            )
    needs = plan.experts.needs | plan.router.needs | writer.needs
    if batches is not None and plan.split_share is not None and not needs & {"taylor", "contribution"}:
        needs |= {"contribution"}
    if batches is not None and plan.rule.total(plan.top_k, plan.num_experts) is None:
        needs |= {"router_inputs"}
    if not needs:
        return {}
    if batches is None:
        batches = [probe_batch(model, plan.seed)]
    return collect_statistics(model, sites, batches, needs)


def _layers(
    plan: UpcyclePlan,
    writer: Target,
    config: Any,
    sites: list[FeedForwardSite],
    stats: dict[int, LayerStatistics],
    done: list[UpcycledLayer],
) -> Iterator[UpcycledLayer]:
    """Makes the layers one by one; `done` keeps what the report needs of them, without their weights."""
    for site in sites:
        ffn = extract_feed_forward(site.module)
        layer = build_layer(
            plan, writer, config, ffn, site.name, site.layer_name, site.layer_idx, stats.get(site.layer_idx)
        )
        yield layer
        done.append(layer._replace(router=None, experts=[], shared=None, residual=None))
