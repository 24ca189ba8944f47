"""Trainer callbacks of the routers: balance statistics over whole optimizer steps, and scheduled buffers."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .discovery import find_routers
from .permutation import advance_permutation_search, harden_permutations
from .schedules import Schedule, parse_schedules
from .steps import ROUTER_STATE_NAME, BalanceSteps, count_batch_tokens


__all__ = ["GlobalBalanceCallback", "RouterScheduleCallback", "apply_schedules"]

logger = logging.get_logger(__name__)


class GlobalBalanceCallback(TrainerCallback):
    """Announces optimizer steps to the model's [`LoadBalancer`]s, updates selection biases, and makes resuming exact.

    Every checkpoint gets a `router_state.safetensors` with the counters (the weights stay those of the model alone),
    and a resumed run reads it back. G, the number of micro-batches of the step, follows from the length of the
    dataloader: the last step of an epoch may have fewer.

    Args:
        resume_from_checkpoint (`str`, *optional*): Folder to read the counters from when a run is resumed. By default
            `TrainingArguments.resume_from_checkpoint` and then `<output_dir>/checkpoint-<step>`: set it when
            `trainer.train(resume_from_checkpoint=...)` is given a folder elsewhere.

    Example:

    ```python
    >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[GlobalBalanceCallback()])
    ```
    """

    steps: BalanceSteps | Any = None  # from `on_train_begin` on

    def __init__(self, resume_from_checkpoint: str | None = None):
        self.resume_from_checkpoint = resume_from_checkpoint
        self._epoch_start: int | None = None
        self._observed: tuple[int, dict[str, int | torch.Tensor], int] | None = None

    def observe_batches(self, batches: list[Mapping[str, Any]], replicas: int = 1) -> None:
        """Tell the callback the micro-batches of the next step: G and token counts are then exact.

        For trainers that override `get_batch_samples`, which runs right before `on_step_begin`. Every rank must call
        it, because the token counts are summed over ranks (one more collective of one number per step).

        Args:
            batches (`list[Mapping]`): What `get_batch_samples` returned, on this rank.
            replicas (`int`, defaults to 1): Ranks of the balancer's group that hold these same batches (context or
                sequence parallelism, where each later works on its slice).
        """
        counts = {"num_tokens": count_batch_tokens(batches)} if self.steps is None else self.steps.count(batches)
        self._observed = (max(len(batches), 1), counts, replicas)

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = BalanceSteps(kwargs["model"])
        self._epoch_start = None
        if state.global_step > 0:
            folders = [
                folder
                for folder in (
                    self.resume_from_checkpoint,
                    args.resume_from_checkpoint,
                    _checkpoint_folder(args, state),
                )
                if isinstance(folder, str | Path)
            ]
            found = self.steps.load(folders)
            remembers = any(b.mode in ("lagged", "blend") for b, _ in self.steps.balancers.values())
            if found is None and remembers:
                logger.warning_once(
                    f"No {ROUTER_STATE_NAME} in {[str(folder) for folder in folders]}: expert frequencies of the step "
                    "before are not known and the first step differs from an uninterrupted run. If the checkpoint is "
                    "elsewhere, pass `GlobalBalanceCallback(resume_from_checkpoint=...)`."
                )

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        start = state.global_step
        if self._epoch_start is None and not args.ignore_data_skip:
            steps = _steps_per_epoch(args, train_dataloader)
            start -= start % steps if steps else 0  # resumed in the middle of an epoch
        self._epoch_start = start

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        num_micro_batches, counts = self._micro_batches(args, state, train_dataloader), {}
        if self._observed is not None:
            num_micro_batches, counts, replicas = self._observed
            counts = {name: self.steps.sum_over_ranks(count) // replicas for name, count in counts.items()}
            self._observed = None
        summed = bool(args.average_tokens_across_devices)
        self.steps.begin(num_micro_batches, **counts, summed_over_ranks=summed)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.start_reduction()

    def on_step_end(self, args, state, control, **kwargs):
        # The Trainer calls this after the optimizer only; micro-batches in between end in `on_substep_end`.
        self.steps.end()

    def on_save(self, args, state, control, **kwargs):
        folder = _checkpoint_folder(args, state)
        if args.should_save and folder.is_dir():
            self.steps.save(folder)

    def on_train_end(self, args, state, control, **kwargs):
        self.steps.close()

    def _micro_batches(self, args, state, train_dataloader) -> int:
        steps = _steps_per_epoch(args, train_dataloader)
        accumulation = args.gradient_accumulation_steps
        if steps is None or (state.global_step - (self._epoch_start or 0)) % steps != steps - 1:
            return accumulation
        return len(train_dataloader) % accumulation or accumulation


class RouterScheduleCallback(TrainerCallback):
    """Writes scheduled values into the 0-dim buffers of a model's routers before every optimizer step, and drives
    their permutation searches, if any (see [`~hf_moe.routing.permutation.PermutationLocalSearch`]).

    Values are functions of `state.global_step` alone, so a resumed run continues exactly. Layers never count steps:
    activation checkpointing runs them twice.

    Args:
        schedules (`Mapping`, *optional*): Buffer name to [`Schedule`], dict or number. By default
            `model.config.router_config["schedules"]`.

    Raises:
        ValueError: a schedule cannot work, or (when training begins) no router has the buffer.

    Example:

    ```python
    >>> cooling = RouterScheduleCallback({"temperature": ExponentialSchedule(2.0, 0.3, num_steps=0.8)})
    >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[cooling])
    ```
    """

    def __init__(self, schedules: Mapping[str, Schedule | Mapping | float] | None = None):
        self.schedules = None if schedules is None else parse_schedules(schedules)

    def on_train_begin(self, args, state, control, **kwargs):
        self._apply(kwargs["model"], state)

    def on_step_begin(self, args, state, control, **kwargs):
        self._apply(kwargs["model"], state)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate or control.should_save:  # both want permutations, not what is still soft
            harden_permutations(kwargs["model"])

    on_epoch_end = on_step_end

    def on_train_end(self, args, state, control, **kwargs):
        harden_permutations(kwargs["model"], state.global_step, state.max_steps)

    def _apply(self, model: Any, state: Any) -> None:
        schedules = self.schedules
        if schedules is None:
            config = model.config.get_text_config()
            schedules = parse_schedules((getattr(config, "router_config", None) or {}).get("schedules") or {})
        apply_schedules(model, schedules, state.global_step, state.max_steps)
        advance_permutation_search(model, state.global_step, state.max_steps)


@torch.no_grad()
def apply_schedules(
    model: nn.Module, schedules: Mapping[str, Schedule], step: int, max_steps: int | None = None
) -> None:
    """Write the values of `step` into the routers' buffers; for loops without a Trainer, call it before every step.

    Args:
        model (`nn.Module`): Its `BaseRouter`s are written; those without a buffer of that name are skipped.
        schedules (`Mapping[str, Schedule]`): By buffer name, see [`~hf_moe.routing.schedules.parse_schedules`].
        step (`int`): Finished optimizer steps.
        max_steps (`int`, *optional*): Steps of the whole run, for schedules given as fractions.

    Raises:
        ValueError: no router has a 0-dim buffer of that name.
    """
    routers = find_routers(model)
    for name, schedule in schedules.items():
        buffers = list(_scalar_buffers(routers.values(), name))
        if not buffers:
            known = sorted({n for r in routers.values() for n, b in r.named_buffers(recurse=False) if b.dim() == 0})
            raise ValueError(
                f"`schedules` has {name!r}, but no router of {type(model).__name__} has a 0-dim buffer of that name. "
                f"Its routers have {known}."
            )
        value = schedule.value(step, max_steps)
        for buffer in buffers:
            buffer.fill_(value if buffer.is_floating_point() else round(value))


def _scalar_buffers(routers: Iterable[nn.Module], name: str) -> Iterable[torch.Tensor]:
    for router in routers:
        buffer = dict(router.named_buffers(recurse=False)).get(name)
        if buffer is not None and buffer.dim() == 0:
            yield buffer


def _checkpoint_folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _steps_per_epoch(args, train_dataloader) -> int | None:
    """Optimizer steps of an epoch, the last one possibly shorter; `None` where the dataloader has no length."""
    try:
        return max(math.ceil(len(train_dataloader) / args.gradient_accumulation_steps), 1)
    except TypeError:
        return None
