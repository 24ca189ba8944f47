"""Trains AGD adapters on recorded trajectories."""

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import Trainer

from hf_moe.adapters.agd.conditions import SCALE
from hf_moe.adapters.agd.config import AgdConfig
from hf_moe.adapters.agd.dataset import CONDITIONAL, TARGET
from hf_moe.adapters.agd.layer import AgdLayer
from hf_moe.adapters.agd.sampling import prediction_of

from .guidance_distillation_config import GuidanceDistillationConfig


__all__ = ["GuidanceDistillationTrainer"]


class GuidanceDistillationTrainer(Trainer):
    """Makes the adapters' one prediction equal the guided one: `|e_phi(x_t, t, c, w) - e_w|^2` (paper, Sec. 3).

    The latents x_t come from trajectories that were guided themselves, and the teacher's predictions are stored with
    them: a step is one forward and backward pass of the student. Only the channels of the target are compared; what a
    denoiser returns beyond them (a learned variance) is left alone. The loss is computed in float32.

    Args:
        model (`PeftModel` or `nn.Module`): A denoiser with an AGD adapter, or without one and with `peft_config`.
        args ([`GuidanceDistillationConfig`], *optional*): Configuration of the run.
        peft_config ([`AgdConfig`], *optional*): The adapter to make. A `guidance_range` it lacks is the dataset's.
        train_dataset ([`~hf_moe.adapters.agd.AgdDataset`]): Or any dataset with such items.
        **kwargs: As in [`~transformers.Trainer`].

    Raises:
        ValueError: The model has no AGD adapter, or `"weighted_l2"` lacks the conditional predictions.
        TypeError: The model is not a PEFT model although it has adapters, or `args` is of another class.

    Paper: https://huggingface.co/papers/2503.07274

    Example:

    ```python
    >>> from hf_moe import AgdConfig
    >>> from hf_moe.adapters.agd import AgdDataset, record_trajectories
    >>> from hf_moe.trainers import GuidanceDistillationConfig, GuidanceDistillationTrainer
    >>> record_trajectories(pipe, labels, "trajectories", scale_range=(1, 6))
    >>> trainer = GuidanceDistillationTrainer(
    ...     pipe.transformer,
    ...     GuidanceDistillationConfig("agd"),
    ...     train_dataset=AgdDataset("trajectories"),
    ...     peft_config=AgdConfig(hidden_size=256),
    ... )
    >>> trainer.train()
    ```
    """

    args: Any

    def __init__(self, model: Any, args: Any = None, *, peft_config: AgdConfig | None = None, **kwargs: Any):
        args = GuidanceDistillationConfig("guidance_distillation") if args is None else args
        if not isinstance(args, GuidanceDistillationConfig):
            raise TypeError(f"`args` must be a GuidanceDistillationConfig, got {type(args).__name__}.")
        dataset = kwargs.get("train_dataset")
        if args.loss_type == "weighted_l2" and getattr(dataset, "has_conditional", True) is False:
            raise ValueError(
                "`loss_type='weighted_l2'` needs the conditional predictions. Record the trajectories with "
                "`store_conditional=True`."
            )
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        layers = [module for module in model.modules() if isinstance(module, AgdLayer)]
        if not layers:
            raise ValueError(
                f"`model` ({type(model).__name__}) has no AGD adapter. Pass `peft_config=AgdConfig(...)`."
            )
        if not isinstance(model, PeftModel):
            raise TypeError(
                f"`model` ({type(model).__name__}) has adapters but is no PEFT model, so its checkpoints would hold "
                "the base. Pass the base and `peft_config=AgdConfig(...)`."
            )
        _fill_range(model, layers, getattr(dataset, "scale_range", None))
        base: Any = model.get_base_model()
        if args.activation_checkpointing and hasattr(base, "enable_gradient_checkpointing"):
            base.enable_gradient_checkpointing()  # diffusers' name; the Trainer would call transformers'
            args = copy.copy(args)
            args.activation_checkpointing = args.gradient_checkpointing = False
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distillation loss of a batch of [`~hf_moe.adapters.agd.AgdDataset`] items.

        Args:
            model (`nn.Module`): The denoiser with adapters.
            inputs (`dict[str, torch.Tensor]`): Arguments of the denoiser, `agd_scale` `(B,)` and `agd_target`
                `(B, C, ...)`.
            return_outputs (`bool`, defaults to `False`): Return the prediction too.
            num_items_in_batch (*optional*): Without effect.

        Returns:
            `torch.Tensor`, or `(torch.Tensor, {"prediction": ...})`.
        """
        inputs = dict(inputs)
        target = inputs.pop(TARGET).float()
        conditional = inputs.pop(CONDITIONAL, None)
        scale = inputs.pop(SCALE)
        if model.training and self.args.base_in_eval:
            _train_cells_only(model)
        dtype = next(parameter.dtype for parameter in model.parameters() if not parameter.requires_grad)
        prediction = prediction_of(model(**_arguments(inputs, dtype), **{SCALE: scale}))
        difference = prediction[:, : target.shape[1]].float() - target
        if self.args.loss_type == "l1":
            loss = difference.abs().mean()
        elif self.args.loss_type == "l2":
            loss = difference.square().mean()
        else:
            cosine = F.cosine_similarity(conditional.float().flatten(1), target.flatten(1))
            weight = 0.5 * (1.0 - cosine).abs()  # (B,)
            loss = (weight * difference.square().flatten(1).mean(1)).mean()
        return (loss, {"prediction": prediction.detach()}) if return_outputs else loss


def _arguments(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Latents and conditions in the base's dtype (not the timesteps), `"a.b"` as key `b` of the dictionary `a`."""
    arguments: dict[str, Any] = {}
    for name, value in inputs.items():
        value = value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
        outer, _, inner = name.partition(".")
        if inner:
            arguments.setdefault(outer, {})[inner] = value
        else:
            arguments[name] = value
    return arguments


def _train_cells_only(model: Any) -> None:
    model.eval()
    for module in model.modules():
        if isinstance(module, AgdLayer):
            for container in module.adapter_layer_names:
                getattr(module, container).train()


def _fill_range(model: PeftModel, layers: list[AgdLayer], scale_range: tuple[float, float] | None) -> None:
    for name, config in model.peft_config.items():
        if isinstance(config, AgdConfig) and config.guidance_range is None and scale_range is not None:
            config.guidance_range = scale_range
            for layer in layers:
                if layer.has(name):
                    layer.cell("cell", name).range = scale_range
