"""PILL's training in two stages: adapters of the other modalities first, then everything."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


__all__ = ["PillStageCallback"]

logger = logging.get_logger(__name__)


class PillStageCallback(TrainerCallback):
    """Trains a PILL adapter in the stage "align" up to some step, and in the stage "instruct" from there on.

    The stage depends on the step alone, so a resumed run continues in the right one. Works with any `Trainer`. Pass
    the callback to the trainer's constructor: the optimizer has to be made while everything is trainable, and sees no
    gradient of what is frozen later. Recipe of PILL (arXiv 2311.02126): captions while aligning, questions and answers
    after it. Two calls of `train()` with `model.set_stage(...)` in between are the same thing with another dataset and
    another learning rate, for which there is [`~hf_moe.trainers.pill_learning_rate`].

    Note: In distributed training leave `ddp_find_unused_parameters` on, which it is by default.

    Args:
        align_steps (`int`, *optional*): Optimizer steps of the first stage. 0 goes to the second one at once.
        align_epochs (`float`, *optional*): The same in epochs. Exactly one of the two.
        adapter_name (`str`, *optional*, defaults to `"default"`): The adapter.

    Raises:
        ValueError: Not exactly one length is given, or it is negative.

    Example:
        ```python
        Trainer(model, args, train_dataset=rows, callbacks=[PillStageCallback(align_epochs=1)]).train()
        ```
    """

    def __init__(
        self, align_steps: int | None = None, *, align_epochs: float | None = None, adapter_name: str = "default"
    ):
        lengths = [length for length in (align_steps, align_epochs) if length is not None]
        if len(lengths) != 1 or lengths[0] < 0:
            raise ValueError(
                "Exactly one of `align_steps` and `align_epochs` must be given, from 0 on; got "
                f"`align_steps={align_steps}`, `align_epochs={align_epochs}`."
            )
        self.align_steps = align_steps
        self.align_epochs = align_epochs
        self.adapter_name = adapter_name

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes all of the adapter trainable, so that the optimizer takes all of it."""
        _set_stage(kwargs["model"], self.adapter_name, "instruct")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Goes to the stage of the step at which training begins.

        Raises:
            ValueError: The optimizer lacks parameters that train in the second stage.
        """
        model = kwargs["model"]
        _set_stage(model, self.adapter_name, "instruct")
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            # FSDP and DeepSpeed replace parameters, so only an optimizer that has some of them can be judged
            missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
            if missing and any(id(parameter) in known for parameter in model.parameters()):
                raise ValueError(
                    f"The optimizer lacks {len(missing)} parameters that train in the stage 'instruct', such as "
                    f"{missing[0]!r}. Pass `PillStageCallback` to the trainer's constructor (`callbacks=[...]`), or "
                    'call `model.set_stage(adapter, "instruct")` before making an optimizer of your own.'
                )
        self._go(args, state, model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switches when the first stage is over."""
        self._go(args, state, kwargs["model"])

    def last_aligning_step(self, state: TrainerState, epochs: float) -> int:
        """How many steps the first stage has.

        Args:
            state (`TrainerState`): With the number of steps of the whole training.
            epochs (`float`): Epochs of the whole training.

        Returns:
            `int`
        """
        if self.align_steps is not None:
            return self.align_steps
        assert self.align_epochs is not None
        return round(self.align_epochs / max(epochs, 1e-9) * state.max_steps)

    def _go(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        steps = self.last_aligning_step(state, state.num_train_epochs or args.num_train_epochs)
        stage = "align" if state.global_step < steps else "instruct"
        if _set_stage(model, self.adapter_name, stage):
            logger.info(f"PILL adapter {self.adapter_name!r}: stage {stage!r} from step {state.global_step} on.")


def _set_stage(model: Any, adapter_name: str, stage: str) -> bool:
    while not hasattr(model, "set_stage") and (hasattr(model, "module") or hasattr(model, "_orig_mod")):
        model = getattr(model, "_orig_mod", None) or model.module
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if getattr(config, "type_name", None) != "HFMOE_PILL" or not hasattr(model, "set_stage"):
        raise ValueError(
            f"`PillStageCallback(adapter_name={adapter_name!r})` needs a PEFT model with a PILL adapter of that name, "
            f"got {type(model).__name__} with {sorted(getattr(model, 'peft_config', {}))}."
        )
    if config.stage == stage:
        return False
    model.set_stage(adapter_name, stage)
    return True
