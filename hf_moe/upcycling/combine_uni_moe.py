"""`combine_uni_moe`: Uni-MoE's second step, in which separately tuned models become experts of one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .sources import load_source


__all__ = ["combine_uni_moe"]

# Differ between models that are combined: what they read, how many experts they have.
OWN = {"num_experts", "num_experts_per_tok", "upcycling", "transformers_version", "architectures", "auto_map"}


@torch.no_grad()
def combine_uni_moe(
    models: Sequence[PreTrainedModel | str],
    num_experts_per_tok: int = 2,
    seed: int = 0,
    connectors: Mapping[str, int] | None = None,
    **config_fields: Any,
) -> PreTrainedModel:
    """One Uni-MoE whose experts are those of several, each tuned on data of its own
    ([2405.11273](https://huggingface.co/papers/2405.11273), phase 2).

    A "dense" model of the paper is a `uni_moe` with `num_experts=1`. Experts are put side by side in the order of
    `models`; attention, norms, embeddings and head are the first model's; routers are new. Encoder and connector of a
    modality come from the first model that has it.

    Args:
        models (`Sequence`): `UniMoeForConditionalGeneration`, or where to load them from, with language models of one
            form.
        num_experts_per_tok (`int`, defaults to 2): Experts each token is sent to, K.
        seed (`int`, defaults to 0): Of the routers.
        connectors (`Mapping[str, int]`, *optional*): Index of the model that a connector (`"image"`, `"speech"`,
            `"audio"`) comes from, where it is not the first that has it: the one tuned on that modality.
        **config_fields: Fields of the new [`UniMoeConfig`] that shall differ from the first model's.

    Returns:
        `UniMoeForConditionalGeneration`: In evaluation mode; the models stay as they are.

    Raises:
        ValueError: no models, language models of different forms, or a connector from a model that has it not.

    Example:

    ```python
    >>> model = combine_uni_moe([tuned_on_images, tuned_on_speech, tuned_on_sounds], num_experts_per_tok=2)
    ```
    """
    from hf_moe.models.uni_moe import UniMoeConfig, UniMoeForConditionalGeneration

    if isinstance(models, (str, torch.nn.Module)) or not len(models):
        raise ValueError(f"`models` must be a list with at least one model, got {models!r}.")
    sources: list[Any] = [load_source(model) for model in models]
    base = sources[0]
    for source in sources:
        _check_form(source, base)
    chosen = dict(connectors or {})
    _check_connectors(chosen, sources)
    fields: dict[str, Any] = base.config.to_dict()
    owner = _owners(sources)
    for encoder, source in owner.items():
        config = source.config
        names = ("image", "video") if encoder == "vision" else (encoder,)
        fields[f"{encoder}_config"] = getattr(config, f"{encoder}_config").to_dict()
        fields |= {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in names}
        connector = names[0]
        config = sources[chosen[connector]].config if connector in chosen else config
        fields[f"{connector}_connector"] = config.connector(connector)
    counts = [source.config.text_config.num_experts for source in sources]
    text = {**fields["text_config"], "num_experts": sum(counts), "num_experts_per_tok": num_experts_per_tok}
    fields = {**{k: v for k, v in fields.items() if k not in OWN}, "text_config": text, **config_fields}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        combined: Any = UniMoeForConditionalGeneration._from_config(UniMoeConfig(**fields), dtype=torch.float32)
    weights = combined.state_dict()
    banks = [source.state_dict() for source in sources]
    for name in weights:
        if ".language_model." in name and ".mlp.experts." in name:
            weights[name] = torch.cat([bank[name] for bank in banks])
        elif ".language_model." in name and (".mlp.gate." in name or "load_balancer." in name):
            continue  # new routers
        elif (index := _connector_of(name, chosen)) is not None:
            weights[name] = banks[index][name].clone()
        elif name in banks[0]:
            weights[name] = banks[0][name].clone()
        else:  # of a modality that the first model has not
            weights[name] = next(bank[name] for bank in banks if name in bank).clone()
    combined.load_state_dict(weights, assign=True)  # each tensor keeps its dtype; routers are in float32
    combined.tie_weights()
    combined.config.dtype = base.model.language_model.dtype
    combined.generation_config = base.generation_config
    return combined.to(base.device).eval()


def _connector_of(name: str, chosen: Mapping[str, int]) -> int | None:
    return next((index for part, index in chosen.items() if name.startswith(f"model.{part}_connector.")), None)


def _check_connectors(chosen: Mapping[str, int], sources: list[Any]) -> None:
    for name, index in chosen.items():
        known = 0 <= index < len(sources)
        if not known or name not in sources[index].model.connectors():
            there = sorted(sources[index].model.connectors()) if known else []
            raise ValueError(
                f"`connectors[{name!r}]` is {index}, but "
                + (f"model {index} has {there} only." if known else f"there are {len(sources)} models.")
            )


def _owners(sources: list[Any]) -> dict[str, Any]:
    owners: dict[str, Any] = {}
    for source in sources:
        for encoder in source.model.encoders():
            owners.setdefault(encoder, source)
    return owners


def _check_form(source: Any, base: Any) -> None:
    if getattr(source.config, "model_type", None) != "uni_moe" or isinstance(source.config.num_experts, list):
        raise ValueError(
            f"`models` must be `uni_moe` with one number of experts for all layers, got {type(source).__name__}. A "
            "dense language model becomes one with `upcycle_uni_moe(model, num_experts=1, top_k=1)`."
        )
    own, want = ({k: v for k, v in m.config.text_config.to_dict().items() if k not in OWN} for m in (source, base))
    other = sorted(k for k in own.keys() | want.keys() if own.get(k) != want.get(k) and not k.startswith("_"))
    if other:
        raise ValueError(
            f"`models` must have language models of one form, but they differ in {other[:4]}: "
            f"{[own.get(k) for k in other[:4]]} and {[want.get(k) for k in other[:4]]}."
        )
