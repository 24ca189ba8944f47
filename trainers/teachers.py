"""A frozen model beside the one that is trained: does it fit, and where does it run."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


__all__ = ["OnDevice", "check_teacher", "image_tokens", "load_teacher"]


def load_teacher(teacher: Any, student: Any, options: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A loaded teacher in evaluation mode without gradients.

    Args:
        teacher (`PreTrainedModel` or `str`): The teacher, a Hub id or a folder; images are read if it reads images.
        student: The model that is trained, to tell the two apart.
        options (`Mapping`, *optional*): Keyword arguments of `from_pretrained`.

    Raises:
        TypeError: `teacher` is no model.
        ValueError: there is no teacher, or it is the student itself.
    """
    if teacher is None:
        raise ValueError(
            "`teacher_model` is missing: pass it, or set `teacher_model_name_or_path` in the configuration."
        )
    if isinstance(teacher, str):
        from trl.trainer.utils import create_model_from_path

        teacher = create_model_from_path(teacher, **dict(options or {}))
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(
            f"`teacher_model` must be a transformers model or where to load one from, got {type(teacher).__name__}."
        )
    if teacher is student:
        raise ValueError("`teacher_model` is `model` itself; pass another model, or a copy of it.")
    return teacher.eval().requires_grad_(False)


def image_tokens(model: Any) -> int | None:
    """Tokens an image of a LLaVA-like model takes; `None` for models of text, or where it depends on the image.

    Args:
        model (`PreTrainedModel`): The model. How many rows its tower has beside the patches (a class token, registers)
            is told by the tower's parameters.
    """
    config = model.config
    vision = getattr(config, "vision_config", None)
    tower = getattr(getattr(model, "base_model", None), "vision_tower", None)
    size: Any = getattr(vision, "image_size", None)
    patch: Any = getattr(vision, "patch_size", None)
    known = isinstance(size, int) and isinstance(patch, int) and hasattr(config, "vision_feature_select_strategy")
    if tower is None or not known or config.vision_config.model_type == "pixtral":
        return None
    parameters = {name.rpartition(".")[2]: parameter for name, parameter in tower.named_parameters()}
    others = int(not parameters.keys().isdisjoint(("class_embedding", "cls_token")))
    if "register_tokens" in parameters:
        weight = parameters["register_tokens"]
        others += getattr(weight, "ds_shape", weight.shape)[1]
    return (size // patch) ** 2 + others - (config.vision_feature_select_strategy == "default")


def check_teacher(student: Any, teacher: Any, num_tokens: int | None = None) -> int:
    """Whether both can be given the same batch and say something about the same tokens.

    Args:
        student, teacher (`PreTrainedModel`): The two models.
        num_tokens (`int`, *optional*): Tokens the tokenizer knows.

    Returns:
        `int`: Tokens both vocabularies have: they may be padded to different sizes.

    Raises:
        ValueError: an image takes another number of tokens or another placeholder, only one of them reads images, or
            a vocabulary lacks tokens.
    """
    ours, theirs = student.config, teacher.config
    pair = f"the student ({type(student).__name__}) and the teacher ({type(teacher).__name__})"
    counts = image_tokens(student), image_tokens(teacher)
    if (getattr(ours, "vision_config", None) is None) != (getattr(theirs, "vision_config", None) is None):
        raise ValueError(f"`teacher_model`: of {pair}, only one reads images. Use two that do, or two that do not.")
    if None not in counts and counts[0] != counts[1]:
        raise ValueError(
            f"`teacher_model`: an image takes {counts[0]} tokens of the student and {counts[1]} of the teacher, so "
            "their positions do not match. Use the same vision tower (image size, patch size and "
            "`vision_feature_select_strategy`) for both."
        )
    places = [getattr(c, "image_token_id", getattr(c, "image_token_index", None)) for c in (ours, theirs)]
    if places[0] != places[1]:
        raise ValueError(
            f"`teacher_model`: `image_token_id` is {places[0]} for the student and {places[1]} for the teacher; both "
            "read the same token ids, so they must have the same one."
        )
    weights = [m.get_output_embeddings().weight for m in (student, teacher)]
    sizes = [getattr(weight, "ds_shape", weight.shape)[0] for weight in weights]  # ZeRO-3 leaves no rows here
    if num_tokens is not None and min(sizes) < num_tokens:
        raise ValueError(
            f"`teacher_model`: the tokenizer knows {num_tokens} tokens, but the vocabularies of {pair} have "
            f"{sizes[0]} and {sizes[1]}. Use a teacher with the student's tokenizer, and resize embeddings after "
            "adding tokens."
        )
    return min(sizes)


class OnDevice(nn.Module):
    """A model that runs somewhere else: tensors go there, what comes out comes back.

    Args:
        model (`nn.Module`): The model; moved.
        device (`str` or `torch.device`): Where it runs.
        home (`torch.device`): Where its inputs are.
    """

    def __init__(self, model: nn.Module, device: str | torch.device, home: torch.device):
        super().__init__()
        self.model = model.to(device)
        self.device, self.home = torch.device(device), home

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        output = self.model(*_moved(args, self.device), **_moved(kwargs, self.device))
        for name, value in list(output.items()):
            output[name] = _moved(value, self.home)
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(v, device) for v in value)
    if isinstance(value, dict):
        return {key: _moved(v, device) for key, v in value.items()}
    return value
