"""A dense LLaVA from a vision tower and a language model that were trained apart: where MoE-LLaVA's stage 1 starts."""

from typing import Any

import torch
from transformers import AddedToken, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel
from transformers.models.llava.processing_llava import LlavaProcessor


__all__ = ["assemble_llava"]

IMAGE_TOKEN = "<image>"


def assemble_llava(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    tokenizer: Any,
    image_processor: Any,
    *,
    vision_feature_layer: int | list[int] = -2,
    vision_feature_select_strategy: str = "default",
    chat_template: str | None = None,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Puts a new projector between a vision tower and a language model.

    The image token is added to the tokenizer; the language model gains a row for it where it has no spare one. Both
    models' modules are used as they are, not copied.

    Args:
        vision_tower (`PreTrainedModel`): Anything that returns `hidden_states` of shape `(B, P, D_v)` for
            `pixel_values`, such as `CLIPVisionModel` or `SiglipVisionModel`, of square images, with a registered
            config that has `hidden_size`, `image_size` and `patch_size`.
        language_model (`PreTrainedModel`): A causal language model, such as `LlamaForCausalLM`.
        tokenizer: Its tokenizer; gains `<image>`.
        image_processor: The tower's image processor.
        vision_feature_layer (`int` or `list[int]`, defaults to -2): Hidden states of the tower that are projected.
        vision_feature_select_strategy (`str`, defaults to `"default"`): `"default"` leaves out the first row (a class
            token), `"full"` keeps all.
        chat_template (`str`, *optional*): Of the processor; by default the tokenizer's, which must then know images.
        seed (`int`, defaults to 0): Of the projector's first values.

    Returns:
        `tuple`: `LlavaForConditionalGeneration` in evaluation mode and the dtype of the language model, and its
        `LlavaProcessor`.

    Raises:
        ValueError: an unknown strategy, or a language model whose head has a bias, which LLaVA's has not.

    Example:

    ```python
    >>> llava, processor = assemble_llava(tower, language_model, tokenizer, image_processor)
    >>> moe, report = upcycle_llava(llava)
    ```
    """
    if vision_feature_select_strategy not in ("default", "full"):
        raise ValueError(
            f"`vision_feature_select_strategy` must be 'default' or 'full', got {vision_feature_select_strategy!r}."
        )
    head: Any = language_model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"`language_model` ({type(language_model).__name__}) has a head with a bias, which LLaVA's head has not."
        )
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    embeddings: Any = language_model.get_input_embeddings()
    if len(tokenizer) > embeddings.weight.shape[0]:
        known = embeddings.weight.shape[0]
        language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
        _fill_rows(language_model, known)
    vision: Any = vision_tower.config
    side = vision.image_size // vision.patch_size
    has_class_token = vision_feature_select_strategy == "default"
    config = LlavaConfig(
        vision_config=vision,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=side * side,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        tie_word_embeddings=bool(getattr(language_model.config, "tie_word_embeddings", False)),
    )
    with torch.device("meta"):
        llava: Any = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = type(llava.model.multi_modal_projector)(config)
    llava.model.multi_modal_projector = projector.to(language_model.device, language_model.dtype)
    llava.model.vision_tower = vision_tower
    llava.model.language_model = language_model.base_model
    llava.lm_head = language_model.get_output_embeddings()
    llava.generation_config = language_model.generation_config
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=vision_feature_select_strategy,
        num_additional_image_tokens=int(has_class_token),
        chat_template=chat_template or getattr(tokenizer, "chat_template", None),
    )
    return llava.eval(), processor


@torch.no_grad()
def _fill_rows(language_model: PreTrainedModel, known: int) -> None:
    """New rows of embedding and head: the mean of the others."""
    model: Any = language_model
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for weight in weights[: 1 if weights[0] is weights[1] else 2]:
        weight[known:] = weight[:known].float().mean(dim=0).to(weight.dtype)
