"""Multistage contrastive learning: each stage learns what the stages before it cannot tell apart.

Shapes: P pairs, E embedding.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
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
        features = encode_pairs(models[-1], train_dataset, data_collator, args.eval_batch_size)
        before = labels[-1] if labels else None
        labels.append(cluster_pairs(*features, before, num_clusters, seed=args.seed + stage))
        model = copy.deepcopy(base)
        scale = base.logit_scale.detach().clone()
        options = copy.copy(args)
        options.output_dir = str(Path(args.output_dir) / f"stage-{stage}")
        trainer = ContrastiveTrainer(
            model, options, train_dataset=train_dataset, data_collator=data_collator, clusters=labels[-1].tolist()
        )
        trainer.train()
        with torch.no_grad():
            model.logit_scale.copy_(scale)  # experts differ in feed-forwards alone
        models.append(model.requires_grad_(True).eval())
    return models, labels
