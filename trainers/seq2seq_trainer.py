"""`Seq2SeqTrainer` for Mixture-of-Experts models with an encoder and a decoder."""

from dataclasses import dataclass

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from .moe_config import MoeArguments
from .moe_mixin import MoeTrainerMixin


__all__ = ["MoeSeq2SeqTrainer", "MoeSeq2SeqTrainingArguments"]


@dataclass
class MoeSeq2SeqTrainingArguments(MoeArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` of [`MoeSeq2SeqTrainer`], with the fields of
    [`~hf_moe.trainers.moe_config.MoeArguments`].

    Example:

    ```python
    >>> from hf_moe.trainers import MoeSeq2SeqTrainingArguments
    >>> args = MoeSeq2SeqTrainingArguments("out", predict_with_generate=True, router_aux_loss_coef=0.01)
    ```
    """


class MoeSeq2SeqTrainer(MoeTrainerMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] with the router losses of hf_moe; see [`MoeTrainerMixin`] for what that means.

    Encoder and decoder have a load balancer each: source tokens and target tokens are counted, and weigh, by
    themselves. The loss holds the sum of both balance losses, the log `aux_loss` their mean.

    Example:

    ```python
    >>> from hf_moe.trainers import MoeSeq2SeqTrainer, MoeSeq2SeqTrainingArguments
    >>> trainer = MoeSeq2SeqTrainer(
    ...     model, MoeSeq2SeqTrainingArguments("out"), train_dataset=dataset, data_collator=collator
    ... )
    ```
    """
