"""Unlearning in Mixture-of-Experts models."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from hf_moe.attribution import ExpertScores, pad_token_rows
from hf_moe.modes import eval_mode
from hf_moe.views import moe_layers, unwrap_model

from .unlearning_anchor import RouterAnchor
from .unlearning_config import ExpertUnlearningConfig
from .unlearning_data import PairCollator, PairedRows, TokenRows
from .unlearning_evaluation import UnlearningEvaluationMixin
from .unlearning_losses import LOSSES, UnlearningStep
from .unlearning_steering import Steering, decoder_layers
from .unlearning_targets import anchor_kind, choose_targets, freeze_routers, slice_adapter


__all__ = ["ExpertUnlearningTrainer"]


class ExpertUnlearningTrainer(UnlearningEvaluationMixin, Trainer):
    r"""Makes a Mixture-of-Experts model forget a set of texts by training one expert and its router (SEUF, arXiv
    2411.18797).

    1. Attribution over the forget set finds the expert that takes part in it most ([`~hf_moe.attribute_experts`]).
    2. An expert-slice adapter ([`~hf_moe.ExpertSliceConfig`]) is put on it; everything else is frozen. Optimizer state
       exists for the slice and its router only.
    3. l_f(forget) + retain_weight * l_r(retain) + anchor_weight * ||g - a||^2 is minimised. The last term, the
       anchor, keeps the router from sending the forget set elsewhere, which lowers the loss and forgets nothing.

    Each step takes a batch of both sets. NPO and RMU compare with the model at the start, which is this one with the
    adapter bypassed; only `trainable="all"` needs a copy. The model's own router losses play no part.

    The trained model is `trainer.model`: save it as an adapter with `save_model`, or write the slice back with
    `trainer.model.merge_and_unload()` for an ordinary checkpoint.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A language model that [`~hf_moe.moe_layers`] accepts; with an active
            expert-slice adapter, that one is trained.
        args ([`ExpertUnlearningConfig`], *optional*): Arguments of the run.
        forget_dataset: Rows with `input_ids` (and `labels`), `text` or `messages`.
        retain_dataset (*optional*): Rows of what to keep; needed where the loss has a retain term.
        eval_forget_dataset (*optional*): What [`~ExpertUnlearningTrainer.evaluate`] measures; `forget_dataset` by
            default.
        eval_retain_dataset (*optional*): A dataset, or several by name; `retain_dataset` by default.
        forget_loss (`Callable`, *optional*): Instead of `args.forget_loss`: takes an
            [`~hf_moe.trainers.UnlearningStep`], returns the forget term, or a pair of it and the retain term.
        scores ([`~hf_moe.attribution.ExpertScores`], *optional*): Attribution made before.
        compute_utility (`Callable`, *optional*): Takes the model, returns further numbers for `evaluate`.
        processing_class (*optional*): Tokenizer for text and messages.
        **kwargs: As in `transformers.Trainer`.

    Raises:
        ValueError: the model is dense, a set is empty, a target does not exist, or arguments contradict each other.
            The model is as it was then.
        TypeError: a set without tokens or text.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from hf_moe.trainers import ExpertUnlearningConfig, ExpertUnlearningTrainer
    >>> name = "Qwen/Qwen1.5-MoE-A2.7B-Chat"
    >>> model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    >>> args = ExpertUnlearningConfig("out", forget_loss="npo", max_steps=100)
    >>> trainer = ExpertUnlearningTrainer(
    ...     model, args, forget_dataset=forget, retain_dataset=retain, processing_class=tokenizer
    ... )
    >>> trainer.train()
    >>> trainer.model.merge_and_unload().save_pretrained("unlearned")
    ```
    """

    args: ExpertUnlearningConfig
    model: Any

    def __init__(
        self,
        model: Any,
        args: ExpertUnlearningConfig | None = None,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        eval_forget_dataset: Any = None,
        eval_retain_dataset: Any = None,
        forget_loss: Callable | None = None,
        scores: ExpertScores | None = None,
        compute_utility: Callable | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        args = ExpertUnlearningConfig("trainer_output") if args is None else args
        if forget_dataset is None:
            raise ValueError("`forget_dataset` is missing: the texts to forget.")
        if args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not support `nn.DataParallel`, which a single process uses when it sees "
                f"several GPUs ({args.n_gpu}). Launch it with `accelerate launch`, or make one GPU visible."
            )

        def rows(data: Any, name: str) -> TokenRows | None:
            return None if data is None else TokenRows(data, processing_class, args.max_length, name)

        forget, retain = rows(forget_dataset, "forget_dataset"), rows(retain_dataset, "retain_dataset")
        assert forget is not None
        if retain is None and args.retain_coefficient > 0 and forget_loss is None:
            raise ValueError(
                f"`retain_dataset` is missing: `forget_loss={args.forget_loss!r}` has a retain term with weight "
                f"{args.retain_coefficient}. Pass one, or set `retain_weight=0`."
            )
        self.eval_forget = rows(eval_forget_dataset, "eval_forget_dataset") or forget
        if isinstance(eval_retain_dataset, Mapping) and "input_ids" not in eval_retain_dataset:
            several = {
                name: rows(data, f"eval_retain_dataset[{name!r}]") for name, data in eval_retain_dataset.items()
            }
        else:
            several = {"": rows(eval_retain_dataset, "eval_retain_dataset") or retain}
        self.eval_retain: dict[str, TokenRows] = {name: data for name, data in several.items() if data is not None}
        if not self.eval_retain and args.load_best_model_at_end and args.metric_for_best_model == "balance":
            raise ValueError(
                "`load_best_model_at_end` looks for the best balance of forgetting and utility, which needs "
                "`retain_dataset` or `eval_retain_dataset`."
            )
        self.scores = scores
        self.targets: dict[str, list[int]] = {}
        self.anchor: RouterAnchor | None = None
        self.steering: Steering | None = None
        self._reference_model: nn.Module | None = None
        self._forget_loss = forget_loss or LOSSES[args.forget_loss]
        self.compute_utility = compute_utility
        self._start: dict[str, float] = {}
        self._parts: dict[str, tuple[Any, int]] = {}
        pad_token_id = getattr(processing_class, "pad_token_id", None) or 0
        required = {parameter: parameter.requires_grad for parameter in model.parameters()}
        given = model
        config = unwrap_model(model).config.get_text_config()
        # The load-balance loss would pull routers away from the anchor. (Without labels no model adds it either.)
        self.forward_options = {"output_router_logits": False} if hasattr(config, "output_router_logits") else {}
        try:
            model = self._set_up(model, args, forget, pad_token_id)
            super().__init__(
                model,
                args,
                data_collator=PairCollator(pad_token_id),
                train_dataset=PairedRows(forget, retain, args.seed),
                eval_dataset=self.eval_forget,
                processing_class=processing_class,
                **kwargs,
            )
        except BaseException:
            if model is not given:
                model.unload()
            for parameter, value in required.items():
                parameter.requires_grad_(value)
            raise
        self.model_accepts_loss_kwargs = False  # each micro-batch's loss is a mean: the Trainer averages them

    # -- set-up --------------------------------------------------------------------------------------------------
    def _set_up(self, model: Any, args: ExpertUnlearningConfig, forget: TokenRows, pad_token_id: int) -> Any:
        """Decides what trains; the model it returns has the adapter."""
        first = pad_token_rows([forget[i] for i in range(min(len(forget), args.train_batch_size))], pad_token_id)
        if not first["attention_mask"].any():
            raise ValueError("`forget_dataset` begins with rows that are nothing but padding. Leave out empty texts.")
        if args.place_model_on_device is not False and not getattr(model, "hf_device_map", None):
            model.to(args.device)
        first = {name: tensor.to(args.device) for name, tensor in first.items()}
        existing = slice_adapter(model)
        if args.trainable == "expert":
            self._choose(model, args, forget, existing, pad_token_id)
        elif existing is not None:
            raise ValueError(f"`trainable={args.trainable!r}` needs a model without adapters.")
        else:
            moe_layers(model)  # says what is wrong with a model that has none
        # All that can fail comes before anything is put into the model.
        if args.anchor_coefficient:
            self.anchor = RouterAnchor(model, self.targets, anchor_kind(model, self.targets, args, first))
        if args.forget_loss == "rmu":
            self.steering = self._make_steering(model, args, first)
        if args.trainable == "expert":
            return model if existing is not None else self._with_slices(model, args)
        freeze_routers(model) if args.trainable == "all_but_routers" else model.requires_grad_(True)
        if args.forget_loss in ("npo", "rmu"):
            self._reference_model = copy.deepcopy(model).eval().requires_grad_(False)
        return model

    def _choose(self, model: Any, args: Any, forget: TokenRows, existing: Any, pad_token_id: int) -> None:
        if existing is not None:
            self.targets = dict(existing.layers)
        elif hasattr(model, "peft_config"):
            raise ValueError(
                "`model` has an adapter of another type active. Merge it first, or pass a model with an expert-slice "
                "adapter."
            )
        else:
            self.targets, self.scores = choose_targets(model, args, forget, self.scores, pad_token_id)

    def _with_slices(self, model: Any, args: ExpertUnlearningConfig) -> Any:
        from peft import get_peft_model

        from hf_moe.adapters.expert_slice import ExpertSliceConfig

        config = ExpertSliceConfig(layers=self.targets, train_router=args.train_router, task_type="CAUSAL_LM")
        return get_peft_model(model, config)

    def _make_steering(self, model: Any, args: ExpertUnlearningConfig, batch: dict[str, torch.Tensor]) -> Steering:
        layers = decoder_layers(model)
        if args.rmu_layer is not None:
            if not 0 <= args.rmu_layer < len(layers):
                raise ValueError(f"`rmu_layer` must be from 0 to {len(layers) - 1}, got {args.rmu_layer}.")
            layer = layers[args.rmu_layer]
        else:
            names = list(self.targets) or [moe_layers(model)[-1].name]
            layer = [path for path in layers if any(name.startswith(f"{path}.") for name in names)][-1]
        steering = Steering(model, layer, args.seed)
        length = args.rmu_steering
        if length is None:
            states = steering.hidden_states(unwrap_model(model), batch, self.forward_options)
            length = 4.0 * states[batch["attention_mask"].bool()].float().norm(dim=-1).mean().item()
        steering.length = length
        return steering

    # -- loss ----------------------------------------------------------------------------------------------------
    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model as it was at the start, in eval mode and without gradients while the block runs."""
        if self._reference_model is not None:
            with torch.no_grad():
                yield self._reference_model.to(self.args.device)
            return
        if self.args.trainable != "expert":
            raise ValueError(f"`trainable={self.args.trainable!r}` keeps a reference only for the losses npo and rmu.")
        from hf_moe.adapters.expert_slice import bypass_slices

        with torch.no_grad(), bypass_slices(self.model), eval_mode(self.model):
            yield self.model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Forget term, retain term and anchor of a pair of batches."""
        step = UnlearningStep(self, model, inputs["forget"], inputs.get("retain"))
        found = self._forget_loss(step)
        forget, retain = found if isinstance(found, tuple) else (found, None)
        loss, parts = forget, {"forget_term": forget}
        if retain is not None and self.args.retain_coefficient:
            term: Any = retain() if callable(retain) else retain
            loss, parts["retain_term"] = loss + self.args.retain_coefficient * term, term
        if self.anchor is not None:
            _ = step.forget_logits  # the pass it is read in
            parts["anchor"] = self.anchor.loss(step.forget["attention_mask"])
            loss = loss + self.args.anchor_coefficient * parts["anchor"].to(loss.device)
        for name, value in parts.items():
            total, count = self._parts.get(name, (0.0, 0))
            self._parts[name] = (total + value.detach(), count + 1)
        return (loss, {"logits": step.forget_logits}) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the class below."""
        if self.args.trainable != "expert":
            self.measure_start()  # what it was cannot be seen later on
        if self.scores is not None and self.args.should_save:
            self.scores.to_json(os.path.join(str(self.args.output_dir), "expert_scores.json"))
        with nullcontext() if self.anchor is None else self.anchor.attached():
            return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the class below, with the terms of the loss, means since the last log."""
        if self.model.training and self._parts and "loss" in logs:
            means = torch.stack([total / count for total, count in self._parts.values()])
            means: Any = self.accelerator.reduce(means, "mean")
            logs.update(zip(self._parts, means.tolist(), strict=True))
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of both batches."""
        return sum(super(ExpertUnlearningTrainer, self).floating_point_ops(batch) for batch in inputs.values())

    # -- checkpoints of whole models -----------------------------------------------------------------------------
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is not None or not self._load_whole(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_whole(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_whole(self, folder: str | None) -> bool:
        """Through `from_pretrained`: transformers saves experts one by one, the Trainer looks for stacked ones."""
        is_bare = isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if folder is None or not is_bare:
            return False
        loaded = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(loaded.state_dict())
        return True
