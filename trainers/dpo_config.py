"""Configuration of direct preference optimization."""

from dataclasses import dataclass

from trl import DPOConfig

from .moe_config import MoeArguments


__all__ = ["MoeDPOConfig"]


@dataclass
class MoeDPOConfig(MoeArguments, DPOConfig):
    """`trl.DPOConfig` of [`MoeDPOTrainer`], with the fields of [`~hf_moe.trainers.moe_config.MoeArguments`].

    Example:

    ```python
    >>> from hf_moe.trainers import MoeDPOConfig
    >>> args = MoeDPOConfig("out", use_cpu=True, balance_mode="running", router_learning_rate=1e-4)
    ```
    """
