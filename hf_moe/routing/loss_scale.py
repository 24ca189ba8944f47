"""The factor that makes a per-micro-batch loss come out once per optimizer step, however losses are reduced."""

import torch


__all__ = ["balance_loss_scale"]


def balance_loss_scale(
    num_tokens: torch.Tensor,
    step_num_tokens: torch.Tensor | None = None,
    num_micro_batches: torch.Tensor | int = 1,
    world_size: int = 1,
    summed_over_ranks: bool = True,
    labels: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    labels_are_shifted: bool = False,
) -> torch.Tensor:
    r"""s of `loss = cross_entropy + s * coefficient * aux_loss`.

    The loss of a step is meant to be sum_{g,r} (T_gr / T) l_gr over its micro-batches g and ranks r. The Trainer makes
    (1/W) sum_r sum_g m loss_gr of what the model returns, with m = W if it passed `num_items_in_batch` (it then sums
    over micro-batches, and undoes the mean over ranks) and m = 1/G if it did not. Equating both gives
    s = (T_gr / T) (W / m):

    - with `num_items_in_batch` and T known: s = T_gr / T.
    - with `num_items_in_batch`, T not known: the share of labels, s = n_gr / num_items_in_batch. What the Trainer
      passes is the sum of n_gr, so the shares sum to 1 over micro-batches and ranks and the coefficient is right
      under the stock Trainer. It is T_gr / T where the same part of all tokens has labels; elsewhere micro-batches
      weigh as they do in the cross-entropy.
    - `average_tokens_across_devices=False`: `num_items_in_batch` counts this rank and m = 1. The share of labels
      already sums to 1 per rank, which the mean over ranks keeps; the share of tokens needs the factor W.
    - without `num_items_in_batch`, T known: s = G W T_gr / T. Not known: s = 1, exact for equal sizes.

    Models that add `coefficient * aux_loss` without s, as those in transformers do, train with G W times the
    coefficient once `num_items_in_batch` is passed.

    Args:
        num_tokens (`torch.Tensor`): T_gr, 0-dim.
        step_num_tokens (`torch.Tensor`, *optional*): T, 0-dim; `None` where it is not known.
        num_micro_batches (`torch.Tensor` or `int`, defaults to 1): G of this step.
        world_size (`int`, defaults to 1): W.
        summed_over_ranks (`bool`, defaults to `True`): `TrainingArguments.average_tokens_across_devices`.
        labels (`torch.Tensor` of shape `(B, S)` or `(B,)`, *optional*): Labels of this micro-batch, -100 is ignored.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): What the Trainer passed to the model.
        labels_are_shifted (`bool`, defaults to `False`): Whether position 0 of `labels` `(B, S)` is counted.

    Returns:
        `torch.Tensor`, 0-dim.

    Example:

    ```python
    >>> labels = torch.tensor([[1, 2, 3, -100]])  # 2 predictions of 8 in the step
    >>> balance_loss_scale(torch.tensor(4), labels=labels, num_items_in_batch=8)
    tensor(0.2500)
    ```
    """
    device = num_tokens.device
    if step_num_tokens is not None:
        share = num_tokens / step_num_tokens.clamp(min=1)
        if num_items_in_batch is None:
            return share * num_micro_batches * world_size
        return share if summed_over_ranks else share * world_size
    if num_items_in_batch is None or labels is None:
        return torch.ones((), device=device)
    if labels.dim() > 1 and not labels_are_shifted:
        labels = labels[..., 1:]  # as the causal loss and the Trainer's count do
    num_items = torch.as_tensor(num_items_in_batch, device=device).reshape(-1)[0]
    return labels.ne(-100).sum().to(device) / num_items.clamp(min=1)
