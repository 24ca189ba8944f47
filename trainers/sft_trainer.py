"""Supervised fine-tuning of Mixture-of-Experts models."""

from trl import SFTTrainer

from .moe_mixin import MoeTrainerMixin


__all__ = ["MoeSFTTrainer"]


class MoeSFTTrainer(MoeTrainerMixin, SFTTrainer):
    """[`~trl.SFTTrainer`] with the router losses of hf_moe; see [`MoeTrainerMixin`] for what that means.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): A model of hf_moe, or where to load it from.
        args ([`MoeSFTConfig`] or `trl.SFTConfig`, *optional*): Configuration of the run.
        *args, **kwargs: As in [`~trl.SFTTrainer`]. LoRA reaches the stacked experts through
            `peft_config=LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])`.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from hf_moe.trainers import MoeSFTConfig, MoeSFTTrainer
    >>> dataset = Dataset.from_list([{"prompt": "The sky is", "completion": " blue."}] * 8)
    >>> trainer = MoeSFTTrainer("my/smollm2-moe", MoeSFTConfig("out", balance_mode="running"), train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "moe"]
