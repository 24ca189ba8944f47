"""How good a model is with fewer or more experts than it was trained with."""

from collections.abc import Callable, Iterable
from typing import Any

from hf_moe.routing.slimming import num_experts_per_tok
from hf_moe.views import unwrap_model


__all__ = ["evaluate_at_k"]


def evaluate_at_k(trainer: Any, ks: Iterable[int], evaluate: Callable[[Any], Any] | None = None) -> dict[int, Any]:
    """The self-slimming curve of [SMoE-Dropout](https://huggingface.co/papers/2303.01610), Sec. 4: one trained model,
    evaluated with several numbers of experts per token.

    Args:
        trainer (`Trainer` or `nn.Module`): A trainer, whose `evaluate` is called, or a model.
        ks (`Iterable[int]`): Numbers of experts.
        evaluate (`Callable`, *optional*): `evaluate(model)`; needed where a model is given.

    Returns:
        `dict[int, Any]`: Number of experts to what the evaluation returned.

    Raises:
        ValueError: the model's routers do not choose a fixed number of experts, or there is nothing to evaluate with.

    Example:

    ```python
    >>> evaluate_at_k(trainer, (1, 2, 4, 8, 16))[4]["eval_loss"]
    2.71
    ```
    """
    is_trainer = hasattr(trainer, "evaluate")
    if evaluate is None and not is_trainer:
        raise ValueError(
            "`evaluate` is missing: a model alone cannot say how good it is. Pass a trainer, or a function."
        )
    model = unwrap_model(trainer.accelerator.unwrap_model(trainer.model) if is_trainer else trainer)
    found = {}
    for k in ks:
        with num_experts_per_tok(model, k):
            found[k] = trainer.evaluate() if evaluate is None else evaluate(model)
    return found
