"""`upcycle_uni_moe`: a dense language model and pretrained encoders become a Uni-MoE."""

from typing import Any

import torch
from transformers import PreTrainedModel

from .builders.base import ExpertBuilder
from .recipe import upcycle
from .report import UpcycleReport
from .sources import load_source


__all__ = ["upcycle_uni_moe"]


def upcycle_uni_moe(
    language_model: PreTrainedModel | str,
    num_experts: int = 4,
    top_k: int = 2,
    layers: str | list[int] = "sparse",
    *,
    experts: ExpertBuilder | None = None,
    vision_encoder: PreTrainedModel | None = None,
    speech_model: PreTrainedModel | None = None,
    audio_encoder: PreTrainedModel | None = None,
    config_fields: dict[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[PreTrainedModel, UpcycleReport | None]:
    """Turns a language model and encoders into a Uni-MoE ([2405.11273](https://huggingface.co/papers/2405.11273)).

    The language model becomes sparse by [`upcycle`], unless it is already; `experts=FromModels([...])` starts the
    experts from models tuned on different modalities, as the paper does. The encoders' weights are taken over, and a
    Whisper's decoder becomes the connector of speech; all else in the connectors is new and waits for the alignment
    stage. Parts are copied, in the language model's dtype: what was passed stays as it was.

    Args:
        language_model (`PreTrainedModel` or `str`): Dense, of a type with a backbone here, or a MoE of this package.
        num_experts (`int`, defaults to 4): Experts per MoE layer, N.
        top_k (`int`, defaults to 2): Experts each token is sent to, K.
        layers (`str` or `list[int]`, defaults to `"sparse"`): As in [`upcycle_llava`]: layers 0, 2, 4, ...
        experts ([`ExpertBuilder`], *optional*): How the experts start; copies by default.
        vision_encoder (`CLIPVisionModel`, *optional*): Of images and videos.
        speech_model (`WhisperModel` or `WhisperForConditionalGeneration`, *optional*): Its encoder reads speech.
        audio_encoder (`ASTModel`, *optional*): Of sounds.
        config_fields (`dict`, *optional*): Fields of [`UniMoeConfig`], the placeholders' ids among them.
        seed (`int`, defaults to 0): Of everything new.
        **options: Further arguments of [`upcycle`], fields of the text config among them.

    Returns:
        `tuple[UniMoeForConditionalGeneration, UpcycleReport]`: The model in evaluation mode; no report where the
        language model was sparse already.

    Raises:
        ValueError: see [`upcycle`] and [`UniMoeConfig`].

    Example:

    ```python
    >>> experts = FromModels(["tuned-on-images", "tuned-on-speech"])
    >>> ids = {"image_token_id": 32000, "speech_token_id": 32001}
    >>> model, report = upcycle_uni_moe(base, 2, 1, experts=experts, vision_encoder=clip, speech_model=whisper,
    ...                                 config_fields=ids)
    ```
    """
    from hf_moe.models.configuration import MoeConfigMixin
    from hf_moe.models.moe_llava.configuration_moe_llava import BACKBONES, PLACEMENTS
    from hf_moe.models.uni_moe import UniMoeConfig, UniMoeForConditionalGeneration
    from hf_moe.models.uni_moe.configuration_uni_moe import UNI_MOE

    dense: Any = load_source(language_model)
    report, sparse = None, dense
    if not isinstance(dense.config, MoeConfigMixin):
        layers = PLACEMENTS.get(layers, layers) if isinstance(layers, str) else layers
        target = {"target": BACKBONES[dense.config.model_type]} if dense.config.model_type in BACKBONES else {}
        chosen = {**target, **UNI_MOE, **options}
        sparse, report = upcycle(
            dense, num_experts=num_experts, top_k=top_k, layers=layers, experts=experts, seed=seed, **chosen
        )
    parts = {"vision": vision_encoder, "speech": speech_model, "audio": audio_encoder}
    configs: dict[str, Any] = {f"{name}_config": part.config for name, part in parts.items() if part is not None}
    configs = {name: type(part).from_dict(part.to_dict()) for name, part in configs.items()}
    head: Any = sparse.get_output_embeddings()
    fields = {"lm_head_bias": head.bias is not None, "tie_word_embeddings": bool(sparse.config.tie_word_embeddings)}
    config = UniMoeConfig(
        text_config=type(sparse.config).from_dict(sparse.config.to_dict()),
        **configs,
        **{**fields, **(config_fields or {})},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = UniMoeForConditionalGeneration._from_config(config, dtype=torch.float32)
    config.dtype = sparse.dtype
    _copy(sparse.base_model, model.model.language_model)
    _copy(head, model.lm_head)
    for name, part in parts.items():
        if part is not None:
            _take_encoder(name, part, model.model)
    for new in (*model.model.encoders().values(), *model.model.connectors().values()):
        new.to(sparse.dtype)
    model.tie_weights()
    model.generation_config = sparse.generation_config
    return model.to(sparse.device).eval(), report


def _take_encoder(name: str, source: Any, model: Any) -> None:
    encoder = model.encoders()[name]
    whisper = getattr(source, "model", source)  # of a Whisper with a head, the model inside
    bare = {"vision": source, "speech": getattr(whisper, "encoder", source), "audio": source.base_model}[name]
    _copy(bare, encoder)
    connector = model.connectors().get(name)
    if name == "speech" and hasattr(connector, "decoder") and hasattr(whisper, "decoder"):
        weights = {k: v for k, v in whisper.decoder.state_dict().items() if not k.startswith("embed_tokens.")}
        own = connector.decoder.state_dict()
        if weights.keys() == own.keys() and all(weights[k].shape == own[k].shape for k in own):
            connector.decoder.load_state_dict(weights)


def _copy(source: Any, target: Any) -> None:
    # Each tensor keeps its dtype: routers are in float32 in half-precision models too.
    target.load_state_dict({name: tensor.clone() for name, tensor in source.state_dict().items()}, assign=True)
