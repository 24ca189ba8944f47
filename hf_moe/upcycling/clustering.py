"""Balanced k-means: clusters of equal size, for channels that become experts and tokens that become router rows."""

import torch


__all__ = ["balanced_kmeans", "kmeans_seeds"]


@torch.no_grad()
def balanced_kmeans(
    points: torch.Tensor, num_clusters: int, generator: torch.Generator | None = None, iterations: int = 20
) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means whose clusters differ in size by at most one point.

    Starts from k-means++ seeds. In each round the points that lose most by not getting their nearest centroid choose
    first, among the clusters that still have room.

    Args:
        points (`torch.Tensor` of shape `(P, F)`): Float points.
        num_clusters (`int`): Number of clusters, at most P.
        generator (`torch.Generator`, *optional*): CPU generator of the seeds.
        iterations (`int`, defaults to 20): Rounds at most; stops when nothing changes.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Cluster of each point `(P,)` and centroids `(num_clusters, F)`.

    Raises:
        ValueError: fewer points than clusters.
    """
    if len(points) < num_clusters:
        raise ValueError(
            f"{num_clusters} clusters need at least as many points, got {len(points)}; calibrate on more."
        )
    points = points.float()
    centroids = kmeans_seeds(points, num_clusters, generator)
    labels = torch.full((len(points),), -1)
    for _ in range(iterations):
        new_labels = _assign(torch.cdist(points, centroids))
        if torch.equal(new_labels, labels):
            break
        labels = new_labels
        sums = torch.zeros_like(centroids).index_add_(0, labels, points)
        centroids = sums / torch.bincount(labels, minlength=num_clusters).unsqueeze(-1)
    return labels, centroids


def kmeans_seeds(points: torch.Tensor, num_clusters: int, generator: torch.Generator | None) -> torch.Tensor:
    """k-means++: each seed is drawn with a probability that grows with the squared distance to the seeds before.

    Args:
        points (`torch.Tensor` of shape `(P, F)`): Float points.
        num_clusters (`int`): Number of seeds.
        generator (`torch.Generator`, *optional*): CPU generator.

    Returns:
        `torch.Tensor` of shape `(num_clusters, F)`.
    """
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = torch.cdist(points, points[chosen]).squeeze(-1) ** 2
    for _ in range(num_clusters - 1):
        # Points that coincide with a seed have no weight; where all do, any point is as good.
        weights = nearest if bool(nearest.sum() > 0) else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, torch.cdist(points, points[chosen[-1:]]).squeeze(-1) ** 2)
    return points[chosen].clone()


def _assign(distance: torch.Tensor) -> torch.Tensor:
    """Balanced assignment of points to clusters, given `(P, num_clusters)` distances."""
    num_points, num_clusters = distance.shape
    room = [num_points // num_clusters + (c < num_points % num_clusters) for c in range(num_clusters)]
    ranked, preference = distance.sort(dim=-1)
    regret = ranked[:, min(1, num_clusters - 1)] - ranked[:, 0]
    order = regret.argsort(descending=True, stable=True).tolist()
    preference = preference.tolist()
    labels = torch.empty(num_points, dtype=torch.long)
    for point in order:
        cluster = next(c for c in preference[point] if room[c])
        room[cluster] -= 1
        labels[point] = cluster
    return labels
