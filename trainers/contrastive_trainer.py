"""Contrastive training of CLIP and CLIP-MoE: feed-forwards on clusters, then routers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_moe.routing import BaseRouter
from hf_moe.views import unwrap_model

from .contrastive_clusters import ClusterBatchSampler
from .contrastive_config import ContrastiveConfig
from .contrastive_losses import contrastive_loss
from .moe_mixin import MoeTrainerMixin


__all__ = ["ContrastiveTrainer", "train_part"]

#: What a batch gives the model.
INPUTS = ("input_ids", "attention_mask", "position_ids", "pixel_values")


def train_part(model: nn.Module, part: str) -> int:
    """Freezes all of a CLIP but one part.

    Args:
        model (`CLIPModel` or [`~hf_moe.MoeClipModel`]): The model.
        part (`str`): `"feed_forward"` (of both towers; experts too, routers not), `"router"`, `"moe"` (experts and
            routers, dense feed-forwards not) or `"all"`.

    Returns:
        `int`: Number of trainable parameters.

    Raises:
        ValueError: the model has no such part.
    """
    model = unwrap_model(model)
    routers = [module for module in model.modules() if isinstance(module, BaseRouter)]
    of_routers = {id(p) for router in routers for p in router.parameters()}
    fixed = {id(p) for router in routers for p in router.parameters() if not p.requires_grad}
    total = 0
    for name, parameter in model.named_parameters():
        is_router = id(parameter) in of_routers
        wanted = {
            "all": True,
            "router": is_router,
            "feed_forward": ".mlp." in name and not is_router,
            "moe": ".mlp.experts." in name or is_router,
        }[part]
        parameter.requires_grad_(wanted and id(parameter) not in fixed)
        total += parameter.numel() if parameter.requires_grad else 0
    if total == 0:
        raise ValueError(f"`trained={part!r}`, but {type(model).__name__} has no parameters of that kind.")
    return total


class _ContrastiveLoss(Trainer):
    args: Any

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: inputs[name] for name in INPUTS if name in inputs})
        scale = unwrap_model(self.accelerator.unwrap_model(self.model)).logit_scale.exp()
        loss = contrastive_loss(
            outputs.image_embeds, outputs.text_embeds, scale, self.args.label_smoothing, gather=self.model.training
        )
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # The logits of a batch compare it with itself and cannot be put together with those of others.
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None


class ContrastiveTrainer(MoeTrainerMixin, _ContrastiveLoss):
    r"""`Trainer` with CLIP's loss over the pairs of all processes, for the stages of
    [CLIP-MoE](https://huggingface.co/papers/2409.19291):

    - `trained="feed_forward"` with `clusters`: a stage of multistage contrastive learning (Sec. 3.1). Batches come
      from one cluster each, of pairs that the stage before cannot tell apart.
    - `trained="router"`: router tuning of a [`~hf_moe.MoeClipModel`] (Sec. 3.2), with the balance losses of both
      towers (Mixtral's over both in the released code, which also halves the text's).

    Rows have `pixel_values` and `input_ids` (and `attention_mask`); [`ClipCollator`] makes them of images and texts.

    Args:
        model (`CLIPModel` or [`~hf_moe.MoeClipModel`]): What is trained; its other parts are frozen.
        args ([`ContrastiveConfig`], *optional*): Configuration of the run.
        clusters (`Sequence[int]`, *optional*): Cluster of each row of `train_dataset`, from [`cluster_pairs`].
        **kwargs: As in [`~transformers.Trainer`].

    Raises:
        ValueError: `clusters` does not fit the dataset or fills no batch; the model lacks the part to train.
        TypeError: `args` is of another class.

    Example:

    ```python
    >>> from hf_moe.trainers import ContrastiveConfig, ContrastiveTrainer
    >>> trainer = ContrastiveTrainer(clip, ContrastiveConfig("out"), train_dataset=rows, clusters=labels)
    >>> trainer.train()
    ```
    """

    allows_dense = True

    def __init__(self, model: Any = None, args: Any = None, *, clusters: Sequence[int] | None = None, **kwargs: Any):
        args = ContrastiveConfig("contrastive") if args is None else args
        if not isinstance(args, ContrastiveConfig):
            raise TypeError(f"`args` must be a ContrastiveConfig, got {type(args).__name__}.")
        rows = kwargs.get("train_dataset")
        self._sampler: ClusterBatchSampler | None = None
        if clusters is not None:
            if rows is None or len(clusters) != len(rows):
                raise ValueError(
                    f"`clusters` must hold one label for each row of `train_dataset` "
                    f"({'none' if rows is None else len(rows)}), got {len(clusters)}."
                )
            seed = args.seed if args.data_seed is None else args.data_seed
            self._sampler = ClusterBatchSampler(clusters, args.train_batch_size, seed, args.world_size)
        train_part(model, args.trained)
        if args.fixed_logit_scale is not None:
            scale = unwrap_model(model).logit_scale
            scale.requires_grad_(False).fill_(args.fixed_logit_scale)
        super().__init__(model, args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As in the class below, or batches from within clusters."""
        if self._sampler is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)
