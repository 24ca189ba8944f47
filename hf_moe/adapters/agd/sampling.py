"""Classifier-free guidance as the teacher does it: the formula, and a plain denoising loop."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .guidance import agd_disabled


__all__ = ["DenoisingLoop", "GuidedStep", "forward_parameters", "guided", "prediction_of"]


class GuidedStep(NamedTuple):
    """One step of a guided trajectory. Shapes: B rows, C channels of the latents.

    Args:
        inputs (`dict[str, torch.Tensor]`): Arguments of the conditional call that change from step to step: first the
            latents `(B, C, ...)`, then the timestep `(B,)`.
        conditions (`dict[str, torch.Tensor]`): Its other arguments, the same at each step; `"a.b"` is key `b` of the
            dictionary `a`.
        target (`torch.Tensor` of shape `(B, C, ...)`): The guided prediction.
        conditional (`torch.Tensor` of shape `(B, C, ...)`): The conditional one.
    """

    inputs: dict[str, torch.Tensor]
    conditions: dict[str, torch.Tensor]
    target: torch.Tensor
    conditional: torch.Tensor


def guided(unconditional: torch.Tensor, conditional: torch.Tensor, scale: Any) -> torch.Tensor:
    """Classifier-free guidance, `e_u + w (e_c - e_u)`, computed in float32.

    Args:
        unconditional (`torch.Tensor` of shape `(B, ...)`): e_u.
        conditional (`torch.Tensor` of shape `(B, ...)`): e_c.
        scale (`float` or `torch.Tensor` of shape `(B,)` or `(B, 1)`): w.

    Returns:
        `torch.Tensor` of shape `(B, ...)`, in the dtype of `conditional`.

    Example:
        ```python
        guided(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0]]), 4.0)  # [[9, 6]]
        ```
    """
    w = torch.as_tensor(scale, dtype=torch.float32, device=conditional.device)
    w = w.reshape(-1, *[1] * (conditional.ndim - 1))
    e_u, e_c = unconditional.float(), conditional.float()
    return (e_u + w * (e_c - e_u)).to(conditional.dtype)


def prediction_of(output: Any) -> torch.Tensor:
    """The tensor in what a denoiser returns: itself, a tuple's first element, or `.sample`."""
    if isinstance(output, torch.Tensor):
        return output
    return output.sample if hasattr(output, "sample") else output[0]


def forward_parameters(model: nn.Module) -> list[str]:
    """Names of a denoiser's positional arguments, also through a PEFT model."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in inspect.signature(base.forward).parameters.items() if p.kind in kinds]


class DenoisingLoop:
    """Samples from a denoiser with a scheduler: guided by two predictions per step, or with one.

    For networks without a pipeline. It is a sampler for [`record_trajectories`].

    Args:
        denoiser (`nn.Module`): Called as `denoiser(latents, timestep, **conditions)`. Channels it returns beyond
            those of the latents (a learned variance) are left alone.
        scheduler: As diffusers' ones: `set_timesteps(n)`, `timesteps`, `step(prediction, t, latents)`, which returns
            the latents or something with `prev_sample`.
        shape (`tuple[int, ...]`): Of one sample's latents, channels first.
        null (`Mapping[str, Any]`): The condition that stands for none, such as `{"class_labels": 10}`.
        num_inference_steps (`int`, defaults to 20): Steps.

    Example:
        ```python
        loop = DenoisingLoop(dit, DDIMScheduler(), (1, 14, 14), null={"class_labels": 10})
        loop.guided({"class_labels": labels}, 4.0)
        with agd_guidance(dit, 4.0):
            loop.single({"class_labels": labels})
        ```
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: Any,
        shape: tuple[int, ...],
        null: Mapping[str, Any],
        num_inference_steps: int = 20,
    ):
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.shape = tuple(shape)
        self.null = dict(null)
        self.num_inference_steps = num_inference_steps
        names = forward_parameters(denoiser)
        self.names = (names[0], "timestep" if "timestep" in names else names[1])

    def __call__(
        self,
        conditions: Mapping[str, torch.Tensor],
        scales: torch.Tensor,
        generator: torch.Generator | None = None,
        observe: Callable[[GuidedStep], Any] | None = None,
    ) -> torch.Tensor:
        """Samples with classifier-free guidance, AGD adapters off.

        Args:
            conditions (`Mapping[str, torch.Tensor]`): Arguments for the denoiser, B rows each.
            scales (`torch.Tensor` of shape `(B,)`): w of each row.
            generator (`torch.Generator`, *optional*): For the noise.
            observe (`Callable`, *optional*): Called with the [`GuidedStep`] of each step.

        Returns:
            `torch.Tensor` of shape `(B, *shape)`: The samples.
        """
        nothing = {name: _like(self.null[name], value) for name, value in conditions.items()}
        both = {name: torch.cat([nothing[name], value]) for name, value in conditions.items()}

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            e_u, e_c = self._call(torch.cat([x, x]), t, both).chunk(2)
            target = guided(e_u, e_c, scales)
            if observe is not None:
                inputs = {self.names[0]: x, self.names[1]: t.expand(len(x))}
                observe(GuidedStep(inputs, dict(conditions), target, e_c))
            return target

        with agd_disabled(self.denoiser):
            return self._run(predict, len(scales), generator)

    def guided(
        self, conditions: Mapping[str, torch.Tensor], scale: Any, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Samples with classifier-free guidance; `scale` is a number or one per row. See `__call__`."""
        rows = len(next(iter(conditions.values())))
        return self(conditions, torch.as_tensor(scale, dtype=torch.float32).expand(rows), generator)

    def single(self, conditions: Mapping[str, torch.Tensor], generator: torch.Generator | None = None) -> torch.Tensor:
        """Samples with one prediction per step: inside [`agd_guidance`] guided by the adapters, else not at all.

        Args:
            conditions (`Mapping[str, torch.Tensor]`): Arguments for the denoiser, B rows each.
            generator (`torch.Generator`, *optional*): For the noise.

        Returns:
            `torch.Tensor` of shape `(B, *shape)`: The samples.
        """
        rows = len(next(iter(conditions.values())))
        return self._run(lambda x, t: self._call(x, t, dict(conditions)), rows, generator)

    def _call(self, x: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        return prediction_of(self.denoiser(x, t.expand(len(x)), **conditions))[:, : self.shape[0]]

    @torch.no_grad()
    def _run(self, predict: Callable, rows: int, generator: torch.Generator | None) -> torch.Tensor:
        parameter = next(self.denoiser.parameters())
        x = torch.randn(rows, *self.shape, generator=generator).to(parameter.device, parameter.dtype)
        self.scheduler.set_timesteps(self.num_inference_steps)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        extra = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for t in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            result = self.scheduler.step(predict(scaled, t.to(x.device)), t, x, **extra)
            x = getattr(result, "prev_sample", result)
        return x


def _like(null: Any, value: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(null, dtype=value.dtype, device=value.device).expand(value.shape)
