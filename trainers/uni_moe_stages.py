"""The three phases in which Uni-MoE is trained: what is trainable in each.

| stage | trains | model |
|---|---|---|
| 1, `"alignment"` | the connector of one modality | one or several experts |
| 2, `"dense"` | connectors and language model, head included | one expert per model, put together afterwards |
| 3, `"joint"` | routers and projectors in full, LoRA on the rest of the language model | several experts |
"""

from typing import Any

from torch import nn

from hf_moe.routing.discovery import find_routers
from hf_moe.views import unwrap_model


__all__ = ["UNI_MOE_STAGES", "set_uni_moe_stage", "uni_moe_lora_config"]

#: Names of the stages, in their order; their numbers are 1, 2 and 3.
UNI_MOE_STAGES = ("alignment", "dense", "joint")


def set_uni_moe_stage(model: nn.Module, stage: int | str, modality: str | None = None) -> list[str]:
    """Freezes everything but what a phase of [Uni-MoE](https://huggingface.co/papers/2405.11273) trains.

    In the joint phase without adapters, routers and projectors are trained; with those of [`uni_moe_lora_config`] this
    is not needed, since PEFT freezes the rest. Encoders are frozen in every phase.

    Args:
        model (`nn.Module`): [`UniMoeForConditionalGeneration`].
        stage (`int` or `str`): 1, 2 or 3, or one of [`UNI_MOE_STAGES`].
        modality (`str`, *optional*): `"image"`, `"video"` (the connector of images), `"speech"` or `"audio"`; needed
            for alignment, which trains one connector at a time.

    Returns:
        `list[str]`: Names of the trainable parameters.

    Raises:
        ValueError: unknown stage, a modality that the model has not or that is missing, another model, or a model with
            PEFT adapters, which say themselves what trains.

    Example:

    ```python
    >>> set_uni_moe_stage(model, "alignment", "speech")[0]
    'model.speech_connector.queries'
    ```
    """
    inner: Any = unwrap_model(model)
    name = str(stage)
    if name in ("1", "2", "3") and not isinstance(stage, bool):
        name = UNI_MOE_STAGES[int(name) - 1]
    if name not in UNI_MOE_STAGES:
        raise ValueError(f"`stage` must be 1, 2 or 3, or one of {list(UNI_MOE_STAGES)}, got {stage!r}.")
    if hasattr(model, "peft_config") or hasattr(inner, "peft_config"):
        raise ValueError(
            "`model` has PEFT adapters, which say themselves what trains, and a stage would make the weights below "
            "them trainable. Leave the stage out; `uni_moe_lora_config` is the joint stage."
        )
    connectors = _trunk(inner).connectors()
    if name == "alignment":
        wanted: Any = "image" if modality == "video" else modality
        if wanted not in connectors:
            raise ValueError(f"`modality` must be one that `model` reads, of {sorted(connectors)}, got {modality!r}.")
        parts = [connectors[wanted]]
    elif name == "dense":
        parts = [*connectors.values(), _trunk(inner).language_model, inner.get_output_embeddings()]
    else:
        projectors = [connector.projector for connector in connectors.values()]
        parts = [*projectors, *find_routers(_trunk(inner).language_model).values()]
    trained = {id(p) for part in parts for p in part.parameters() if p.is_floating_point()}
    names = []
    for parameter_name, parameter in inner.named_parameters():
        parameter.requires_grad_(id(parameter) in trained)
        if parameter.requires_grad:
            names.append(parameter_name)
    return names


def uni_moe_lora_config(model: nn.Module, r: int = 8, lora_alpha: int = 16) -> Any:
    """LoRA of the joint phase: on every linear layer and expert of the language model. Routers and projectors are
    trained in full and saved along, so that one adapter folder holds everything.

    Note: The paper's dropout before the adapters (0.05) is left out: PEFT has none for stacked experts, and refuses it
    where there are any.

    Args:
        model (`nn.Module`): [`UniMoeForConditionalGeneration`].
        r (`int`, defaults to 8): Rank.
        lora_alpha (`int`, defaults to 16): Scale, times 1 / r.

    Returns:
        `peft.LoraConfig`

    Raises:
        ImportError: PEFT is not installed.

    Example:

    ```python
    >>> model = get_peft_model(model, uni_moe_lora_config(model))
    ```
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("`uni_moe_lora_config` needs PEFT: `pip install peft`.") from error
    trunk = _trunk(unwrap_model(model))
    modules = trunk.language_model.named_modules()
    linear = {n.rpartition(".")[2] for n, m in modules if isinstance(m, nn.Linear) and ".mlp.gate." not in f"{n}."}
    banks = [n.rpartition(".")[2] for n, _ in trunk.language_model.named_parameters() if ".mlp.experts." in n]
    banks = [name for name in dict.fromkeys(banks) if not name.endswith("_bias")]
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=rf".*language_model\.(?!.*\.mlp\.gate\.).*\.({'|'.join(sorted(linear))})",
        target_parameters=[f"mlp.experts.{name}" for name in banks],
        modules_to_save=["mlp.gate", "projector"],
        task_type="CAUSAL_LM",
    )


def _trunk(model: Any) -> Any:
    trunk = getattr(model, "base_model", None)
    if not hasattr(trunk, "connectors"):
        raise ValueError(f"`model` ({type(model).__name__}) is no Uni-MoE: it has no connectors.")
    return trunk
