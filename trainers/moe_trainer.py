"""`Trainer` for Mixture-of-Experts models."""

from transformers import Trainer

from .moe_mixin import MoeTrainerMixin


__all__ = ["MoeTrainer"]


class MoeTrainer(MoeTrainerMixin, Trainer):
    """[`~transformers.Trainer`] with the router losses of hf_moe; see [`MoeTrainerMixin`] for what that means.

    The stock Trainer trains these models too: their `forward` adds the router losses itself. This class adds exact
    scaling where only a part of the tokens has labels, step-wide balance modes without a callback of your own, logs
    and learning rates of routers and experts.

    Args:
        args ([`MoeTrainingArguments`] or `TrainingArguments`, *optional*): Configuration of the run.
        *args, **kwargs: As in [`~transformers.Trainer`].

    Example:

    ```python
    >>> import torch
    >>> from hf_moe import MoeLlamaConfig, MoeLlamaForCausalLM
    >>> from hf_moe.trainers import MoeTrainer, MoeTrainingArguments
    >>> config = MoeLlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    ... )
    >>> rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (8, 16))]
    >>> args = MoeTrainingArguments("out", max_steps=2, use_cpu=True, balance_mode="running")
    >>> trainer = MoeTrainer(MoeLlamaForCausalLM(config), args, train_dataset=rows)
    >>> trainer.train()
    ```
    """
