"""Leaves plain adapters behind where MoSA adapters were trained."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback


__all__ = ["MosaMergeCallback"]


class MosaMergeCallback(TrainerCallback):
    """Collapses MoSA adapters into plain ones: at the end of training, and, as a copy, beside every checkpoint.

    Evaluation during training needs no callback: outside training mode the adapters are merged.

    After the end the model's adapters have new parameters, so that to train further takes a new Trainer.

    Args:
        collapse (`bool`, defaults to `True`): Collapse the model's adapters when training ends (after the best
            checkpoint has been loaded, if that was asked for); `trainer.save_model()` then writes plain adapters.
        plain_copies (`bool`, defaults to `False`): Write collapsed copies into the folder `plain` of every checkpoint,
            loadable on their own; training goes on with the split adapters. For PEFT models.

    Example:

    ```python
    >>> trainer = MosaTrainer(model, args, train_dataset=rows, callbacks=[MosaMergeCallback(plain_copies=True)])
    ```

    Paper: MoSA, arXiv 2312.02923.
    """

    def __init__(self, collapse: bool = True, plain_copies: bool = False):
        self.collapse = collapse
        self.plain_copies = plain_copies

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Looks for the adapters.

        Raises:
            ValueError: The model has none, or copies cannot be written for it.
        """
        if not _names(model):
            raise ValueError("MosaMergeCallback needs a model with a MoSA adapter, and `model` has none.")
        if self.plain_copies and not hasattr(model, "get_base_model"):
            raise ValueError("`plain_copies=True` needs a PEFT model: make it with `get_peft_model`.")

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Writes the collapsed copies."""
        if not (self.plain_copies and state.is_world_process_zero):
            return
        from hf_moe.adapters.mosa.model import collapsed

        names = _names(model)
        with collapsed(model, names):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "plain"
            model.save_pretrained(folder, selected_adapters=names)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Collapses the model's adapters."""
        if self.collapse:
            from hf_moe.adapters.mosa import collapse_adapter

            for name in _names(model):
                collapse_adapter(model, name)


def _names(model: Any) -> list[str]:
    from hf_moe.adapters import MosaConfig

    configs = getattr(model, "peft_config", None) or {}
    return [name for name, config in configs.items() if isinstance(config, MosaConfig)]
