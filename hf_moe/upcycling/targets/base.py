"""Target writers: what an upcycled model is in the end."""

import copy
import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_moe.upcycling.exactness import Exactness
from hf_moe.upcycling.plan import RouterStart, UpcycledLayer, UpcyclePlan
from hf_moe.upcycling.split_feed_forward import replaced_modules
from hf_moe.upcycling.statistics import LayerStatistics


__all__ = ["CheckpointTarget", "Target", "head_mapping"]

# Heads a dense model may have, the specific ones first.
HEADS = {
    "causal language model": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "image-text-to-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "sequence-to-sequence language model": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "masked language model": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "sequence classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "question answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "base model": modeling_auto.MODEL_MAPPING,
    "text encoder": modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING,
}
# Fields of the source config that do not describe the result.
NOT_CARRIED = ("architectures", "auto_map", "dtype", "model_type", "quantization_config", "torch_dtype",
               "transformers_version", "_name_or_path")  # fmt: skip


class Target:
    """One kind of result.

    Attributes:
        name (`str`): What users call it.
        needs (`frozenset[str]`): Statistics `start_router` reads; measured on random tokens without `calibration`.
    """

    name: str = ""
    needs: frozenset[str] = frozenset()

    def refusal(self, model: PreTrainedModel, plan: UpcyclePlan) -> str | None:
        """Why this target cannot hold the plan's result, half a sentence; `None` where it can."""
        raise TypeError(f"{type(self).__name__} must define `refusal`.")

    def config(self, source_config: PreTrainedConfig, plan: UpcyclePlan) -> PreTrainedConfig:
        """Config of the result, with the caller's overrides and the provenance (`upcycling`).

        Raises:
            ValueError: an override the config does not have.
        """
        raise TypeError(f"{type(self).__name__} must define `config`.")

    def exactness(self, config: PreTrainedConfig, plan: UpcyclePlan) -> Exactness:
        """The plan's prediction, corrected by what only the target knows."""
        return plan.exactness

    def start_router(
        self,
        config: PreTrainedConfig,
        plan: UpcyclePlan,
        rows: torch.Tensor | None,
        stats: LayerStatistics | None,
        generator: torch.Generator,
        layer_idx: int,
    ) -> RouterStart:
        """The router's first values, from the `(N, D)` rows of the plan's router start."""
        return RouterStart(rows)

    def build(
        self, model: PreTrainedModel, config: PreTrainedConfig, plan: UpcyclePlan, layers: Iterable[UpcycledLayer]
    ) -> PreTrainedModel:
        """The result. `model` is only read.

        Args:
            model (`PreTrainedModel`): Dense model.
            config (`PreTrainedConfig`): From [`Target.config`].
            plan ([`UpcyclePlan`]): The decisions.
            layers (`Iterable[UpcycledLayer]`): The new layers, made while iterating.

        Returns:
            `PreTrainedModel`: In evaluation mode, in the dtype and on the device of `model`.
        """
        raise TypeError(f"{type(self).__name__} must define `build`.")


