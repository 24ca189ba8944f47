"""What the trainers' configurations have in common."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


__all__ = ["MoeArguments", "MoeTrainingArguments"]


@dataclass
class MoeArguments:
    """Arguments every configuration of a Mixture-of-Experts trainer adds. What is left out is as the model's config
    says; what is given is written into it, and so saved with the model.

    Args:
        router_aux_loss_coef (`float`, *optional*): Weight of the load-balance loss. 0 turns it off.
        router_z_loss_coef (`float`, *optional*): Weight of the router z-loss. 0 turns it off.
        balance_mode (`str`, *optional*): Where expert frequencies are taken from: `"micro"`, `"rank"`, `"running"`,
            `"lagged"` or `"blend"`; see [`~hf_moe.LoadBalancer`].
        router_learning_rate (`float`, *optional*): Learning rate of routers; `learning_rate` by default. The schedule
            scales it alike.
        expert_learning_rate (`float`, *optional*): Learning rate of experts; `learning_rate` by default.
    """

    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the load-balance loss; as the model's config says by default."}
    )
    router_z_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the router z-loss; as the model's config says by default."}
    )
    balance_mode: str | None = field(
        default=None,
        metadata={
            "help": "Where expert frequencies are taken from: micro, rank, running, lagged or blend; as the model's "
            "config says by default."
        },
    )
    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of routers; `learning_rate` by default."}
    )
    expert_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of experts; `learning_rate` by default."}
    )


@dataclass
class MoeTrainingArguments(MoeArguments, TrainingArguments):
    """`TrainingArguments` of [`MoeTrainer`], with the fields of [`~hf_moe.trainers.moe_config.MoeArguments`].

    Example:

    ```python
    >>> from hf_moe.trainers import MoeTrainingArguments
    >>> args = MoeTrainingArguments("out", balance_mode="running", router_learning_rate=1e-4)
    ```
    """
