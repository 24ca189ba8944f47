"""Configuration of supervised fine-tuning."""

from dataclasses import dataclass

from trl import SFTConfig

from .moe_config import MoeArguments


__all__ = ["MoeSFTConfig"]


@dataclass
class MoeSFTConfig(MoeArguments, SFTConfig):
    """`trl.SFTConfig` of [`MoeSFTTrainer`], with the fields of [`~hf_moe.trainers.moe_config.MoeArguments`].

    Example:

    ```python
    >>> from hf_moe.trainers import MoeSFTConfig
    >>> args = MoeSFTConfig("out", use_cpu=True, balance_mode="running", router_learning_rate=1e-4)
    ```
    """
