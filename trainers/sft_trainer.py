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
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from hf_moe import upcycle
    >>> from hf_moe.trainers import MoeSFTConfig, MoeSFTTrainer
    >>> name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    >>> tokenizer = AutoTokenizer.from_pretrained(name)
    >>> moe, _ = upcycle(AutoModelForCausalLM.from_pretrained(name), num_experts=4, top_k=2, target="moe_llama")
    >>> dataset = Dataset.from_list([{"prompt": "The sky is", "completion": " blue."}] * 8)
    >>> args = MoeSFTConfig("out", max_steps=2, use_cpu=True, balance_mode="running", router_learning_rate=1e-4)
    >>> trainer = MoeSFTTrainer(moe, args, train_dataset=dataset, processing_class=tokenizer)
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "moe"]
