"""Generic data that are not on the device: their statistics, from which features are drawn in their place."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from hf_moe.upcycling.clustering import balanced_kmeans

from .local_expert_features import HeadFeatures


__all__ = ["GenericStatistics"]


@dataclass
class GenericStatistics:
    """Per class, some centroids and diagonal variances of the features of generic data: shipped instead of the data.

    Args:
        means (`torch.Tensor` of shape `(P, D + Q)`): Centroids of f and q together.
        variances (`torch.Tensor` of shape `(P, D + Q)`): Their spread.
        labels (`torch.Tensor` of shape `(P,)`): Class of each centroid.
        counts (`torch.Tensor` of shape `(P,)`): Examples behind each.
        width (`int`): D.

    Example:
        ```python
        statistics = trainer.collect_statistics(generic_dataset)  # where the classifier was trained
        statistics.save("generic.safetensors")
        LocalExpertTrainer(model, args, custom_dataset=mine, generic=GenericStatistics.load("generic.safetensors"))
        ```
    """

    means: torch.Tensor
    variances: torch.Tensor
    labels: torch.Tensor
    counts: torch.Tensor
    width: int

    @classmethod
    def of(cls, features: HeadFeatures, centroids: int = 4, seed: int = 0) -> "GenericStatistics":
        """Statistics of collected features.

        Args:
            features ([`HeadFeatures`]): Of generic data.
            centroids (`int`, defaults to 4): Per class, at most.
            seed (`int`, defaults to 0): Of the clustering.

        Raises:
            ValueError: `centroids` is below 1, or there are no features.
        """
        if centroids < 1 or not len(features.labels):
            raise ValueError(f"`centroids` must be at least 1 and `features` not empty, got {centroids}.")
        points = torch.cat([features.f, features.q], dim=-1)
        rows: list[tuple[torch.Tensor, torch.Tensor, int, int]] = []
        for label in features.labels.unique().tolist():
            members = points[features.labels == label]
            clusters, _ = balanced_kmeans(members, min(centroids, len(members)), torch.Generator().manual_seed(seed))
            for cluster in clusters.unique().tolist():
                part = members[clusters == cluster]
                rows.append((part.mean(dim=0), part.var(dim=0, unbiased=False), label, len(part)))
        means, variances = (torch.stack([row[i] for row in rows]) for i in (0, 1))
        labels, counts = (torch.tensor([row[i] for row in rows]) for i in (2, 3))
        return cls(means, variances, labels, counts, features.f.shape[1])

    def sample(self, size: int, head: Any, generator: torch.Generator) -> HeadFeatures:
        """Draws features as the generic data might have.

        Args:
            size (`int`): Rows.
            head (`nn.Linear`): The global expert's head, which gives their logits.
            generator (`torch.Generator`): Source of randomness.

        Returns:
            [`HeadFeatures`]
        """
        index = torch.multinomial(self.counts.float(), size, replacement=True, generator=generator)
        noise = torch.randn((size, self.means.shape[1]), generator=generator)
        points = self.means[index] + self.variances[index].sqrt() * noise
        f, q = points[:, : self.width], points[:, self.width :]
        with torch.no_grad():
            bias = None if head.bias is None else head.bias.float().cpu()
            z_global = F.linear(f, head.weight.float().cpu(), bias)
        return HeadFeatures(f, q, z_global, self.labels[index])

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file.

        Args:
            path (`str` or `os.PathLike`): The file; replaced only when it is complete.
        """
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        tensors = {name: getattr(self, name).contiguous() for name in ("means", "variances", "labels", "counts")}
        save_file({**tensors, "width": torch.tensor(self.width)}, partial)
        os.replace(partial, target)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "GenericStatistics":
        """Reads what [`~GenericStatistics.save`] wrote.

        Raises:
            ValueError: The file holds something else.
        """
        tensors = load_file(path)
        if tensors.keys() != {"means", "variances", "labels", "counts", "width"}:
            raise ValueError(
                f"`path` ({path}) holds no statistics of generic data: its tensors are {sorted(tensors)}."
            )
        width = int(tensors.pop("width"))
        return cls(width=width, **tensors)
