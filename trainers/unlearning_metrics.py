"""What evaluation says about forgetting and utility."""

import math
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from hf_moe.attribution import pad_token_rows

from .unlearning_data import TokenRows
from .unlearning_losses import token_cross_entropy


__all__ = ["balance_metrics", "cross_entropy_of"]


@torch.no_grad()
def cross_entropy_of(model: nn.Module, rows: TokenRows, trainer: Any) -> float:
    """Mean cross-entropy per token of a set of rows, which the processes share among themselves.

    Args:
        model (`nn.Module`): In eval mode.
        rows ([`TokenRows`]): What to evaluate.
        trainer (`Trainer`): Whose arguments and accelerator are used.

    Returns:
        `float`: In nats.
    """
    accelerator = trainer.accelerator
    share = Subset(rows, range(accelerator.process_index, len(rows), accelerator.num_processes))
    pad = trainer.data_collator.pad_token_id
    loader: Any = DataLoader(
        share, batch_size=trainer.args.eval_batch_size, collate_fn=lambda batch: pad_token_rows(batch, pad)
    )
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in loader:
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with trainer.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False, **trainer.forward_options).logits
        total[0] += token_cross_entropy(logits, batch["labels"], "sum").double()
        total[1] += (batch["labels"][:, 1:] != -100).sum()
    summed: Any = accelerator.reduce(total, "sum")
    return float(summed[0] / summed[1].clamp_min(1))


def balance_metrics(
    forget: float, retain: float | None, start_forget: float, start_retain: float | None, forgotten: float
) -> dict[str, float]:
    """How much is forgotten, how much utility is left, and one number for both.

    Args:
        forget, retain (`float`): Cross-entropies now.
        start_forget, start_retain (`float`): At the start.
        forgotten (`float`): Cross-entropy of the forget set from which on it counts as forgotten.

    Returns:
        `dict[str, float]`: `forgetting` (0 at the start, 1 from `forgotten` on), `utility` (perplexity on the retain
        set at the start over that now, at most 1) and `balance` (their harmonic mean).
    """
    distance = max(forgotten - start_forget, 1e-6)
    forgetting = min(max((forget - start_forget) / distance, 0.0), 1.0)
    if retain is None or start_retain is None:
        return {"forgetting": forgetting}
    utility = min(math.exp(start_retain - retain), 1.0) if retain > start_retain - 700 else 1.0
    both = forgetting + utility
    return {
        "forgetting": forgetting,
        "utility": utility,
        "balance": 2 * forgetting * utility / both if both > 0 else 0.0,
    }
