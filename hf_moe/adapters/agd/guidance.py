"""How the guidance scale reaches the adapters: around calls, for good, or through a pipeline."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from hf_moe.adapters.core import bypass, condition, runtime_of

from .conditions import SCALE, conditions_of


__all__ = [
    "GuidanceFree",
    "agd_disabled",
    "agd_guidance",
    "denoiser_of",
    "guidance_free",
    "set_condition_fn",
    "set_guidance",
]


def denoiser_of(model: Any) -> Any:
    """The network of a diffusers pipeline (`transformer` or `unet`); a network itself is returned as it is.

    Args:
        model (`nn.Module` or `DiffusionPipeline`): Either.

    Returns:
        `nn.Module`

    Raises:
        TypeError: It is neither.
    """
    if isinstance(model, nn.Module):
        return model
    for name in ("transformer", "unet"):
        if isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    raise TypeError(f"`model` must be a torch module or a pipeline with a `transformer` or `unet`, got {type(model)}.")


@contextmanager
def agd_guidance(model: Any, scale: Any) -> Iterator[None]:
    """Inside, the AGD adapters of `model` reproduce classifier-free guidance at this scale.

    Args:
        model (`nn.Module` or `DiffusionPipeline`): A denoiser with AGD adapters, or the pipeline around it.
        scale (`float` or `torch.Tensor` of shape `()`, `(B,)` or `(B, 1)`): w, for all rows or for each.

    Raises:
        ValueError: There is no AGD adapter.

    Example:
        ```python
        with agd_guidance(model, 5.0):
            noise = model(latents, timestep, class_labels=labels).sample
        ```
    """
    denoiser = denoiser_of(model)
    conditions_of(denoiser).doubled_calls = 0
    with condition(denoiser, **{SCALE: scale}):
        yield


def set_guidance(model: Any, scale: Any) -> None:
    """Sets the guidance scale for all calls from now on.

    Args:
        model (`nn.Module` or `DiffusionPipeline`): A denoiser with AGD adapters, or the pipeline around it.
        scale (`float`, `torch.Tensor` or `None`): As in [`agd_guidance`]; `None` takes it away again.

    Raises:
        ValueError: There is no AGD adapter.
    """
    denoiser = denoiser_of(model)
    conditions_of(denoiser).doubled_calls = 0
    runtime: Any = runtime_of(denoiser)
    runtime.given.pop(SCALE, None)
    if scale is not None:
        runtime.given[SCALE] = scale


def set_condition_fn(model: Any, condition_fn: Callable[[tuple, dict[str, Any]], dict[str, Any]] | None) -> None:
    """Tells the adapters how to read the conditions off a call of a denoiser whose arguments they do not know.

    Args:
        model (`nn.Module`): A denoiser with AGD adapters.
        condition_fn (`Callable`): Gets the call's `(args, kwargs)`, returns some of `{"timestep": (B,) numbers or
            (B, n), "class": (B, n), "prompt": (B, tokens, n)}`. It is not saved with the adapter.

    Raises:
        ValueError: There is no AGD adapter.

    Example:
        ```python
        set_condition_fn(model, lambda args, kwargs: {"timestep": args[1], "class": table[args[2]]})
        ```
    """
    conditions_of(denoiser_of(model)).condition_fn = condition_fn


def agd_disabled(model: Any) -> AbstractContextManager[None]:
    """Inside, AGD adapters are off and others (LoRA) stay on: the teacher, whatever has been loaded.

    Args:
        model (`nn.Module` or `DiffusionPipeline`): A denoiser, with or without AGD adapters.
    """
    from .layer import AgdLayer

    return bypass(denoiser_of(model), AgdLayer)


class GuidanceFree:
    """A pipeline that guides through its AGD adapters, with one network call per step.

    Args:
        pipe (`DiffusionPipeline`): Has AGD adapters, see [`load_agd`].
        scale (`float`): The guidance scale.

    Raises:
        ValueError: There is no AGD adapter, or the pipeline's own guidance cannot be turned off.
    """

    def __init__(self, pipe: Any, scale: float):
        conditions_of(denoiser_of(pipe))
        parameters = inspect.signature(type(pipe).__call__).parameters
        self.off = {name: 1.0 for name in ("true_cfg_scale", "guidance_scale") if name in parameters}
        if not self.off:
            raise ValueError(f"{type(pipe).__name__} has no `guidance_scale` that could be turned off.")
        if len(self.off) == 2:
            # where both exist, `guidance_scale` is an input of a network that was distilled already
            self.off.pop("guidance_scale")
        self.pipe = pipe
        self.scale = scale

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the pipeline.

        Args:
            *args: For the pipeline.
            **kwargs: For the pipeline, but neither a guidance scale nor a negative prompt.

        Returns:
            As the pipeline.

        Raises:
            ValueError: Guidance would be applied twice, or an argument would have no effect.
        """
        for name, off in self.off.items():
            if kwargs.get(name, off) > off:
                raise ValueError(
                    f"`{name}={kwargs[name]}` would apply guidance twice: the adapter does it already, at scale "
                    f"{self.scale}. Leave it out, or use `guidance_free(pipe, {kwargs[name]})`."
                )
        negative = sorted(name for name, value in kwargs.items() if name.startswith("negative_") and value is not None)
        if negative:
            raise ValueError(f"`{negative[0]}` has no effect without the pipeline's own guidance. Leave it out.")
        with agd_guidance(self.pipe, self.scale):
            return self.pipe(*args, **(kwargs | self.off))


def guidance_free(pipe: Any, scale: float) -> GuidanceFree:
    """A callable that runs a pipeline with its own guidance off and the scale handed to the AGD adapters.

    Args:
        pipe (`DiffusionPipeline`): With AGD adapters.
        scale (`float`): The guidance scale.

    Returns:
        [`GuidanceFree`]

    Raises:
        ValueError: See [`GuidanceFree`].

    Example:
        ```python
        load_agd(pipe, "agd-sdxl")
        image = guidance_free(pipe, 7.5)("a lighthouse at night").images[0]
        ```
    """
    return GuidanceFree(pipe, scale)
