"""The part of the unlearning trainer that evaluates."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer_utils import speed_metrics

from hf_moe.modes import eval_mode
from hf_moe.views import unwrap_model

from .unlearning_data import TokenRows
from .unlearning_metrics import balance_metrics, cross_entropy_of


__all__ = ["UnlearningEvaluationMixin"]

if TYPE_CHECKING:  # what it is mixed into has all of this
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class UnlearningEvaluationMixin(_Trainer):
    """Goes in front of a Trainer class that has the sets below and a `reference()`.

    Attributes:
        eval_forget ([`TokenRows`]): What was to be forgotten.
        eval_retain (`dict[str, TokenRows]`): What was to be kept, by name; one set alone has the name `""`.
        compute_utility (`Callable`, *optional*): Takes the model, returns further numbers.
    """

    args: Any
    model: Any
    reference: Callable
    eval_forget: TokenRows
    eval_retain: dict[str, TokenRows]
    compute_utility: Callable | None
    _start: dict[str, float]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Cross-entropy on what was to be forgotten and on what was to be kept.

        Args:
            eval_dataset: Must be left out; the trainer was given the sets.
            ignore_keys (`list[str]`, *optional*): Unused.
            metric_key_prefix (`str`, defaults to `"eval"`): In front of every name.

        Returns:
            `dict[str, float]`: `eval_forget_loss` and `_perplexity`; `eval_retain_loss` and `_perplexity` (mean over
            several sets, which follow by name); `eval_forgetting` (0 as at the start, 1 at `forget_loss_target`),
            `eval_utility` (retain perplexity at the start over that now, at most 1) and `eval_balance`, the harmonic
            mean of the two; what `compute_utility` returns.

        Raises:
            ValueError: `eval_dataset` was given.
        """
        if eval_dataset is not None:
            raise ValueError(
                "`eval_dataset` cannot be given: a forget set and a retain set are evaluated together. Pass "
                "`eval_forget_dataset` and `eval_retain_dataset` to the trainer."
            )
        self._memory_tracker.start()
        began = time.time()
        start = self.measure_start()
        with eval_mode(self.model):
            now = self._cross_entropies(self.model)
            extra = {} if self.compute_utility is None else dict(self.compute_utility(self.model))
        metrics = {}
        for name, value in now.items():
            metrics[f"{name}_loss"] = value
            metrics[f"{name}_perplexity"] = math.exp(min(value, 700.0))
        metrics |= balance_metrics(
            now["forget"], now.get("retain"), start["forget"], start.get("retain"), self._forgotten()
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {**metrics, **extra}.items()}
        samples = len(self.eval_forget) + sum(len(rows) for rows in self.eval_retain.values())
        metrics.update(speed_metrics(metric_key_prefix, began, num_samples=samples))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def measure_start(self) -> dict[str, float]:
        """Cross-entropies at the start: of this model without its slices, or of this model before training.

        Returns:
            `dict[str, float]`: `forget`, and `retain` where there is such a set.
        """
        if not self._start:
            if self.args.trainable == "expert":
                with self.reference() as reference:
                    self._start = self._cross_entropies(reference)
            else:
                with eval_mode(self.model):
                    self._start = self._cross_entropies(self.model)
        return self._start

    def _cross_entropies(self, model: nn.Module) -> dict[str, float]:
        found = {"forget": cross_entropy_of(model, self.eval_forget, self)}
        retained = {name: cross_entropy_of(model, rows, self) for name, rows in self.eval_retain.items()}
        if retained:
            found["retain"] = sum(retained.values()) / len(retained)
        return found | {f"retain_{name}": value for name, value in retained.items() if name}

    def _forgotten(self) -> float:
        if self.args.forget_loss_target is not None:
            return self.args.forget_loss_target
        return math.log(unwrap_model(self.model).config.get_text_config().vocab_size)
