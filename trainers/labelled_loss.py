"""Supervised fine-tuning that computes logits only where there is a label, on the CPU too."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from trl import SFTTrainer

from hf_moe.views import unwrap_model

from .language_head import LanguageHead


__all__ = ["LabelledSFTTrainer"]

# Positions whose logits exist at a time.
CHUNK = 512


class LabelledSFTTrainer(SFTTrainer):
    """[`~trl.SFTTrainer`], which scores every position where it has no Triton, without that: of conversations about
    images one token in ten has a label, and a small language model spends most of its time on its head.

    Loss, gradients and logged figures are the same. What it does not know (other devices, other losses, wanted
    outputs, sharded models) goes to [`~trl.SFTTrainer`].

    Args:
        *args, **kwargs: As in [`~trl.SFTTrainer`].

    Example:

    ```python
    >>> LabelledSFTTrainer(llava, args, train_dataset=rows, processing_class=processor).train()
    ```
    """

    args: Any
    model: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._last_hidden: Any = None
        self._head = LanguageHead(unwrap_model(self.model))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean of the cross-entropy over positions whose next token has a label."""
        if return_outputs or not self._is_plain(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        arguments = {name: value for name, value in inputs.items() if name != "labels"}
        handle = unwrap_model(self.model).base_model.register_forward_hook(self._remember_hidden)
        try:
            # One position is enough for the model's own head.
            model(**arguments, logits_to_keep=1, use_cache=False)
        finally:
            handle.remove()
        hidden, self._last_hidden = self._last_hidden, None
        mask = labels != -100
        hidden, targets = hidden[:, :-1][mask], labels[mask]
        loss = 0.0 * hidden.float().sum()  # nothing labelled: a zero that hangs on the model
        noted = torch.zeros(2)
        for start in range(0, len(targets), CHUNK):
            part = hidden[start : start + CHUNK], targets[start : start + CHUNK]
            one = len(targets) <= CHUNK or not torch.is_grad_enabled()
            sums = self._sums(*part) if one else checkpoint(self._sums, *part, use_reentrant=False)
            loss, noted = loss + sums[0], noted + sums[1]
        total = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = loss / total.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._note_labelled(noted, mask.sum(), inputs)
        return loss

    def _is_plain(self, inputs: dict[str, Any]) -> bool:
        labels = inputs.get("labels")
        return (
            isinstance(labels, torch.Tensor)
            and labels.device.type == "cpu"
            and inputs.get("attention_mask") is not None
            and self.args.loss_type == "nll"
            and self.compute_loss_func is None
            and self.label_smoother is None
            and not self.aux_loss_enabled
            and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        )

    def _remember_hidden(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        self._last_hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state

    def _sums(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._head(hidden)
        with torch.no_grad():
            log_p = F.log_softmax(logits, dim=-1)
            entropy = -(log_p.exp() * log_p).sum()
            correct = (logits.argmax(dim=-1) == targets).sum()
        return F.cross_entropy(logits, targets, reduction="sum"), torch.stack([entropy, correct.float()])

    def _note_labelled(self, noted: torch.Tensor, labelled: torch.Tensor, inputs: dict[str, Any]) -> None:
        mode = "train" if self.model.training else "eval"
        gather: Any = self.accelerator.gather_for_metrics
        values = torch.cat([noted, labelled[None].float()])[None]
        entropy, correct, count = gather(values).sum(0).tolist()
        self._metrics[mode]["entropy"].append(entropy / max(count, 1))
        self._metrics[mode]["mean_token_accuracy"].append(correct / max(count, 1))
        if mode == "train":
            self._total_train_tokens += gather(inputs["attention_mask"].sum()).sum().item() // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
