"""The three stages in which MoE-LLaVA is trained: what is trainable in each.

| stage | trains | model |
|---|---|---|
| 1, `"projector"` | the projector | dense or sparse |
| 2, `"sft"` | projector and language model, head included | dense or sparse |
| 3, `"moe"` | feed-forwards of the language model (experts, routers, those of dense layers too) | sparse |
"""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_moe.routing.discovery import find_routers
from hf_moe.views import unwrap_model


__all__ = ["STAGES", "MoeTuningStageCallback", "moe_tuning_stage", "set_moe_tuning_stage"]

logger = logging.get_logger(__name__)

#: Names of the stages, in their order; their numbers are 1, 2 and 3.
STAGES = ("projector", "sft", "moe")


def moe_tuning_stage(stage: int | str) -> str:
    """The name of a stage.

    Args:
        stage (`int` or `str`): 1, 2 or 3, or `"projector"`, `"sft"` or `"moe"`.

    Returns:
        `str`: One of [`STAGES`].

    Raises:
        ValueError: none of them.
    """
    if stage in STAGES:
        return str(stage)
    if isinstance(stage, bool) or str(stage) not in ("1", "2", "3"):
        raise ValueError(f"`stage` must be 1, 2 or 3, or one of {list(STAGES)}, got {stage!r}.")
    return STAGES[int(stage) - 1]


def set_moe_tuning_stage(model: nn.Module, stage: int | str) -> list[str]:
    """Freezes everything but what a stage of MoE-tuning trains
    ([MoE-LLaVA](https://huggingface.co/papers/2401.15947)).

    Args:
        model (`nn.Module`): `LlavaForConditionalGeneration`, or [`MoeLlavaForConditionalGeneration`].
        stage (`int` or `str`): See [`moe_tuning_stage`].

    Returns:
        `list[str]`: Names of the trainable parameters.

    Raises:
        ValueError: unknown stage, a model without projector and language model, stage 3 of a dense model, or a model
            with PEFT adapters, which say themselves what trains.

    Example:

    ```python
    >>> set_moe_tuning_stage(model, "moe")[0]
    'model.language_model.layers.0.mlp.gate.weight'
    ```
    """
    stage = moe_tuning_stage(stage)
    inner: Any = unwrap_model(model)
    if hasattr(model, "peft_config") or hasattr(inner, "peft_config"):
        raise ValueError(
            "`model` has PEFT adapters, and a stage would make the weights below them trainable. Leave the stage out "
            "and choose in the adapter's config: `target_parameters=['mlp.experts.gate_up_proj', "
            "'mlp.experts.down_proj']` is stage 3."
        )
    base = inner.base_model
    projector, language_model = (getattr(base, name, None) for name in ("multi_modal_projector", "language_model"))
    if projector is None or language_model is None:
        raise ValueError(f"`model` ({type(inner).__name__}) is no LLaVA: it has no projector and language model.")
    if stage == "projector":
        parts = [projector]
    elif stage == "sft":
        parts = [projector, language_model, inner.get_output_embeddings()]
    else:
        if not find_routers(language_model):
            raise ValueError(
                f"Stage 3 trains experts, but the language model of `model` ({type(inner).__name__}) is dense: make "
                "it sparse first, with `hf_moe.upcycle_llava(model)`."
            )
        parts = [layer.mlp for layer in language_model.layers]
    trained = {id(p) for part in parts if part is not None for p in part.parameters() if p.is_floating_point()}
    names = []
    for name, parameter in inner.named_parameters():
        parameter.requires_grad_(id(parameter) in trained)
        if parameter.requires_grad:
            names.append(name)
    return names


class MoeTuningStageCallback(TrainerCallback):
    """Puts the model of any Trainer into a stage of MoE-tuning before its optimizer is made.

    Pass it to the trainer's constructor. Stages 1 and 2 of a dense LLaVA train under `trl.SFTTrainer`, stage 3 under
    [`MoeSFTTrainer`], which adds the balance loss (or stock `SFTTrainer`, with its own).

    Args:
        stage (`int` or `str`): See [`moe_tuning_stage`].

    Raises:
        ValueError: unknown stage; when training is set up, see [`set_moe_tuning_stage`].

    Example:

    ```python
    MoeSFTTrainer(moe, args, train_dataset=rows, processing_class=processor,
                  callbacks=[MoeTuningStageCallback("moe")]).train()
    ```
    """

    def __init__(self, stage: int | str):
        self.stage = moe_tuning_stage(stage)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freezes what the stage does not train."""
        names = set_moe_tuning_stage(kwargs["model"], self.stage)
        logger.info(f"MoE-tuning stage {self.stage!r} trains {len(names)} tensors.")
