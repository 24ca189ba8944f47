"""Customises a frozen classifier for one user: local expert, gate, threshold, report."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import TrainOutput

from hf_moe.adapters.local_expert import LocalExpertLayer

from .local_expert_config import LocalExpertTrainingArguments
from .local_expert_features import HeadFeatures, HeadFeaturesDataset, collect_features
from .local_expert_labels import calibrate_threshold, gate_labels
from .local_expert_statistics import GenericStatistics


__all__ = ["LocalExpertTrainer"]


class LocalExpertTrainer(Trainer):
    """Trains the adapter of [`~hf_moe.LocalExpertConfig`] (https://huggingface.co/papers/1811.00056).

    `train()` runs the frozen classifier over the data once; the fits on what its head saw take seconds: the local
    expert on the user's data, local experts that miss a part each for the gate's labels, the gate on the user's and
    as many generic examples, then the threshold.

    Args:
        model (`PeftModel`): A classifier with one local expert.
        args ([`LocalExpertTrainingArguments`], *optional*): Settings.
        custom_dataset (`Dataset`): The user's examples, with `labels`.
        generic (`Dataset` or [`GenericStatistics`]): Generic examples, or what stands in their place.
        eval_custom_dataset (`Dataset`, *optional*): The user's, held out.
        eval_generic_dataset (`Dataset`, *optional*): Generic, held out; the threshold is calibrated on it, or else on
            the replayed examples.
        **kwargs: For `Trainer`.

    Raises:
        ValueError: `model` has no local expert, or a data set is missing or too small.

    Example:
        ```python
        model = get_peft_model(classifier, LocalExpertConfig(gate_feature_module="bert.encoder.layer.0"))
        trainer = LocalExpertTrainer(model, args, custom_dataset=mine, generic=generic)
        trainer.train()
        trainer.evaluate()  # {"eval_custom_accuracy": ..., "eval_generic_accuracy": ..., ...}
        ```
    """

    args: LocalExpertTrainingArguments

    def __init__(
        self,
        model: Any,
        args: LocalExpertTrainingArguments | None = None,
        *,
        custom_dataset: Any = None,
        generic: Any = None,
        eval_custom_dataset: Any = None,
        eval_generic_dataset: Any = None,
        **kwargs: Any,
    ):
        args = LocalExpertTrainingArguments("local_expert") if args is None else args
        layers = [module for module in model.modules() if isinstance(module, LocalExpertLayer)]
        if len(layers) != 1:
            raise ValueError(
                f"`model` must have one head with a local expert, got {len(layers)}. "
                "Make it with `get_peft_model(classifier, LocalExpertConfig(...))`."
            )
        if custom_dataset is None or len(custom_dataset) < args.num_folds:
            size = 0 if custom_dataset is None else len(custom_dataset)
            raise ValueError(f"`custom_dataset` needs at least `num_folds` ({args.num_folds}) examples, got {size}.")
        if generic is None or (not isinstance(generic, GenericStatistics) and not len(generic)):
            raise ValueError(
                "`generic` must be a data set with examples, or a `GenericStatistics`: the gate needs both kinds."
            )
        super().__init__(model, args, train_dataset=custom_dataset, **kwargs)
        self.layer = layers[0]
        self.adapter_name = self.layer.active_adapters[0]
        self.generic = generic
        self.eval_datasets = {"custom": eval_custom_dataset, "generic": eval_generic_dataset}

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Fits local expert, gate and threshold.

        Returns:
            `TrainOutput`: With the last losses of both fits as metrics.
        """
        generator = torch.Generator().manual_seed(self.args.seed)
        custom = self.features(self.train_dataset)
        replay = self._replay(len(custom.labels) if self.args.num_replay is None else self.args.num_replay, generator)
        expert = self.layer.cell("expert", self.adapter_name)
        start = copy.deepcopy(expert)
        expert_loss = self._fit_expert(expert, custom)
        unseen = self._right_on_unseen(start, custom, generator)
        seen_by_both = HeadFeatures(*(torch.cat(pair) for pair in zip(custom, replay, strict=True)))
        local_right = torch.cat([unseen, self._local_right(expert, replay)])
        is_custom = torch.arange(len(local_right)) < len(custom.labels)
        targets = gate_labels(seen_by_both.right, local_right, is_custom, self.args.gate_target)
        gate_loss = self._fit_gate(seen_by_both, targets)
        if self.args.calibrate:
            self._calibrate(replay)
        metrics = {"expert_loss": expert_loss, "gate_loss": gate_loss, "threshold": self.threshold}
        self.log(metrics)
        return TrainOutput(self.state.global_step, expert_loss, metrics)

    @property
    def threshold(self) -> float:
        """From which gate probability on the local expert answers."""
        return self.layer.cell("gate", self.adapter_name).threshold.item()

    def features(self, dataset: Any) -> HeadFeatures:
        """What the head and the gate see of a data set; see [`HeadFeatures`]."""
        return collect_features(self, self.layer, self.adapter_name, dataset)

    def collect_statistics(self, dataset: Any, centroids: int = 4) -> GenericStatistics:
        """Statistics of generic data, to ship instead of them.

        Args:
            dataset (`Dataset`): Generic examples, with `labels`.
            centroids (`int`, defaults to 4): Per class.

        Returns:
            [`GenericStatistics`]
        """
        return GenericStatistics.of(self.features(dataset), centroids, self.args.seed)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Accuracy of the global expert, of both together, and of an ideal gate, on the held-out data.

        Args:
            eval_dataset (`dict`, *optional*): Data sets by name, in place of those given at construction.
            ignore_keys: Not used.
            metric_key_prefix (`str`, defaults to `"eval"`): First part of the names.

        Returns:
            `dict[str, float]`: Per data set `accuracy`, `global_accuracy`, `local_accuracy`, `oracle_accuracy`,
            `gate_rate`; and `added_parameters`, `added_parameter_fraction`, `added_flop_fraction` (a proxy of the
            energy).

        Raises:
            ValueError: There is no held-out data set.
        """
        datasets = {k: v for k, v in (eval_dataset or self.eval_datasets).items() if v is not None}
        if not datasets:
            raise ValueError("`evaluate` needs `eval_custom_dataset` or `eval_generic_dataset`, or data sets by name.")
        expert = self.layer.cell("expert", self.adapter_name)
        report: dict[str, float] = {}
        for name, dataset in datasets.items():
            features = self.features(dataset)
            local_right, chosen = self._local_right(expert, features), self._gate(features) >= self.threshold
            answers = {
                "accuracy": torch.where(chosen, local_right, features.right),
                "global_accuracy": features.right,
                "local_accuracy": local_right,
                "oracle_accuracy": features.right | local_right,
                "gate_rate": chosen,
            }
            report |= {
                f"{metric_key_prefix}_{name}_{key}": value.double().mean().item() for key, value in answers.items()
            }
        report |= {
            f"{metric_key_prefix}_{key}": value for key, value in self._cost(next(iter(datasets.values()))).items()
        }
        self.log(report)
        return report

    def _replay(self, size: int, generator: torch.Generator) -> HeadFeatures:
        if isinstance(self.generic, GenericStatistics):
            return self.generic.sample(size, self.layer.get_base_layer(), generator)
        index = torch.randperm(len(self.generic), generator=generator)[:size].tolist()
        return self.features(torch.utils.data.Subset(self.generic, index))

    def _fit_expert(self, expert: nn.Module, features: HeadFeatures) -> float:
        weights = 1 + self.args.error_weight * (~features.right).float()
        return self._fit(_ExpertTask(expert), HeadFeaturesDataset(features, weights=weights))

    def _right_on_unseen(self, start: nn.Module, custom: HeadFeatures, generator: torch.Generator) -> torch.Tensor:
        fold = torch.randperm(len(custom.labels), generator=generator) % self.args.num_folds
        right = torch.zeros(len(fold), dtype=torch.bool)
        for number in range(self.args.num_folds):
            expert = copy.deepcopy(start)
            self._fit_expert(expert, custom.rows(fold != number))
            right[fold == number] = self._local_right(expert, custom.rows(fold == number))
        return right

    def _fit_gate(self, features: HeadFeatures, targets: torch.Tensor) -> float:
        kept = targets >= 0
        positive, total = int((targets == 1).sum()), int(kept.sum())
        if positive in (0, total):  # one answer is always right
            self.model.base_model.set_threshold(self.adapter_name, 0.0 if positive else 2.0)
            return 0.0
        weights = torch.where(targets == 1, total / (2 * positive), total / (2 * (total - positive)))
        rows = HeadFeaturesDataset(features.rows(kept), weights=weights[kept], targets=targets[kept].float())
        return self._fit(_GateTask(self.layer.cell("gate", self.adapter_name)), rows)

    def _calibrate(self, replay: HeadFeatures) -> None:
        dataset = self.eval_datasets["generic"]
        generic = replay if dataset is None else self.features(dataset)
        local_right = self._local_right(self.layer.cell("expert", self.adapter_name), generic)
        threshold = calibrate_threshold(self._gate(generic), generic.right, local_right, self.args.max_generic_drop)
        self.model.base_model.set_threshold(self.adapter_name, threshold)

    def _fit(self, task: nn.Module, rows: HeadFeaturesDataset) -> float:
        args = copy.copy(self.args)
        args.remove_unused_columns, args.save_strategy, args.eval_strategy = False, "no", "no"
        args.load_best_model_at_end, args.report_to, args.push_to_hub = False, [], False
        args.disable_tqdm = True  # one bar for each of many short fits says little
        task.requires_grad_(True)
        trainer = Trainer(task, args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
        self.state.global_step += trainer.state.global_step
        return result.training_loss

    @torch.no_grad()
    def _local_right(self, expert: nn.Module, features: HeadFeatures) -> torch.Tensor:
        device = next(expert.parameters()).device
        z_local = expert(features.f.to(device), features.z_global.to(device)).cpu()
        return z_local.argmax(dim=-1) == features.labels

    @torch.no_grad()
    def _gate(self, features: HeadFeatures) -> torch.Tensor:
        device = next(self.layer.cell("gate", self.adapter_name).parameters()).device
        return self.layer.gate_logit(self.adapter_name, features.q.to(device)).sigmoid().squeeze(-1).cpu()

    def _cost(self, dataset: Any) -> dict[str, float]:
        added = sum(
            p.numel()
            for container in self.layer.adapter_layer_names
            for p in getattr(self.layer, container)[self.adapter_name].parameters()
        )
        whole = sum(p.numel() for name, p in self.model.named_parameters() if LocalExpertLayer.prefix not in name)
        batch = self._prepare_inputs(next(iter(self.get_test_dataloader(dataset))))
        batch = {name: value for name, value in batch.items() if name != "labels"}
        training, flops = self.model.training, []
        self.model.eval()  # or a batch norm of the global expert would learn from this
        for enabled in (False, True):
            self.layer.enable_adapters(enabled)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.model(**batch)
            flops.append(counter.get_total_flops())
        self.model.train(training)
        return {
            "added_parameters": added,
            "added_parameter_fraction": added / whole,
            "added_flop_fraction": flops[1] / flops[0] - 1,
        }


class _ExpertTask(nn.Module):
    """Cross-entropy of the local expert, weighted by example."""

    def __init__(self, expert: nn.Module):
        super().__init__()
        self.expert = expert

    def forward(self, f: Any, q: Any, z_global: Any, labels: Any, weights: Any) -> dict[str, torch.Tensor]:
        loss = F.cross_entropy(self.expert(f, z_global).float(), labels, reduction="none")
        return {"loss": (loss * weights).sum() / weights.sum()}


class _GateTask(nn.Module):
    """Binary cross-entropy of the gate, with both answers weighing the same."""

    def __init__(self, gate: nn.Module):
        super().__init__()
        self.gate = gate

    def forward(
        self, f: Any, q: Any, z_global: Any, labels: Any, weights: Any, targets: Any
    ) -> dict[str, torch.Tensor]:
        logit = self.gate(q).squeeze(-1)
        return {"loss": F.binary_cross_entropy_with_logits(logit, targets, weight=weights)}
