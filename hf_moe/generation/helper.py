"""`scmoe_generate`: self-contrast decoding with everything that `generate` keeps from callables."""

import copy
from dataclasses import fields
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import GenerationMixin

from .self_contrast import SelfContrast


__all__ = ["scmoe_generate"]


def scmoe_generate(
    model: Any,
    inputs: torch.Tensor | None = None,
    *,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    assistant_model: Any = None,
    **kwargs: Any,
) -> Any:
    """`model.generate` with [`SelfContrast`], and with `streamer`, `stop_strings` and `synced_gpus`.

    Paper: https://huggingface.co/papers/2405.14507. For exactly these three arguments, `generate` hands nothing to a
    `custom_generate` callable; everything else is the same as passing the callable oneself.

    Args:
        model ([`~transformers.PreTrainedModel`]): A Mixture-of-Experts model, bare or wrapped by PEFT.
        inputs (`torch.Tensor` of shape `(B, S)`, *optional*): As in `generate`.
        stop_strings (`str` or `list[str]`, *optional*): Generation of a sequence ends when one of them appears.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Needed with `stop_strings`.
        stopping_criteria ([`~transformers.StoppingCriteriaList`], *optional*): Further criteria.
        generation_config ([`~transformers.GenerationConfig`], *optional*): As in `generate`; it is not changed.
        assistant_model (*optional*): Refused.
        **kwargs: Arguments of [`SelfContrast`] (`beta`, `weak`, `mode`, `streamer`, ...), and for all other names
            those of `generate` (`attention_mask`, `max_new_tokens`, `do_sample`, ...).

    Returns:
        `torch.LongTensor` of shape `(B, S + new)`, or [`SelfContrastOutput`] with `return_dict_in_generate=True`.

    Raises:
        TypeError, ValueError: see [`SelfContrast`]; or `stop_strings` without `tokenizer`.

    Example:
        ```python
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        hf_moe.scmoe_generate(
            model, **inputs, streamer=streamer, stop_strings="\\nQuestion:", tokenizer=tokenizer, max_new_tokens=256
        )
        ```
    """
    if assistant_model is not None:
        raise ValueError("Self-contrast decoding cannot run with an assistant. Remove `assistant_model`.")
    own = {field.name for field in fields(SelfContrast)}
    decoder = SelfContrast(**{name: value for name, value in kwargs.items() if name in own})
    kwargs = {name: value for name, value in kwargs.items() if name not in own}

    if stop_strings is None:
        stop_strings = getattr(generation_config, "stop_strings", None) or model.generation_config.stop_strings
    if stop_strings:
        if tokenizer is None:
            raise ValueError(f"`stop_strings={stop_strings!r}` needs `tokenizer`: pass the model's tokenizer.")
        stopping_criteria = StoppingCriteriaList(
            [*(stopping_criteria or ()), StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings)]
        )
        # `generate` would make the same criterion, and fail for want of the tokenizer that it took away
        if model.generation_config.stop_strings:
            kwargs["stop_strings"] = None
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
            generation_config.stop_strings = None
    return _generate(model)(
        inputs,
        generation_config=generation_config,
        stopping_criteria=stopping_criteria,
        custom_generate=decoder,
        **kwargs,
    )


def _generate(model: Any) -> Any:
    # `from_pretrained` of a repository with a custom_generate folder puts that function in `model.generate`
    cls: Any = type(model)
    return cls.generate.__get__(model) if isinstance(model, GenerationMixin) else model.generate
