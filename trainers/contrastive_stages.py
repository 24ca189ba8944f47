"""Multistage contrastive learning: each stage learns what the stages before it cannot tell apart.

Shapes: P pairs, E embedding.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Subset
from transformers import CLIPModel

from hf_moe.modes import eval_mode

from .contrastive_clusters import cluster_pairs
from .contrastive_config import ContrastiveConfig
from .contrastive_trainer import INPUTS, ContrastiveTrainer


__all__ = ["ClipCollator", "encode_pairs", "multistage_contrastive_learning"]


class ClipCollator:
    """Rows with `image` and `text` to a batch.

    Args:
        processor (`CLIPProcessor`): Of the model.
        image_column, text_column (`str`, default `"image"` and `"text"`): Where they are.

    Raises:
        ValueError: a row lacks one of them.
    """

    def __init__(self, processor: Any, image_column: str = "image", text_column: str = "text"):
        self.processor, self.image_column, self.text_column = processor, image_column, text_column

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for name in (self.image_column, self.text_column):
            if any(row.get(name) is None for row in rows):
                raise ValueError(f"a row has no {name!r}; it has {sorted(rows[0])}. Name the columns of the dataset.")
        return dict(
            self.processor(
                images=[row[self.image_column] for row in rows],
                text=[row[self.text_column] for row in rows],
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
        )


@torch.no_grad()
def encode_pairs(
    model: Any, dataset: Any, collator: Callable | None = None, batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of every pair.

    Args:
        model (`CLIPModel` or [`~hf_moe.MoeClipModel`]): Used in evaluation mode.
        dataset: Rows, as for [`ContrastiveTrainer`].
        collator (`Callable`, *optional*): Rows to a batch.
        batch_size (`int`, defaults to 64): Pairs at a time.

    Returns:
        `tuple`: `image_embeds, text_embeds` of shape `(P, E)`, of length 1, in the order of the rows, on the CPU.
    """
    loader, found = DataLoader(dataset, batch_size, collate_fn=collator), []
    with eval_mode(model):
        for batch in loader:
            outputs = model(**{name: batch[name].to(model.device) for name in INPUTS if name in batch})
            found.append((outputs.image_embeds.cpu(), outputs.text_embeds.cpu()))
    images, texts = zip(*found, strict=True)
    return torch.cat(images), torch.cat(texts)


def multistage_contrastive_learning(
    base: CLIPModel,
    train_dataset: Any,
    args: ContrastiveConfig,
    *,
    num_stages: int = 3,
    num_clusters: int = 3,
    data_collator: Callable | None = None,
) -> tuple[list[CLIPModel], list[torch.Tensor]]:
    """The models whose feed-forwards become experts
    ([CLIP-MoE](https://huggingface.co/papers/2409.19291), Sec. 3.1):
    stage s clusters the pairs by the features of stage s - 1, within the clusters so far, and trains the feed-forwards
    of `base` anew on batches from one cluster each.

    Args:
        base (`CLIPModel`): Stage 0; left as it is.
        train_dataset: Rows, as for [`ContrastiveTrainer`].
        args ([`ContrastiveConfig`]): Of every stage; `output_dir` gets a folder per stage.
        num_stages (`int`, defaults to 3): Stages after the base, each of which gives one expert more.
        num_clusters (`int`, defaults to 3): Clusters per modality and stage.
        data_collator (`Callable`, *optional*): Rows to a batch.

    Returns:
        `tuple`: The `num_stages + 1` models, `base` first, and the labels of each stage.

    Raises:
        ValueError: `num_stages` below 1, or clusters too small for a batch.

    Example:

    ```python
    >>> models, _ = multistage_contrastive_learning(clip, rows, ContrastiveConfig("mcl"))
    >>> moe = hf_moe.upcycle_clip(clip, models)
    ```
    """
    if num_stages < 1:
        raise ValueError(f"`num_stages` must be at least 1, got {num_stages}.")
    models, labels = [base], []
    for stage in range(1, num_stages + 1):
        before = labels[-1] if labels else None
        labels.append(cluster_stage(models[-1], train_dataset, args, stage, before, num_clusters, data_collator))
        options = copy.copy(args)
        options.output_dir = str(Path(args.output_dir) / f"stage-{stage}")
        models.append(train_stage(base, train_dataset, options, stage, labels[-1], data_collator)[0])
    return models, labels


def cluster_stage(
    previous: CLIPModel,
    train_dataset: Any,
    args: ContrastiveConfig,
    stage: int,
    before: torch.Tensor | None = None,
    num_clusters: int = 3,
    data_collator: Callable | None = None,
) -> torch.Tensor:
    """Labels of a stage, the same in every process: each encodes a part of the pairs.

    Args:
        previous (`CLIPModel`): Model of the stage before.
        train_dataset, args, num_clusters, data_collator: As in [`multistage_contrastive_learning`].
        stage (`int`): From 1.
        before (`torch.Tensor` of shape `(P,)`, *optional*): Labels of the stage before.

    Returns:
        `torch.Tensor` of shape `(P,)`.
    """
    device, rank, world = previous.device, args.process_index, args.world_size
    part = -(-len(train_dataset) // world)
    share = range(min(rank * part, len(train_dataset)), min((rank + 1) * part, len(train_dataset)))
    rows = train_dataset if world == 1 else Subset(train_dataset, share)
    features = encode_pairs(previous.to(args.device), rows, data_collator, args.eval_batch_size)
    previous.to(device)
    if world > 1:
        images, texts = zip(*gather_object([features]), strict=True)  # in the order of ranks, which is that of rows
        features = torch.cat(images), torch.cat(texts)
    labels = cluster_pairs(*features, before, num_clusters, seed=args.seed + stage)
    return broadcast_object_list([labels])[0] if world > 1 else labels


def train_stage(
    base: CLIPModel,
    train_dataset: Any,
    args: ContrastiveConfig,
    stage: int,
    labels: torch.Tensor,
    data_collator: Callable | None = None,
    resume: str | None = None,
) -> tuple[CLIPModel, ContrastiveTrainer]:
    """Trains the feed-forwards of a copy of `base` on batches from one cluster each.

    Args:
        base, train_dataset, data_collator: As in [`multistage_contrastive_learning`].
        args ([`ContrastiveConfig`]): Of this stage.
        stage (`int`): From 1. Stages have batches of their own, even where their clusters are the same.
        labels (`torch.Tensor` of shape `(P,)`): Clusters.
        resume (`str`, *optional*): Checkpoint of this stage to go on from.

    Returns:
        `tuple`: The model, which differs from `base` in feed-forwards alone, and its trainer.
    """
    model, scale = copy.deepcopy(base), base.logit_scale.detach().clone()
    args = copy.copy(args)
    args.data_seed = (args.seed if args.data_seed is None else args.data_seed) + stage
    trainer = ContrastiveTrainer(
        model, args, train_dataset=train_dataset, data_collator=data_collator, clusters=labels.tolist()
    )
    trainer.train(resume_from_checkpoint=resume)
    model.to(base.device)
    with torch.no_grad():
        model.logit_scale.copy_(scale)  # experts differ in feed-forwards alone
    return model.requires_grad_(True).eval(), trainer
