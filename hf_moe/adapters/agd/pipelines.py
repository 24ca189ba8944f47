"""Guided trajectories of a diffusers pipeline, seen from its network, whatever it does around it."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .guidance import agd_disabled, denoiser_of
from .sampling import GuidedStep, forward_parameters, guided, prediction_of


__all__ = ["PipelineSampler"]

# Pipelines that put the conditional half of the doubled batch first; all others put it second.
_CONDITIONAL_FIRST = ("DiTPipeline",)


class PipelineSampler:
    """Runs a pipeline with its own classifier-free guidance and shows each step, for [`record_trajectories`].

    Args:
        pipe (`DiffusionPipeline`): Guides with one call of a doubled batch per step (DiT, Stable Diffusion, ...).
        conditional_half (`str`, *optional*): `"first"` or `"second"` half of that batch; known where left out.
        **kwargs: For each call of the pipeline, such as `num_inference_steps=50`.

    Raises:
        ValueError: An argument sets what the sampler sets itself.

    Example:
        ```python
        sampler = PipelineSampler(pipe, num_inference_steps=50)
        record_trajectories(sampler, ["a red boat", "two owls"], "trajectories", scale_range=(1, 12))
        ```

    Note: `guidance_rescale` and other changes a pipeline makes after the formula are not part of the target.
    """

    def __init__(self, pipe: Any, *, conditional_half: str | None = None, **kwargs: Any):
        if conditional_half not in (None, "first", "second"):
            raise ValueError(f"`conditional_half` must be 'first' or 'second', got {conditional_half!r}.")
        taken = sorted({"guidance_scale", "generator", "guidance_rescale"} & kwargs.keys())
        if taken:
            raise ValueError(f"`{taken[0]}` cannot be given here: the recording sets it, or could not reproduce it.")
        half = conditional_half or ("first" if type(pipe).__name__ in _CONDITIONAL_FIRST else "second")
        self.pipe = pipe
        self.rows = slice(0, 1) if half == "first" else slice(1, 2)
        self.kwargs = kwargs
        parameters = list(inspect.signature(type(pipe).__call__).parameters)
        self.first_argument = parameters[1]
        if "output_type" in parameters:
            self.kwargs.setdefault("output_type", "latent")

    def __call__(
        self,
        conditions: Sequence[Any],
        scales: torch.Tensor,
        generator: torch.Generator | None = None,
        observe: Callable[[GuidedStep], Any] | None = None,
    ) -> None:
        """Runs the pipeline once per condition, each with its own scale.

        Args:
            conditions (`Sequence`): Each a prompt, a class number, or a dictionary of arguments for the pipeline.
            scales (`torch.Tensor` of shape `(B,)`): w of each.
            generator (`torch.Generator`, *optional*): For the noise.
            observe (`Callable`, *optional*): Called with each step, of all conditions together.

        Raises:
            ValueError: The pipeline guides in another way, or is given what cannot be stored.
        """
        runs: list[list[GuidedStep]] = []
        for condition, scale in zip(conditions, scales.tolist(), strict=True):
            steps: list[GuidedStep] = []
            arguments = dict(condition) if isinstance(condition, dict) else {self.first_argument: _argument(condition)}
            denoiser = denoiser_of(self.pipe)
            hook = _Recorder(self.rows, scale, forward_parameters(denoiser), steps)
            handle = denoiser.register_forward_hook(hook, with_kwargs=True)
            try:
                with agd_disabled(denoiser), torch.no_grad():
                    self.pipe(**(self.kwargs | arguments), guidance_scale=scale, generator=generator)
            finally:
                handle.remove()
            runs.append(steps)
        for together in zip(*runs, strict=True):
            if observe is not None:
                observe(_join(together))


class _Recorder:
    def __init__(self, rows: slice, scale: float, parameters: list[str], steps: list[GuidedStep]):
        self.rows, self.scale, self.parameters, self.steps = rows, scale, parameters, steps

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        latents = self.parameters[0]
        x, both = named.pop(latents), prediction_of(output)
        if len(x) != 2:
            raise ValueError(
                f"The pipeline called its network with {len(x)} rows at guidance scale {self.scale:g}; needed are "
                "two, the conditional and the unconditional one. Scales must be above 1, and pipelines that call the "
                "network twice per step cannot be recorded this way; use a sampler of your own."
            )
        time = named.pop("timestep")
        time = torch.as_tensor(time).reshape(-1)
        inputs = {latents: x[self.rows], "timestep": time[self.rows] if len(time) == 2 else time[:1]}
        conditions = {}
        for name, value in named.items():
            conditions |= self._stored(name, value)
        channels = x.shape[1]
        e_c = both[self.rows][:, :channels]
        e_u = both[1:2] if self.rows.start == 0 else both[0:1]
        target = guided(e_u[:, :channels], e_c, self.scale)
        if self.steps and any(not torch.equal(v, conditions[k]) for k, v in self.steps[0].conditions.items()):
            raise ValueError("An argument of the network other than latents and timestep changes from step to step.")
        self.steps.append(GuidedStep(inputs, conditions, target, e_c))

    def _stored(self, name: str, value: Any) -> dict[str, torch.Tensor]:
        if isinstance(value, torch.Tensor):
            value = value.reshape(1) if value.ndim == 0 else value
            return {name: value[self.rows] if len(value) == 2 else value}
        if isinstance(value, dict):
            return {k: v for key, part in value.items() for k, v in self._stored(f"{name}.{key}", part).items()}
        if value is None or isinstance(value, bool):
            return {}
        raise ValueError(f"The network's argument {name!r} is a {type(value).__name__}, which cannot be recorded.")


def _argument(condition: Any) -> Any:
    return [condition] if isinstance(condition, int) else condition


def _join(steps: tuple[GuidedStep, ...]) -> GuidedStep:
    def join(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return GuidedStep(
        join([step.inputs for step in steps]),
        join([step.conditions for step in steps]),
        torch.cat([step.target for step in steps]),
        torch.cat([step.conditional for step in steps]),
    )
