"""The part that makes a Trainer train MoSA adapters as the paper does: every batch twice, with other experts."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_moe.views import unwrap_model

from .mosa_losses import feature_distance, symmetric_kl


__all__ = ["MosaTrainerMixin"]

if TYPE_CHECKING:  # what it is mixed into has all of this
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class MosaTrainerMixin(_Trainer):
    r"""Goes in front of a Trainer class, which then trains the model's active [`~hf_moe.MosaConfig`] adapter with

    L = CE(p1) + alpha CE(p2) + beta 1/2 [KL(sg p2 || p1) + KL(sg p1 || p2)]

    where p1 and p2 come from two passes over the batch that draw their experts anew. alpha is the config's
    `second_ce_weight`, beta its `consistency_weight`; `feature_weight` adds the distance of the passes' block outputs.
    With all three at zero each batch runs once, which the stock Trainer does as well. The KL term is a mean over the
    rows of the batch, over the labelled positions for language models and token classifiers; it is scaled as the
    cross-entropy is under gradient accumulation and across processes.

    With `draw_seed` in the config, all processes draw the same experts, and a resumed run draws what the uninterrupted
    one would have: each pass runs with a torch generator seeded by (`draw_seed`, step, micro-batch, pass), dropout
    included. Gradient checkpointing repeats a pass with the pass's own generator state.

    Note: the paper leaves open what its second pass does to dropout. Here both passes have it, so that the KL term is
    not zero with `num_experts=1` unless dropout is.

    Raises:
        ValueError: The model has no MoSA adapter; or, in training, its output has no logits of classes.

    Example:

    ```python
    >>> from transformers import Seq2SeqTrainer
    >>> from hf_moe.trainers import MosaTrainerMixin
    >>> class MosaSeq2SeqTrainer(MosaTrainerMixin, Seq2SeqTrainer):
    ...     pass
    ```
    """

    model: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._consistency_noted: tuple[Any, int] = (0.0, 0)  # sum and number since the last log
        self._micro_batch = (-1, 0)  # step, number in the step
        if not _configs(self.model):
            raise ValueError(
                f"{type(self).__name__} trains MoSA adapters, but `model` has none. Add one with "
                "`get_peft_model(model, MosaConfig(...))`, or use the Trainer of transformers."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of two passes in training, the loss of the class below in evaluation."""
        config = next(iter(_configs(self.model)), None)
        alpha, beta, gamma = (0.0, 0.0, 0.0) if config is None else _weights(config)
        training = self.model.training and torch.is_grad_enabled()
        seed = None if config is None or not training else config.draw_seed
        step = self.state.global_step
        number = self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0
        if training:
            self._micro_batch = (step, number)
        if not (training and (alpha or beta or gamma)):
            with self._draws(seed, step, number, 0):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if gamma:
            inputs = {**inputs, "output_hidden_states": True}
        results: list[Any] = []
        for index in range(2):
            with self._draws(seed, step, number, index):
                results.append(super().compute_loss(model, dict(inputs), True, num_items_in_batch))
        (loss, outputs), (second_loss, second) = results
        if alpha:
            loss = loss + alpha * second_loss
        if beta:
            loss = loss + beta * self._consistency(outputs, second, inputs, num_items_in_batch).to(loss.device)
        if gamma:
            # a mean over the batch, so that in a sum over micro-batches it has to be divided by their number
            parts = self.current_gradient_accumulation_steps if self._is_summed(num_items_in_batch) else 1
            features = feature_distance(outputs.hidden_states, second.hidden_states)
            loss = loss + gamma / parts * features.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _consistency(
        self, outputs: Any, second: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        logits: list[Any] = [_logits(outputs), _logits(second)]
        base = unwrap_model(self.accelerator.unwrap_model(self.model))
        problem = getattr(getattr(base, "config", None), "problem_type", None)
        unusable = logits[0] is None or logits[0].shape[-1] < 2
        if unusable or problem in ("regression", "multi_label_classification"):
            raise ValueError(
                f"`consistency_weight` compares the classes' probabilities of two passes, but {type(base).__name__} "
                "gives no logits of classes here. Set `consistency_weight=0.0` in the MosaConfig; for language models "
                "use MosaTrainer, as TRL's trainers do not compute logits."
            )
        divergence = symmetric_kl(*logits)  # (B,) or (B, T)
        labels = inputs.get("labels")
        if labels is not None and labels.shape == divergence.shape:
            shifts = divergence.ndim == 2 and self._loss_shifts_labels
            counted = (labels[..., 1:] if shifts else labels).ne(-100).to(divergence.device)
            divergence = divergence[..., :-1] if shifts else divergence
            total, count = (divergence * counted).sum(), counted.sum().clamp(min=1)
        else:
            total, count = divergence.sum(), divergence.numel()
        mean = total / count
        noted, passes = self._consistency_noted
        self._consistency_noted = (noted + mean.detach(), passes + 1)
        if not self._is_summed(num_items_in_batch):
            return mean
        # as the Trainer does with the cross-entropy: a sum over the step's items, undone by DDP's mean over ranks
        ranks = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        items: Any = num_items_in_batch
        return total * ranks / items

    def _is_summed(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        return num_items_in_batch is not None and (
            self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        )

    @contextmanager
    def _draws(self, seed: int | None, step: int, number: int, index: int) -> Iterator[None]:
        """Inside, torch's generator is the one of this pass, the same on all ranks; as it was otherwise."""
        if seed is None:
            yield
            return
        device = self.args.device
        others = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices=others, device_type=device.type if others else "cuda"):
            torch.manual_seed(zlib.crc32(f"{seed} {step} {number} {index}".encode()))
            yield

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in the class below, with the mean of the KL terms since the last log as `consistency_loss`."""
        noted, passes = self._consistency_noted
        if self.model.training and passes:
            mean: Any = self.accelerator.reduce(noted / passes, "mean")
            logs["consistency_loss"] = mean.item()
            self._consistency_noted = (0.0, 0)
        super().log(logs, *args, **kwargs)


def _configs(model: Any) -> list[Any]:
    """The configs of the active MoSA adapters of a PEFT model, or of a model with adapters of its own."""
    from hf_moe.adapters import MosaConfig

    found = getattr(model, "peft_config", None)
    if not found:
        return []
    active: Any = model.active_adapters
    active = active() if callable(active) else active
    return [found[name] for name in active if isinstance(found.get(name), MosaConfig)]


def _weights(config: Any) -> tuple[float, float, float]:
    return config.second_ce_weight, config.consistency_weight, config.feature_weight


def _logits(outputs: Any) -> torch.Tensor | None:
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    return logits if isinstance(logits, torch.Tensor) else None
