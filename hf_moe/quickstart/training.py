"""Fine-tuning what upcycling has made, with the stock `Trainer`."""

import tempfile
import time

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from .data import TokenBlocks
from .interrupt import Interrupts


__all__ = ["InterruptsCallback", "fine_tune"]


class InterruptsCallback(TrainerCallback):
    """Asks after every optimizer step.

    Args:
        interrupts ([`Interrupts`]): What to ask.
    """

    def __init__(self, interrupts: Interrupts):
        self.interrupts = interrupts

    def on_step_end(self, args, state, control, **kwargs):
        self.interrupts.check()


def fine_tune(
    model: PreTrainedModel,
    blocks: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    interrupts: Interrupts | None = None,
) -> dict:
    """Train the MoE blocks; attention, norms and embeddings stay those of the dense model.

    The router losses are part of the model's loss in training, so that no special trainer is needed.

    Args:
        model (`PreTrainedModel`): A Mixture-of-Experts model; changed in place.
        blocks (`torch.Tensor` of shape `(M, S)`): Training tokens.
        steps (`int`): Optimizer steps.
        batch_size (`int`): Blocks per step.
        learning_rate (`float`): Peak, after a tenth of the steps; then a cosine down to 0.
        seed (`int`): Order of the blocks.
        interrupts ([`Interrupts`], *optional*): Asked after every step.

    Returns:
        `dict`: Settings, first and last logged loss, seconds.
    """
    from hf_moe.reporting import ExpertLoadCallback
    from hf_moe.views import moe_layers

    model.requires_grad_(False)
    for layer in moe_layers(model):
        model.get_submodule(layer.name).requires_grad_(True)
    with tempfile.TemporaryDirectory(prefix="hf-moe-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            weight_decay=0.1,
            logging_steps=max(1, steps // 8),
            save_strategy="no",
            report_to=[],
            seed=seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        callbacks: list[TrainerCallback] = [] if interrupts is None else [InterruptsCallback(interrupts)]
        trainer = Trainer(model, arguments, train_dataset=TokenBlocks(blocks), callbacks=callbacks)
        ExpertLoadCallback().attach(trainer)
        start = time.perf_counter()
        trainer.train()
    model.requires_grad_(True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": steps,
        "sequences_per_step": batch_size,
        "tokens": steps * batch_size * blocks.shape[1],
        "learning_rate": learning_rate,
        "trained": "MoE blocks",
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds": time.perf_counter() - start,
    }
