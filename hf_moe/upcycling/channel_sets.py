"""Which channels of a feed-forward each expert of Read-ME keeps, and which of them are stored once.

Shapes: N experts, I channels of the dense feed-forward.
"""

from dataclasses import dataclass

import torch

from .builders.masks import Masks


__all__ = ["ChannelSets", "channel_sets"]


@dataclass(frozen=True)
class ChannelSets:
    """The channels of one layer.

    Args:
        masks (`torch.Tensor` of shape `(N, I)`): Boolean, M_j.
        shared (`torch.Tensor` of shape `(R,)`): Channels stored once: what all masks have, but for what `multiple_of`
            moved to the experts.
        experts (`list[torch.Tensor]`): Per expert its other channels, all equally many.

    Example:
        ```python
        sets = channel_sets(activity, keep=3)
        [set(sets.shared.tolist()) | set(rest.tolist()) for rest in sets.experts]  # M_0, M_1, ...
        ```
    """

    masks: torch.Tensor
    shared: torch.Tensor
    experts: list[torch.Tensor]

    @property
    def expert_size(self) -> int:
        """Channels an expert has besides the shared ones."""
        return len(self.experts[0])


def channel_sets(activity: torch.Tensor, keep: int, multiple_of: int = 1) -> ChannelSets:
    """Masks of the most active channels per domain, and what they have in common (Read-ME, 2410.19123, Sec. 3).

    Args:
        activity (`torch.Tensor` of shape `(N, I)`): Mean |a_c| on the texts of each domain.
        keep (`int`): Channels per expert, d_ff.
        multiple_of (`int`, defaults to 1): Experts are stored with a multiple of so many channels, for fast kernels.
            The least active of the common channels then are stored with each expert, which changes no output.

    Returns:
        [`ChannelSets`]

    Raises:
        ValueError: `keep` is not between 1 and I.
    """
    masks: torch.Tensor = Masks.from_activity(activity, keep).masks
    common = masks.all(dim=0).nonzero().squeeze(-1)
    rest = keep - len(common)
    moved = min(-rest % multiple_of, len(common))  # none where experts are all alike and need nothing of their own
    order = activity.mean(dim=0)[common].argsort(descending=True, stable=True)
    shared = common[order[: len(common) - moved]].sort().values
    own = masks.clone()
    own[:, shared] = False
    return ChannelSets(masks, shared, [row.nonzero().squeeze(-1) for row in own])
