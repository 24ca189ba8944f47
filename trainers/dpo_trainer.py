"""Direct preference optimization of Mixture-of-Experts models."""

from trl import DPOTrainer

from .moe_mixin import MoeTrainerMixin


__all__ = ["MoeDPOTrainer"]


class MoeDPOTrainer(MoeTrainerMixin, DPOTrainer):
    """[`~trl.DPOTrainer`] with the router losses of hf_moe; see [`MoeTrainerMixin`] for what that means.

    Chosen and rejected answers go through the policy in one pass, and both are balanced. The reference model, or the
    policy with its adapters disabled, adds nothing.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): A model of hf_moe, or where to load it from.
        ref_model (`PreTrainedModel`, *optional*): Reference; of any architecture with the same vocabulary. By default
            the model as it was.
        args ([`MoeDPOConfig`] or `trl.DPOConfig`, *optional*): Configuration of the run.
        *args, **kwargs: As in [`~trl.DPOTrainer`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from hf_moe.trainers import MoeDPOConfig, MoeDPOTrainer
    >>> pair = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    >>> args = MoeDPOConfig("out", balance_mode="running")
    >>> trainer = MoeDPOTrainer("my/smollm2-moe", args=args, train_dataset=Dataset.from_list([pair] * 8))
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "dpo", "moe"]
