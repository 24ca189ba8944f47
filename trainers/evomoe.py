"""EvoMoE: train one expert per layer, make many of it, anneal a dense gate to a sparse one (2112.14397)."""

import copy
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_moe.upcycling import expand_optimizer_state, upcycle
from hf_moe.upcycling.targets.choose import list_targets
from hf_moe.views import moe_layers

from .evomoe_checkpoint import checkpoint_step, write_expanded
from .moe_trainer import MoeTrainer


__all__ = ["PHASES", "ExpandedMomentsCallback", "train_evomoe"]

logger = logging.get_logger(__name__)

#: Folders of the phases' checkpoints, in `output_dir`.
PHASES = ("phase1", "phase2")


def train_evomoe(model: PreTrainedModel, args: Any, trainer_class: type = MoeTrainer, **trainer_options: Any) -> Any:
    """Both phases of [EvoMoE](https://huggingface.co/papers/2112.14397) in one run of `args.max_steps` steps.

    Phase 1 trains a model with one expert per MoE layer, which computes what a dense one does. Its last checkpoint is
    expanded ([`expand_experts`]): weights, routers that start at zero, optimizer moments. Phase 2 resumes from there
    with a dense-to-sparse gate whose temperature falls, and which takes one expert per token in the end. Data order,
    random numbers and the learning-rate schedule go on as if there were one phase.

    With `args.resume_from_checkpoint` (any true value) an interrupted run goes on in the phase it was in; checkpoints
    are in `phase1` and `phase2` of `args.output_dir`.

    Args:
        model (`PreTrainedModel`): A dense model, or a model of this package with one expert per layer. On resumption:
            the same.
        args ([`EvoMoETrainingArguments`] or [`EvoMoEConfig`]): Arguments of both phases.
        trainer_class (`type`, defaults to [`MoeTrainer`]): A Trainer class with [`MoeTrainerMixin`].
        **trainer_options: Its keyword arguments, such as `train_dataset`.

    Returns:
        The trainer of phase 2, after training.

    Raises:
        ValueError: a model that is not dense and has several experts, an adapter, a folder with checkpoints of an
            earlier run, or checkpoints of a run with other phases.

    Example:

    ```python
    >>> args = EvoMoETrainingArguments("out", max_steps=1000, num_experts=8, expert_steps=0.2)
    >>> trainer = train_evomoe(dense, args, train_dataset=rows)
    >>> trainer.save_model("out")
    ```
    """
    if trainer_options.get("peft_config") is not None:
        raise ValueError("`peft_config` must be None: EvoMoE trains and copies the experts themselves.")
    folders = [Path(args.output_dir) / name for name in PHASES]
    first, second = (_last_checkpoint(folder) for folder in folders)
    if not args.resume_from_checkpoint and (first or second):
        raise ValueError(
            f"`{args.output_dir}` holds checkpoints of an earlier run. Pass `resume_from_checkpoint=True` to go on "
            "with it, or choose another `output_dir`."
        )
    start = with_one_expert(model, args.moe_layers)
    model_class = type(start)
    if second is None:
        second = _first_phase(start, args, folders, first, trainer_class, trainer_options)
    del start
    expanded = model_class.from_pretrained(second, dtype="auto")
    experts = {view.num_experts for view in moe_layers(expanded)}
    if experts != {args.num_experts}:
        raise ValueError(
            f"`num_experts={args.num_experts}`, but the checkpoint {second!r} has {sorted(experts)}. Resume with the "
            "arguments of its run, or choose another `output_dir`."
        )
    callbacks = [*(trainer_options.get("callbacks") or ()), ExpandedMomentsCallback(args.optimizer_moments)]
    trainer = trainer_class(expanded, args=_arguments(args, folders[1]), **{**trainer_options, "callbacks": callbacks})
    logger.info(f"EvoMoE, phase 2: {args.num_experts} experts, from step {checkpoint_step(second)}.")
    trainer.train(resume_from_checkpoint=second)
    return trainer


def _first_phase(
    model: PreTrainedModel,
    args: Any,
    folders: list[Path],
    last: str | None,
    trainer_class: type,
    trainer_options: dict[str, Any],
) -> str:
    """Trains one expert per layer, unless that is done, and expands it; returns the checkpoint phase 2 starts from."""
    steps = args.phase_one_steps
    if last is not None and checkpoint_step(last) > steps:
        raise ValueError(
            f"`expert_steps={args.expert_steps:g}` ends phase 1 at step {steps}, but there is {last!r}. Resume with "
            "the arguments of its run, or choose another `output_dir`."
        )
    callbacks = [*(trainer_options.get("callbacks") or ()), StopCallback(steps)]
    trainer = trainer_class(
        model,
        args=_arguments(args, folders[0]),
        **{**trainer_options, "callbacks": callbacks},
    )
    if last is None or checkpoint_step(last) < steps:
        logger.info(f"EvoMoE, phase 1: one expert, {steps} steps.")
        trainer.train(resume_from_checkpoint=last)
        last = _last_checkpoint(folders[0])
    if last is None or checkpoint_step(last) != steps:
        raise ValueError(f"Phase 1 should have ended with a checkpoint at step {steps}, but the last one is {last!r}.")
    destination = folders[1] / Path(last).name
    if trainer.is_world_process_zero():
        write_expanded(type(model), last, destination, args)
    trainer.accelerator.wait_for_everyone()
    return str(destination)


def with_one_expert(model: PreTrainedModel, layers: str = "all") -> PreTrainedModel:
    """A model with one expert per MoE layer: `model` itself if it is one, else the dense model upcycled.

    Args:
        model (`PreTrainedModel`): Dense, or of this package with one expert per layer.
        layers (`str`, defaults to `"all"`): Which layers of a dense model.

    Returns:
        `PreTrainedModel`: It computes what the dense model does.

    Raises:
        ValueError: several experts, or routers that cannot be exchanged for a dense-to-sparse gate.
    """
    if not any(name.endswith(".experts") for name, _ in model.named_modules()):
        target = f"moe_{model.config.model_type}"
        target = target if target in list_targets() else "generic"
        return upcycle(model, num_experts=1, top_k=1, layers=layers, target=target, check=False)[0]
    if not hasattr(model.config.get_text_config(), "router_type"):
        raise ValueError(
            f"{type(model).__name__} has routers of its own, which cannot become a dense-to-sparse gate. Start from "
            "the dense model, or from a model of this package with `num_experts=1`."
        )
    experts = sorted({view.num_experts for view in moe_layers(model)})
    if experts != [1]:
        raise ValueError(
            f"Phase 1 trains one expert per layer, but the model has {experts}. Start from a dense model, or with "
            "`num_experts=1`."
        )
    return model


class StopCallback(TrainerCallback):
    """Ends a run at a step, with a checkpoint, while its schedules stay those of the whole run.

    Args:
        step (`int`): The last step.
    """

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


class ExpandedMomentsCallback(TrainerCallback):
    """Fits the optimizer state of phase 1 to the experts of phase 2, once the Trainer has loaded it.

    Args:
        moments (`str`, defaults to `"copy"`): `"copy"` or `"reset"`, see [`expand_optimizer_state`].
    """

    def __init__(self, moments: str = "copy"):
        self.moments = moments

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        expand_optimizer_state(getattr(optimizer, "optimizer", optimizer), model, self.moments)


def _arguments(args: Any, folder: Path) -> Any:
    """The arguments of one phase. Phases are not pushed: the result is."""
    args = copy.copy(args)
    args.output_dir, args.push_to_hub = os.fspath(folder), False
    return args


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
