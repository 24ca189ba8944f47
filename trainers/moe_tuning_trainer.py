"""One call from a LLaVA to the trainer of a stage of MoE-tuning."""

from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel
from trl import SFTTrainer
from trl.trainer.utils import create_model_from_path

from hf_moe.routing.discovery import find_routers

from .labelled_loss import LabelledSFTTrainer
from .moe_tuning import MoeTuningStageCallback, moe_tuning_stage
from .moe_tuning_config import MoeTuningConfig
from .sft_trainer import MoeSFTTrainer
from .vocabulary import check_image_token, check_vocabulary


__all__ = ["IgnoreImageTokens", "moe_tuning_trainer"]


class IgnoreImageTokens:
    """A collator whose labels leave out image tokens: nobody has to learn to say them.

    TRL's vision collator leaves out padding alone (and prompts, where the data have prompts and completions).

    Args:
        collator (`Callable`): Makes batches with `input_ids` and `labels`.
        image_token_id (`int`): The image token.
    """

    def __init__(self, collator: Any, image_token_id: int):
        self.collator = collator
        self.image_token_id = image_token_id

    def __call__(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        batch = self.collator(examples)
        if "labels" in batch and "input_ids" in batch:
            batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == self.image_token_id, -100)
        return batch


class _SparseTrainer(MoeSFTTrainer, LabelledSFTTrainer):
    """Router losses around the loss of labelled positions."""


def moe_tuning_trainer(
    model: PreTrainedModel | str,
    args: MoeTuningConfig | None = None,
    *,
    processing_class: Any = None,
    callbacks: list[Any] | None = None,
    quantization_config: Any = None,
    peft_config: Any = None,
    **kwargs: Any,
) -> SFTTrainer:
    """The trainer of one stage of [MoE-LLaVA](https://huggingface.co/papers/2401.15947)'s training.

    Stages 1 and 2 train a dense LLaVA with `trl.SFTTrainer`. In stage 3 a dense LLaVA is made sparse first
    ([`~hf_moe.upcycle_llava`]), and [`MoeSFTTrainer`] trains it with its balance loss; a sparse one is trained as it
    is, in any stage. Data, collation and everything else are TRL's; image tokens are left out of the labels, and on
    the CPU positions without a label out of the head.

    Args:
        model (`PreTrainedModel` or `str`): A LLaVA, dense or sparse, or where to load it from.
        args ([`MoeTuningConfig`], *optional*): Stage, and configuration of the run.
        processing_class (`ProcessorMixin`, *optional*): The processor; that of `model` by default.
        callbacks (`list`, *optional*): Further callbacks.
        quantization_config (*optional*): Only for a model that is loaded and stays as it is.
        peft_config (`PeftConfig`, *optional*): LoRA; it then says what trains, and the stage only what it is applied
            to: in stage 3 a dense model is still made sparse first.
        **kwargs: Further arguments of [`~trl.SFTTrainer`].

    Returns:
        `SFTTrainer` or [`MoeSFTTrainer`]

    Raises:
        ValueError: unknown stage, a model that is no LLaVA, or one that cannot be made sparse; a processor with other
            tokens than the model.

    Example:

    ```python
    trainer = moe_tuning_trainer("my-llava", MoeTuningConfig("my-moe-llava", stage="3"), train_dataset=rows)
    trainer.train()
    ```
    """
    args = MoeTuningConfig("moe-llava") if args is None else args
    stage = moe_tuning_stage(args.stage)
    source = model if isinstance(model, str) else model.name_or_path
    if isinstance(model, str):
        options: dict[str, Any] = {**(args.model_init_kwargs or {})}  # type: ignore[dict-item]
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        model = create_model_from_path(model, **{"trust_remote_code": args.trust_remote_code, **options})
        args.model_init_kwargs = None
    if processing_class is None:
        processing_class = AutoProcessor.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    check_vocabulary(model, processing_class)
    if hasattr(model.config, "image_token_id"):  # else the stage says what is wrong
        check_image_token(model, processing_class)
    if stage == "moe" and not find_routers(model):
        model = _sparse(model, args)
    trainer_class = _SparseTrainer if find_routers(model) else LabelledSFTTrainer
    freezing = [] if peft_config is not None else [MoeTuningStageCallback(stage)]
    trainer = trainer_class(
        model=model,
        args=args,
        processing_class=processing_class,
        callbacks=[*freezing, *(callbacks or [])],
        peft_config=peft_config,
        **kwargs,
    )
    trainer.data_collator = IgnoreImageTokens(trainer.data_collator, model.config.image_token_id)
    return trainer


def _sparse(model: PreTrainedModel, args: MoeTuningConfig) -> PreTrainedModel:
    from hf_moe import upcycle_llava

    indices = args.moe_layers.split(",")
    layers = [int(i) for i in indices] if all(i.strip().isdigit() for i in indices) else args.moe_layers
    moe, _ = upcycle_llava(
        model,
        args.num_experts,
        args.num_experts_per_tok,
        layers,
        residual=args.residual_expert,
        expert_capacity_factor=args.expert_capacity_factor or None,
        check=False,
        seed=args.seed,
    )
    return moe.train()
