"""Experts from several fine-tunes of one base (BTX 2403.07816, mergekit's MoE merges, DMU)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_moe.upcycling.exactness import Exactness
from hf_moe.upcycling.feed_forward import DenseFeedForward, FeedForwardSite, extract_feed_forward, find_feed_forwards
from hf_moe.upcycling.sources import is_adapter, is_peft_model, load_source, source_name

from .base import ExpertBuilder
from .copy import copies_exactness


__all__ = ["FromModels"]

logger = logging.get_logger(__name__)

BACKBONES = ("base", "average")


@dataclass(frozen=True)
class FromModels(ExpertBuilder):
    """Expert e is the feed-forward of fine-tune e. All other weights are those of the model being upcycled, or the
    average over the fine-tunes.

    A router that always chooses expert e reproduces fine-tune e only if the fine-tunes share everything but their
    feed-forwards. Fine-tunes may be LoRA (or other PEFT) adapters of the model being upcycled; they are merged into
    copies of the feed-forwards, and updates of other modules are left out (a warning names them).

    Args:
        models (`list`): One model, `PeftModel`, Hub id or folder (of a model or of an adapter) per expert.
        backbone (`str`, defaults to `"base"`): `"base"` (mergekit, DMU) or `"average"` (BTX).
        residual_scales (`list[float]`, *optional*): Factor on W_d and b_d of each expert.
        noise_scales (`list[float]`, *optional*): Standard deviation of noise added to each expert's matrices.

    Example:

    ```python
    >>> experts = FromModels(["me/base-code", "me/base-poems"])
    >>> moe, report = upcycle("me/base", num_experts=2, top_k=1, experts=experts, router=Prompts({...}))
    ```
    """

    reads_models: ClassVar[bool] = True

    models: Sequence[Any]
    backbone: str = "base"
    residual_scales: Sequence[float] | None = None
    noise_scales: Sequence[float] | None = None
    # Filled by `prepare`.
    experts: dict[int, list[DenseFeedForward]] | None = field(default=None, repr=False, compare=False)
    average: dict[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)
    identical: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self):
        if isinstance(self.models, (str, torch.nn.Module)) or not len(self.models):
            raise ValueError(f"`models` must be a list with one fine-tune per expert, got {self.models!r}.")
        if self.backbone not in BACKBONES:
            raise ValueError(f"`backbone` must be one of {list(BACKBONES)}, got {self.backbone!r}.")
        for name in ("residual_scales", "noise_scales"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.models):
                raise ValueError(f"`{name}` must have one value per model ({len(self.models)}), got {len(values)}.")

    def validate(self, num_experts, top_k):
        if num_experts != len(self.models):
            raise ValueError(
                f"`num_experts` must equal the number of `models` ({len(self.models)}), got {num_experts}."
            )

    def prepare(self, model: PreTrainedModel, sites: list[FeedForwardSite]) -> "FromModels":
        base = {site.layer_idx: extract_feed_forward(site.module, verify=False) for site in sites}
        experts: dict[int, list[DenseFeedForward]] = {site.layer_idx: [] for site in sites}
        names = {site.name for site in sites}
        average = None
        for source in tqdm(self.models, desc="Loading fine-tunes"):
            tuned = self._load(source, model, names)
            self._check(tuned, source, model)
            found = {site.name: site for site in find_feed_forwards(tuned)}
            for site in sites:
                if site.name not in found:
                    raise ValueError(f"{source_name(source)} has no feed-forward at `{site.name}`.")
                ffn = extract_feed_forward(found[site.name].module, verify=False)
                _check_form(ffn, base[site.layer_idx], source, site)
                dtype = base[site.layer_idx].up.dtype
                experts[site.layer_idx].append(ffn.map(lambda t, dtype=dtype: t.to(dtype)))
            if self.backbone == "average":
                average = self._accumulate(average, tuned, names)
        own = model.state_dict()
        unchanged = average is None or all(torch.equal(own[k].float(), v) for k, v in average.items())
        identical = unchanged and all(
            _same(expert, base[layer]) for layer, group in experts.items() for expert in group
        )
        return replace(self, experts=experts, average=average, identical=identical)

    def _load(self, source: Any, base: PreTrainedModel, names: set[str]) -> PreTrainedModel:
        if is_peft_model(source):
            # Merging writes into the model; the caller's stays as it is.
            tuned, merged = source, copy.deepcopy(source).merge_and_unload()
        elif isinstance(source, str) and is_adapter(source):
            from peft import PeftModel

            tuned = PeftModel.from_pretrained(copy.deepcopy(base), source)
            merged = None
        else:
            return load_source(source, "models")
        outside = _modules_outside(tuned, names)
        if outside and self.backbone == "base":
            logger.warning(
                f"The adapter {source_name(source)} also changes {', '.join(outside[:3])}"
                f"{' and others' if len(outside) > 3 else ''}; only its changes to the feed-forwards become an "
                "expert. "
                'Use `backbone="average"` to blend the rest in.'
            )
        return tuned.merge_and_unload() if merged is None else merged

    def _check(self, tuned: PreTrainedModel, source: Any, base: PreTrainedModel) -> None:
        for name in ("hidden_size", "vocab_size", "num_hidden_layers"):
            want, got = getattr(base.config, name, None), getattr(tuned.config, name, None)
            if want != got:
                raise ValueError(
                    f"{source_name(source)} has `{name}` = {got}, the model being upcycled {want}: all `models` must "
                    "be fine-tunes of one base."
                )

    def _accumulate(self, average, tuned, names):
        share = 1 / len(self.models)
        rest = {k: v for k, v in tuned.state_dict().items() if not k.startswith(tuple(f"{n}." for n in names))}
        rest = {k: v.float() * share for k, v in rest.items() if v.is_floating_point()}
        return rest if average is None else {k: average[k] + v for k, v in rest.items()}

    def carried(self, state_dict):
        if self.average is None:
            return state_dict
        return {k: self.average[k].to(v) if k in self.average else v for k, v in state_dict.items()}

    def build(self, ffn, num_experts, stats=None, generator=None, layer_idx=0):
        if self.experts is None:
            raise ValueError("`FromModels` must load its models first: call `prepare(model, sites)`.")
        return [self._expert(e, expert, generator) for e, expert in enumerate(self.experts[layer_idx])]

    def _expert(self, e: int, expert: DenseFeedForward, generator: torch.Generator | None) -> DenseFeedForward:
        if self.residual_scales is not None:
            expert = expert.scaled(self.residual_scales[e])
        sigma = self.noise_scales[e] if self.noise_scales is not None else 0
        if sigma:
            noisy = {
                name: (t.float() + sigma * torch.randn(t.shape, generator=generator).to(t.device)).to(t.dtype)
                for name, t in expert.tensors().items()
                if t.ndim == 2
            }
            expert = replace(expert, **noisy)
        return expert

    def exactness(self, rule, top_k, num_experts, router=None):
        same = copies_exactness(rule, top_k, num_experts)
        touched = any(s != 1 for s in self.residual_scales or ()) or any(self.noise_scales or ())
        if self.identical and not touched:
            return same
        return Exactness(False, "the experts are different fine-tunes", same.scale)

    def describe(self):
        scales = {"residual_scales": self.residual_scales, "noise_scales": self.noise_scales}
        scales = {k: list(v) for k, v in scales.items() if v is not None}
        return {
            "name": "FromModels",
            "models": [source_name(m) for m in self.models],
            "backbone": self.backbone,
            **scales,
        }


def _same(a: DenseFeedForward, b: DenseFeedForward) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def _check_form(ffn: DenseFeedForward, base: DenseFeedForward, source: Any, site: FeedForwardSite) -> None:
    got, want = ({k: tuple(t.shape) for k, t in f.tensors().items()} for f in (ffn, base))
    if got != want or ffn.activation != base.activation:
        raise ValueError(
            f"The feed-forward `{site.name}` of {source_name(source)} has another form ({ffn.activation}, {got}) than "
            f"that of the model being upcycled ({base.activation}, {want})."
        )


def _modules_outside(tuned: Any, names: set[str]) -> list[str]:
    """Last names of the modules with adapters that lie outside the upcycled feed-forwards."""
    outside = set()
    for path, module in tuned.get_base_model().named_modules():
        if hasattr(module, "base_layer") and not any(path.startswith(f"{n}.") for n in names):
            outside.add(path.rpartition(".")[2])
    return sorted(outside)
