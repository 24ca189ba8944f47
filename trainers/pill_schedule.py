"""Learning rates of PILL's recipe (arXiv 2311.02126)."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


__all__ = ["pill_learning_rate", "pill_schedule"]


def pill_learning_rate(base: float, batch_size: int) -> float:
    """base * batch size / 256: what the authors' base rates (1e-3 for captions, 2e-3 for ScienceQA) mean.

    Args:
        base (`float`): Rate for a batch of 256.
        batch_size (`int`): Rows per optimizer step: per device, times devices, times accumulation.

    Returns:
        `float`

    Raises:
        ValueError: `batch_size` is below 1.

    Example:
        ```python
        pill_learning_rate(2e-3, 32)  # 2.5e-4
        ```
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    return base * batch_size / 256


def pill_schedule(
    optimizer: Optimizer,
    align_steps: int,
    num_training_steps: int,
    *,
    align_warmup: int = 0,
    instruct_warmup: int = 0,
    instruct_factor: float = 1.0,
) -> LambdaLR:
    """Linear warm-up and half a cosine down to zero, once for each stage.

    Args:
        optimizer (`torch.optim.Optimizer`): Its rates are those of the stage "align".
        align_steps (`int`): Steps of that stage, as for [`~hf_moe.trainers.PillStageCallback`].
        num_training_steps (`int`): Steps of both stages together.
        align_warmup (`int`, *optional*, defaults to 0): Steps of warm-up in "align".
        instruct_warmup (`int`, *optional*, defaults to 0): Steps of warm-up in "instruct".
        instruct_factor (`float`, *optional*, defaults to 1.0): Rate of "instruct" over that of "align".

    Returns:
        `LambdaLR`: For `Trainer(..., optimizers=(optimizer, schedule))`.

    Raises:
        ValueError: The steps do not add up.

    Example:
        ```python
        schedule = pill_schedule(optimizer, align_steps=300, num_training_steps=1000, instruct_factor=2.0)
        ```
    """
    instruct_steps = num_training_steps - align_steps
    if not 0 <= align_steps <= num_training_steps:
        raise ValueError(f"`align_steps` must be between 0 and {num_training_steps}, got {align_steps}.")
    if not 0 <= align_warmup <= align_steps or not 0 <= instruct_warmup <= instruct_steps:
        raise ValueError(
            f"`align_warmup` must be at most {align_steps} and `instruct_warmup` at most {instruct_steps}, got "
            f"{align_warmup} and {instruct_warmup}."
        )

    def factor(step: int) -> float:
        if step < align_steps:
            return _warm_cosine(step, align_warmup, align_steps)
        return instruct_factor * _warm_cosine(step - align_steps, instruct_warmup, instruct_steps)

    return LambdaLR(optimizer, factor)


def _warm_cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
