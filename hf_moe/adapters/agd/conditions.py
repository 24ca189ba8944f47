"""What adapters need of a call of the denoiser: the scale, and the embeddings the base computes itself."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_moe.adapters.core import Runtime

from .cells import AgdCell
from .encoders import sinusoid


__all__ = ["SCALE", "Conditions", "conditions_of", "install_conditions", "remove_conditions"]

SCALE = "agd_scale"
_ATTRIBUTE = "_hfmoe_agd"
_PREFIX = "agd."
# Names under which denoisers take these; what is read is copied by the runtime, not taken out of the call.
ARGUMENTS = {
    "timestep": ("timestep", "timesteps", "t"),
    "prompt": ("encoder_hidden_states", "prompt_embeds"),
}


class Conditions:
    """Watches the calls of one denoiser, for all adapters in it.

    Args:
        model (`nn.Module`): The base model.
        runtime ([`Runtime`]): Where the values of the running call are kept.
    """

    def __init__(self, model: nn.Module, runtime: Runtime):
        self.runtime = runtime
        self.condition_fn: Callable[[tuple, dict[str, Any]], dict[str, Any]] | None = None
        self.handle = model.register_forward_pre_hook(self.watch, with_kwargs=True)
        self.call: tuple[tuple, dict[str, Any]] = ((), {})
        self.doubled_calls = 0

    def keep(self, model: nn.Module, path: str) -> None:
        """Has what the module at `path` returns kept in each call."""
        self.runtime.keep_output(model.get_submodule(path), _PREFIX + path)

    def watch(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The hook: remembers what this call was given."""
        self.call = (args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"call": ((), {})}  # copies of a model hold no batch

    def scale(self, device: torch.device) -> torch.Tensor:
        """Guidance scales of this call, `(B,)` or `(1,)`, float32.

        Raises:
            ValueError: No scale was given, or it has another shape.
        """
        return self.runtime.derive(f"{_PREFIX}scale {device}", lambda runtime: self._scale(runtime, device))

    def _scale(self, runtime: Runtime, device: torch.device) -> torch.Tensor:
        value = runtime.get(SCALE)
        if value is None:
            raise ValueError(
                "The adapter needs a guidance scale. Call the model inside `agd_guidance(model, 5.0)`, call "
                "`set_guidance(model, 5.0)` before, or pass `agd_scale=`."
            )
        scale = torch.as_tensor(value, dtype=torch.float32, device=device)
        if scale.ndim > 2 or (scale.ndim == 2 and scale.shape[1] != 1):
            raise ValueError(f"`agd_scale` must have shape (), (B,) or (B, 1), got {tuple(scale.shape)}.")
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            self._watch_doubling()
        return scale.reshape(-1)

    def check_range(self, scale: torch.Tensor, allowed: tuple[float, float] | None) -> None:
        """Warns of scales outside `allowed`."""
        if allowed is None or torch.compiler.is_compiling():
            return
        self.runtime.derive(f"{_PREFIX}range {allowed}", lambda _: _warn_outside(scale, allowed))

    def _watch_doubling(self) -> None:
        # Pipelines that guide themselves send each latent twice, at every step. Once can be chance: several prompts
        # started from the same noise.
        args, kwargs = self.call
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        doubled = x is not None and x.is_floating_point() and x.ndim > 1 and len(x) % 2 == 0 and len(x) > 0
        doubled = doubled and torch.equal(*x.chunk(2))  # pyright: ignore[reportOptionalMemberAccess]
        self.doubled_calls = self.doubled_calls + 1 if doubled else 0
        if self.doubled_calls == 2:
            warnings.warn(
                "Each latent comes twice in the batch, as when a pipeline does classifier-free guidance itself: with "
                "an active AGD adapter guidance is then applied twice. Call the pipeline with `guidance_scale=1.0`, "
                "or through `guidance_free(pipe, scale)`.",
                UserWarning,
                stacklevel=2,
            )

    def of(self, cell: AgdCell, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The conditions of a cell.

        Args:
            cell ([`AgdCell`]): Says which ones.
            x (`torch.Tensor` of shape `(B, ...)`): Input of its block.

        Returns:
            `dict[str, torch.Tensor]`: Each `(B or 1, width)`, a prompt `(B or 1, tokens, width)`.

        Raises:
            ValueError: The call does not have one of them.
        """
        found = {}
        for name, path in cell.sources.items():
            size: Any = cell.project[name].in_features
            value = self.runtime.kept_output(_PREFIX + path) if path is not None else self._given(name, size)
            value = value.detach().to(x.device)
            if len(value) not in (1, len(x)) or value.shape[-1] != size:
                raise ValueError(
                    f"The condition {name!r} has shape {tuple(value.shape)}; the adapter needs width {size} and one "
                    f"row or {len(x)}."
                )
            found[name] = value
        return found

    def _given(self, name: str, size: int) -> torch.Tensor:
        value = None
        if self.condition_fn is not None:
            values = self.runtime.derive(f"{_PREFIX}given", lambda _: self.condition_fn(*self.call))  # pyright: ignore[reportOptionalCall]
            value = self.runtime.derive(_PREFIX + name, lambda _: values.get(name))
        for argument in ARGUMENTS.get(name, ()):
            value = self.runtime.get(argument) if value is None else value
        if value is None:
            raise ValueError(
                f"The call has no {name!r}, which the adapter needs. For a model whose arguments have other names, "
                "set `set_condition_fn(model, lambda args, kwargs: {...})`."
            )
        value = torch.as_tensor(value)
        if name == "timestep" and (value.ndim < 2 or value.shape[-1] != size):
            return sinusoid(value.reshape(-1), size)
        if value.ndim < 2 or not value.is_floating_point():
            raise ValueError(
                f"The condition {name!r} must be vectors of {size} numbers, got {value.dtype} of shape "
                f"{tuple(value.shape)}. For the base's own embedding name its module in `condition_modules`."
            )
        return value


def _warn_outside(scale: torch.Tensor, allowed: tuple[float, float]) -> None:
    low, high = scale.min().item(), scale.max().item()
    if low < allowed[0] or high > allowed[1]:
        worst = low if low < allowed[0] else high
        warnings.warn(
            f"Guidance scale {worst:g} is outside `guidance_range` {allowed}, for which the adapter was trained: "
            "expect poor samples.",
            UserWarning,
            stacklevel=2,
        )


def install_conditions(model: nn.Module, runtime: Runtime) -> Conditions:
    """The [`Conditions`] of a base model, made if there are none."""
    if _ATTRIBUTE not in model.__dict__:
        model.__dict__[_ATTRIBUTE] = Conditions(model, runtime)
    return model.__dict__[_ATTRIBUTE]


def conditions_of(model: nn.Module) -> Conditions:
    """The [`Conditions`] of a model with AGD adapters.

    Raises:
        ValueError: It has none.
    """
    for module in model.modules():
        if _ATTRIBUTE in module.__dict__:
            return module.__dict__[_ATTRIBUTE]
    raise ValueError(f"`model` ({type(model).__name__}) has no AGD adapter. Add one, or use `load_agd`.")


def remove_conditions(model: nn.Module) -> None:
    """Takes the hooks off a base model; does nothing where there are none."""
    conditions = model.__dict__.pop(_ATTRIBUTE, None)
    if conditions is not None:
        conditions.handle.remove()