class CheckpointTarget(Target):
    """A target whose weights are the dense checkpoint with the feed-forwards' entries replaced.

    A subclass says which config belongs to it (`config_fields`) and what the entries of one layer are called
    (`layer_tensors`); loading goes through the family's own `from_pretrained`. Converters that work shard by shard use
    `config`, `drops` and `layer_tensors` alone.

    Args:
        model_type (`str`): `model_type` of the result.
    """

    #: `model_type` of the dense models this target takes.
    source_types: tuple[str, ...] = ()

    def __init__(self, model_type: str):
        self.name = self.model_type = model_type

    def config_class(self, source_config: PreTrainedConfig) -> type[PreTrainedConfig]:
        """Config class of the result."""
        return type(AutoConfig.for_model(self.model_type))

    def model_class(self, model: PreTrainedModel, config: PreTrainedConfig) -> type[PreTrainedModel]:
        """Class of the result: the one with the head `model` has."""
        return head_mapping(model)[1][type(config)]

    def refusal(self, model, plan):
        config = model.config
        if config.model_type not in self.source_types:
            return f"it is made from {' or '.join(self.source_types)}, not from {config.model_type}"
        if getattr(config, "is_heterogeneous", False):
            return "the layers of the source differ in shape"
        head, mapping = head_mapping(model)
        if mapping is None:
            return f"nothing is known about the head of {type(model).__name__}"
        if mapping.get(self.config_class(config), None) is None:
            return f"it has no {head} class"
        return None

    def config_fields(self, source_config: PreTrainedConfig, plan: UpcyclePlan) -> dict[str, Any]:
        """Fields of the result's config that differ from the source's."""
        raise TypeError(f"{type(self).__name__} must define `config_fields`.")

    def layer_tensors(self, layer: UpcycledLayer) -> dict[str, torch.Tensor]:
        """Checkpoint entries of one MoE layer, by full name."""
        raise TypeError(f"{type(self).__name__} must define `layer_tensors`.")

    def may_be_missing(self, key: str) -> bool:
        """Whether a weight of the result may be left to its own initialisation."""
        return False

    def drops(self, key: str, names: set[str]) -> bool:
        """Whether a dense checkpoint's entry belongs to one of the replaced feed-forwards (`names`)."""
        return any(key.startswith(f"{module}.") for name in names for module in replaced_modules(name))

    def config(self, source_config, plan):
        return self.make_config(source_config, plan, plan.overrides)

    def make_config(
        self, source_config: PreTrainedConfig, plan: UpcyclePlan, overrides: dict[str, Any]
    ) -> PreTrainedConfig:
        """The dense config's fields, this target's and the caller's, later ones first; with provenance."""
        config_class = self.config_class(source_config)
        known = _field_names(config_class)
        # What only the source's class declares means nothing to the result; what the user added does.
        foreign = _field_names(type(source_config)) - known - {"head_dim"}  # models read it, declared or not
        carried = {k: v for k, v in source_config.to_dict().items() if k not in foreign and k not in NOT_CARRIED}
        for key in overrides:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{config_class.__name__} has no field {key!r}.{hint}")
        config = config_class(**{**carried, **self.config_fields(source_config, plan), **overrides})
        config.upcycling = plan.provenance(self.exactness(config, plan))
        return config

    def build(self, model, config, plan, layers):
        names, entries = set(), {}
        for layer in tqdm(layers, total=len(plan.layers), desc=f"Upcycling to {self.name}"):
            names.add(layer.name)
            entries.update(self.layer_tensors(layer))
        kept = {k: v for k, v in model.state_dict().items() if not self.drops(k, names)}
        kept = plan.experts.carried(kept)
        # Loading keeps the very tensors it is given; the dense model must not share memory with the result.
        entries = {**{k: v.detach().clone() for k, v in kept.items()}, **_unshared(entries)}
        if getattr(config, "tie_word_embeddings", False):
            entries = {k: v for k, v in entries.items() if k not in _tied_keys(model)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)  # for weights that keep their own initialisation
            loaded: Any = self.model_class(model, config).from_pretrained(
                None,
                config=config,
                state_dict=entries,
                dtype=model.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with the way out
            )
        result, info = loaded
        problems = sorted(k for k in info["missing_keys"] if not self.may_be_missing(k))
        problems += sorted(info["unexpected_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
        if problems:
            raise ValueError(
                f"{type(model).__name__} does not fit {type(result).__name__}: {', '.join(problems[:4])} do not "
                "match. "
                'Choose another `target`, such as "generic".'
            )
        result.config.name_or_path = ""  # it was loaded from no path, which transformers writes down as "None"
        if getattr(model, "generation_config", None) is not None:
            result.generation_config = copy.deepcopy(model.generation_config)
        return result.to(model.device).eval()


def _field_names(config_class: Any) -> set[str]:
    names = {f.name for f in fields(config_class)} if is_dataclass(config_class) else set()
    return names | set(getattr(config_class, "attribute_map", {}))


def _tied_keys(model: PreTrainedModel) -> set[str]:
    """Keys of a state dict that are other names of a tied weight."""
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    return set(keys)


def _unshared(entries: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entries under which the dense model's own memory would be loaded, copied.

    Per-expert entries are stacked when they are loaded, so copies of one tensor may stay one tensor until then.
    """
    return {k: v.contiguous() if ".experts." in k else v.clone() for k, v in entries.items()}


def head_mapping(model: PreTrainedModel) -> tuple[str, Any]:
    """The head a model has and transformers' table of classes with that head (`None` for heads not in `HEADS`)."""
    for head, mapping in HEADS.items():
        cls: Any = mapping.get(type(model.config), None)
        if cls is not None and isinstance(model, cls):
            return head, mapping
    return "unknown", None
