"""Clusters of image-text pairs, and batches from within one cluster: negatives that earlier stages cannot tell apart.

Shapes: P pairs, E embedding, k clusters.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from hf_moe.upcycling.clustering import kmeans_seeds


__all__ = ["ClusterBatchSampler", "cluster_pairs", "kmeans"]


@torch.no_grad()
def kmeans(
    points: torch.Tensor,
    num_clusters: int,
    generator: torch.Generator | None = None,
    max_iterations: int = 500,
    tolerance: float = 1e-5,
    chunk_size: int = 100_000,
) -> torch.Tensor:
    """Lloyd's k-means from k-means++ seeds; a cluster that loses all its points takes the one farthest from its own.

    Args:
        points (`torch.Tensor` of shape `(P, E)`): Points.
        num_clusters (`int`): k, at most P.
        generator (`torch.Generator`, *optional*): CPU generator of the seeds.
        max_iterations (`int`, defaults to 500): Rounds at most.
        tolerance (`float`, defaults to 1e-5): Ends when no centroid moves farther.
        chunk_size (`int`, defaults to 100,000): Points whose distances exist at a time.

    Returns:
        `torch.Tensor` of shape `(P,)`: Cluster of each point.

    Raises:
        ValueError: fewer points than clusters.
    """
    if not 1 <= num_clusters <= len(points):
        raise ValueError(f"`num_clusters` must be from 1 to the number of points ({len(points)}), got {num_clusters}.")
    points = points.float()
    sample = points
    if len(points) > chunk_size:  # enough to seed with
        sample = points[torch.randperm(len(points), generator=generator)[:chunk_size]]
    centroids, labels = kmeans_seeds(sample, num_clusters, generator), None
    for _ in range(max_iterations):
        nearest = [torch.cdist(part, centroids).min(dim=-1) for part in points.split(chunk_size)]
        distance, labels = torch.cat([n.values for n in nearest]), torch.cat([n.indices for n in nearest])
        counts = torch.bincount(labels, minlength=num_clusters)
        moved = torch.zeros_like(centroids).index_add_(0, labels, points) / counts.clamp(min=1)[:, None]
        for empty in (counts == 0).nonzero().flatten().tolist():
            farthest = distance.argmax()
            moved[empty], distance[farthest] = points[farthest], 0.0
        shift, centroids = (moved - centroids).norm(dim=-1).max(), moved
        if shift <= tolerance:
            break
    return torch.cat([torch.cdist(part, centroids).argmin(dim=-1) for part in points.split(chunk_size)])


def cluster_pairs(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    previous: torch.Tensor | None = None,
    num_clusters: int = 3,
    seed: int = 0,
) -> torch.Tensor:
    """Labels of a stage of multistage contrastive learning: with image cluster i and text cluster t of k, and the
    label a of the stage before, k^2 a + k t + i ([CLIP-MoE](https://huggingface.co/papers/2409.19291), Sec. 3.1).

    Features are normalised first; the paper does not say whether it does.

    Args:
        image_features, text_features (`torch.Tensor` of shape `(P, E)`): Of the model of the stage before.
        previous (`torch.Tensor` of shape `(P,)`, *optional*): Labels of the stage before; 0 before the first one.
        num_clusters (`int`, defaults to 3): k per modality.
        seed (`int`, defaults to 0): Seed of both clusterings.

    Returns:
        `torch.Tensor` of shape `(P,)`, int64.
    """
    parts = []
    for number, features in enumerate((image_features, text_features)):
        generator = torch.Generator().manual_seed(2 * seed + number)
        parts.append(kmeans(torch.nn.functional.normalize(features.float(), dim=-1), num_clusters, generator).cpu())
    image, text = parts
    before = torch.zeros_like(image) if previous is None else previous.cpu()
    return num_clusters**2 * before + num_clusters * text + image


class ClusterBatchSampler(Sampler[list[int]]):
    """Batches of indices, each from one cluster. Clusters take turns, in a new order and with newly drawn batches in
    every epoch; what does not fill a batch is left out. The batches of one step, one per process, are of one cluster.

    Args:
        labels (`Sequence[int]` or `torch.Tensor` of shape `(P,)`): Cluster of each pair.
        batch_size (`int`): Pairs per batch.
        seed (`int`, defaults to 0): With the epoch (`set_epoch`), decides the order.
        num_processes (`int`, defaults to 1): Processes that take batches in turn.

    Raises:
        ValueError: no cluster fills a batch.
    """

    def __init__(self, labels: Sequence[int] | torch.Tensor, batch_size: int, seed: int = 0, num_processes: int = 1):
        labels = torch.as_tensor(labels)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        members = [(labels == label).nonzero().flatten() for label in labels.unique()]
        self.step_size = batch_size * num_processes
        self.clusters = [m for m in members if len(m) >= self.step_size]
        if not self.clusters:
            largest = max((len(m) for m in members), default=0)
            raise ValueError(
                f"`batch_size={batch_size}` on {num_processes} process(es) takes {self.step_size} pairs of a cluster, "
                f"but the largest of {len(members)} clusters has {largest}. Use smaller batches, fewer clusters "
                "(`num_clusters`), fewer stages or more pairs."
            )
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch; another epoch has another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(cluster) // self.step_size for cluster in self.clusters) * (self.step_size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        waiting = []
        for cluster in self.clusters:
            drawn = cluster[torch.randperm(len(cluster), generator=generator)]
            whole = len(drawn) // self.step_size * self.step_size
            waiting.append(list(drawn[:whole].view(-1, self.step_size // self.batch_size, self.batch_size)))
        while waiting:
            for number in torch.randperm(len(waiting), generator=generator).tolist():
                yield from waiting[number].pop().tolist()
            waiting = [batches for batches in waiting if batches]
