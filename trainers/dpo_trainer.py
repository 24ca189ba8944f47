"""Direct preference optimization of Mixture-of-Experts models."""

import copy
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
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
            the model as it is: with an adapter the model without it, else a copy. (TRL loads the copy from where
            the model came from, which for a model just upcycled is nowhere, or the dense model.)
        args ([`MoeDPOConfig`] or `trl.DPOConfig`, *optional*): Configuration of the run.
        *args, **kwargs: As in [`~trl.DPOTrainer`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from hf_moe import upcycle
    >>> from hf_moe.trainers import MoeDPOConfig, MoeDPOTrainer
    >>> name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    >>> tokenizer = AutoTokenizer.from_pretrained(name)
    >>> moe, _ = upcycle(AutoModelForCausalLM.from_pretrained(name), num_experts=4, top_k=2, target="moe_llama")
    >>> dataset = Dataset.from_list([{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}] * 8)
    >>> args = MoeDPOConfig("out", max_steps=2, use_cpu=True, balance_mode="running")
    >>> trainer = MoeDPOTrainer(moe, args=args, train_dataset=dataset, processing_class=tokenizer)
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "dpo", "moe"]

    def __init__(self, model: Any, ref_model: PreTrainedModel | None = None, args: Any = None, *rest, **kwargs):
        precomputed = args is not None and args.precompute_ref_log_probs
        is_full = isinstance(model, PreTrainedModel) and kwargs.get("peft_config") is None
        if ref_model is None and is_full and not precomputed and not is_deepspeed_zero3_enabled():
            ref_model = copy.deepcopy(model)
        super().__init__(model, ref_model, args, *rest, **kwargs)
