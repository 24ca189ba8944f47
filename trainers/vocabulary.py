"""Whether a tokenizer and a model speak of the same tokens, asked before anything is trained."""

from typing import Any


__all__ = ["check_image_token", "check_vocabulary"]


def check_vocabulary(model: Any, processing_class: Any) -> None:
    """Refuses a tokenizer whose tokens the model has no embeddings for.

    Args:
        model (`PreTrainedModel`): The model.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Its tokenizer, or what has one.

    Raises:
        ValueError: more tokens than rows.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    weight = model.get_input_embeddings().weight
    rows = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves no rows here
    if hasattr(tokenizer, "__len__") and len(tokenizer) > rows:
        raise ValueError(
            f"`processing_class`: its tokenizer knows {len(tokenizer)} tokens, but the vocabulary of `model` has "
            f"{rows}. Use the model's own tokenizer, or resize the embeddings after adding tokens: "
            "`model.resize_token_embeddings(len(tokenizer))`."
        )


def check_image_token(model: Any, processing_class: Any) -> None:
    """Refuses a processor whose placeholder of images is not the model's.

    Args:
        model (`PreTrainedModel`): A LLaVA, dense or sparse.
        processing_class (`ProcessorMixin`): Its processor.

    Raises:
        ValueError: another token.
    """
    theirs, own = getattr(processing_class, "image_token_id", None), model.config.image_token_id
    if theirs is not None and theirs != own:
        raise ValueError(
            f"`processing_class`: its image token is {theirs}, that of `model` {own}, so no image would be found. Use "
            f"the model's own processor, or set `model.config.image_token_id = {theirs}`."
        )
