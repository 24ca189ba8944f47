"""Fine-tuning what upcycling has made, with the stock `Trainer`."""

import tempfile
import time

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .data import TokenBlocks


__all__ = ["fine_tune"]


def fine_tune(
    model: PreTrainedModel, blocks: torch.Tensor, *, steps: int, batch_size: int, learning_rate: float, seed: int
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
        trainer = Trainer(model, arguments, train_dataset=TokenBlocks(blocks))
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
