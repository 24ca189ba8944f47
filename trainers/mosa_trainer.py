"""`Trainer` for MoSA adapters."""

from transformers import Trainer

from .mosa_mixin import MosaTrainerMixin


__all__ = ["MosaTrainer"]


class MosaTrainer(MosaTrainerMixin, Trainer):
    """[`~transformers.Trainer`] that runs every batch twice with other experts of a MoSA adapter and pulls the two
    answers together; see [`MosaTrainerMixin`] for the loss. For classifiers and causal language models.

    The stock Trainer trains these adapters as well, with one pass per batch and without that loss.

    Args:
        *args, **kwargs: As in [`~transformers.Trainer`]. The weights of the losses are fields of the adapter's config.

    Example:

    ```python
    >>> from hf_moe import MosaConfig
    >>> from hf_moe.trainers import MosaMergeCallback, MosaTrainer
    >>> from peft import get_peft_model
    >>> model = get_peft_model(vit, MosaConfig(r=16, modules_to_save=["classifier"]))
    >>> trainer = MosaTrainer(model, args, train_dataset=rows, callbacks=[MosaMergeCallback()])
    >>> trainer.train()  # the model now holds one plain adapter
    ```

    Paper: MoSA, arXiv 2312.02923.
    """
