"""Routing of fixed texts, watched while a Trainer trains.

Shapes: T tokens, N experts.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from hf_moe.views import moe_layers, unwrap_model

from .collect import Collector, check_arguments, model_title
from .drawing import evenly_spaced
from .passes import RoutedBatch, longest_window, route
from .report import RoutingReport
from .shift import ShiftReport, routing_shift
from .snapshot import RoutingSnapshot, SnapshotCollector
from .windows import check_tokenizer, token_batches, token_windows


__all__ = ["RoutingReportCallback"]

logger = logging.get_logger(__name__)

EXAMPLES_PER_EXPERT = 12


class RoutingReportCallback(TrainerCallback):
    """Routes the same texts again and again during training, and logs how the routing looks and how it shifts.

    Where [`ExpertLoadCallback`] counts the training batches, which differ from step to step, this one asks what
    becomes of the same tokens. Values go through the Trainer's own `log`: to its history, the console, TensorBoard,
    W&B, trackio and whatever else it reports to. Their number does not depend on the size of the model:

    | key | meaning, mean over layers |
    |---|---|
    | `routing_probe/entropy`, `load_entropy`, `active_experts`, `dead_share` | as in [`ExpertLoadCallback`] |
    | `.../max_violation`, `max_violation_worst_layer` | the same |
    | `.../class_shift`, `position_shift` | how much the class or place of a token says about its expert |
    | `.../selection_shift`, `selection_shift_worst_layer` | share of a token's experts that were others at the start |
    | `.../load_shift`, `probability_shift`, `best_shift`, `token_shift` | see [`~hf_moe.reporting.LayerShift`] |
    | `.../layer_<i>/selection_shift`, `load_shift`, `max_violation` | for `per_layer` evenly spaced layers |

    Several processes share the texts and log the same sums.

    Args:
        tokenizer: The model's tokenizer.
        texts (`Iterable[str]`): What to route; read once, up to `max_tokens`.
        every (`"evaluate"` or `int`, defaults to `"evaluate"`): When: after every evaluation, or every so many steps.
            Always also when training begins and ends.
        per_layer (`int`, defaults to 0): Layers to log one by one.
        output_dir (`str`, *optional*): At the end the main process writes `report.md` and `shift.md` with their plots
            there. A relative path is below the Trainer's `output_dir`. Nothing is written by default.
        max_tokens (`int`, defaults to 4,096): T at most.
        max_length (`int`, *optional*): Tokens of a window; by default 512, or the model's longest if that is less.
        batch_size (`int`, defaults to 8): Windows per forward pass.
        token_classes (`Callable[[str], str]`, *optional*): As in [`routing_report`].

    Raises:
        ValueError: an argument out of range; or, when training begins, no MoE layer, no text, a tokenizer that does
            not belong to the model, or no Trainer to log through.

    Example:
        ```python
        trainer = Trainer(model, args, train_dataset=dataset, eval_dataset=held_out)
        RoutingReportCallback(tokenizer, texts, output_dir="routing").attach(trainer)
        trainer.train()
        ```
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Iterable[str],
        *,
        every: int | Literal["evaluate"] = "evaluate",
        per_layer: int = 0,
        output_dir: str | None = None,
        max_tokens: int = 4096,
        max_length: int | None = None,
        batch_size: int = 8,
        token_classes: Callable[[str], str] | None = None,
    ):
        if every != "evaluate" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"`every` must be 'evaluate' or a number of steps of at least 1, got {every!r}.")
        if per_layer < 0:
            raise ValueError(f"`per_layer` must be 0 or more, got {per_layer}.")
        if isinstance(texts, str):
            raise ValueError("`texts` must be a list of texts, got a single one. Write `[text]`.")
        check_arguments(max_tokens=max_tokens, max_length=max_length, batch_size=batch_size)
        self.tokenizer, self.texts = tokenizer, texts
        self.every, self.per_layer, self.output_dir = every, per_layer, output_dir
        self.max_tokens, self.max_length, self.batch_size = max_tokens, max_length, batch_size
        self.token_classes = token_classes
        self.report: RoutingReport | None = None
        self.shift: ShiftReport | None = None
        self._trainer: Any = None
        self._windows: list[list[int]] | None = None
        self._start: RoutingSnapshot | None = None
        self._logged_at = -1

    def attach(self, trainer: Any) -> "RoutingReportCallback":
        """Adds the callback to `trainer`, whose `log` it uses.

        Args:
            trainer (`Trainer`): Any Trainer, before `train()`.

        Returns:
            [`RoutingReportCallback`]: itself; `report` and `shift` hold the latest results during and after training.
        """
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        if self._trainer is None:
            raise ValueError(
                "RoutingReportCallback has no Trainer to log through. Add it with "
                "`RoutingReportCallback(...).attach(trainer)` instead of `callbacks=[...]`."
            )
        self._start, self._logged_at = None, -1
        self._probe(model, state.global_step)

    def on_step_end(self, args, state, control, model: Any = None, **kwargs):
        if self.every != "evaluate" and state.global_step % self.every == 0:
            self._probe(model, state.global_step)

    def on_evaluate(self, args, state, control, model: Any = None, **kwargs):
        if self.every == "evaluate" and self._start is not None:  # not an evaluation before any training
            self._probe(model, state.global_step)

    def on_train_end(self, args, state, control, model: Any = None, **kwargs):
        self._probe(model, state.global_step)
        if self.output_dir is not None and state.is_world_process_zero:
            assert self.report is not None and self.shift is not None
            folder = Path(args.output_dir, self.output_dir)
            self.report.save(folder)
            self.shift.save(folder)
            logger.info(f"Routing reports: {folder}")

    def _probe(self, model: Any, step: int) -> None:
        """Routes the texts, keeps the results and logs them; once per step."""
        if step == self._logged_at:
            return
        self._logged_at = step
        inner: Any = unwrap_model(model)
        vocabulary = inner.get_input_embeddings().weight.shape[0]
        if self._windows is None:
            check_tokenizer(self.tokenizer, vocabulary)
            length = self.max_length or longest_window(inner.config)
            self._windows = list(token_windows(self.tokenizer, self.texts, length, self.max_tokens))
            if not self._windows:
                raise ValueError("`texts` holds no token: there is nothing to route. Pass texts that are not empty.")
        views = moe_layers(inner)
        collector, tokens = Collector(views, vocabulary), SnapshotCollector(views)

        def take(batch: RoutedBatch) -> None:
            collector.take(batch)
            tokens.take(batch)

        windows, counted = self._share()
        batches = token_batches(windows, self.batch_size, self.tokenizer.pad_token_id)
        route(inner, batches, take if counted else lambda batch: take(_uncounted(batch)))
        title = model_title(inner)
        snapshot = tokens.snapshot(f"{title}, step {step}")
        self._start = self._start or snapshot
        self.shift = routing_shift(self._start, snapshot, reduce=True)
        whole = collector.reduce()
        self.report = whole.report(self.tokenizer, EXAMPLES_PER_EXPERT, f"{title}, step {step}", self.token_classes)
        self._trainer.log(self._values(whole.stats.compute().scalars()))

    def _share(self) -> tuple[list[list[int]], bool]:
        """This process's windows. All processes get equally many, as sharded models need everybody at every forward:
        a text of fewer windows than processes is routed by all of them and counted by the first.
        """
        assert self._windows is not None
        rank, world = 0, 1
        if dist.is_available() and dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
        if len(self._windows) < world:
            return self._windows, rank == 0
        return self._windows[rank::world][: len(self._windows) // world], True

    def _values(self, scalars: dict[str, float]) -> dict[str, float]:
        assert self.report is not None and self.shift is not None
        metrics = self.report.metrics()
        values = {
            **scalars,
            **{key: metrics[key] for key in ("class_shift", "position_shift")},
            **self.shift.metrics(),
        }
        for row in evenly_spaced(len(self.report.layers), self.per_layer):
            values[f"layer_{row}/max_violation"] = self.report.layers[row].max_violation
            values[f"layer_{row}/load_shift"] = self.shift.layers[row].load_shift
            values[f"layer_{row}/selection_shift"] = self.shift.layers[row].selection_shift
        return {f"routing_probe/{key}": value for key, value in values.items()}


def _uncounted(batch: RoutedBatch) -> RoutedBatch:
    return batch._replace(token_mask=batch.token_mask.new_zeros(batch.token_mask.shape))
