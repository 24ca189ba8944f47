"""The gate of MixDA and its mixture.

Shapes: B batch, S sequence, F width of the feed-forward network's inside, D hidden, n domains.
"""

from collections.abc import Sequence

import torch
from torch import nn


__all__ = ["DomainGate", "mix"]


class DomainGate(nn.Module):
    """How much of each domain adapter and how much of the feed-forward network an input gets.

    Outputs are in the order `[K_1, ..., K_n, F]`. Its widths are the paper's `W_d`, `W_u` with one entry in `hidden`,
    a single linear map with none, and the released code's network with `(768, 768, 768)` and dropout 0.2.

    Args:
        in_features (`int`): F, the width of what it reads.
        domains (`Sequence[str]`): Names of the domains; n of them.
        hidden (`Sequence[int]`, defaults to `()`): Widths of hidden layers, each followed by a ReLU.
        activation (`str`, defaults to `"softmax"`): Or `"sigmoid"`.
        pooling (`str`, defaults to `"token"`): What `q` is; see [`MixdaConfig`]. Kept for the layer.
        mix_form (`str`, defaults to `"mixture"`): How the weights are used; see [`mix`]. Kept for the layer.
        dropout (`float`, defaults to 0.0): Before every linear map.
        init_bias (`float`, defaults to 4.0): Bias of the last output, F, at the start; the others are 0.
        init_weights (`bool`, defaults to `True`): `False` draws the last bias too.
    """

    def __init__(
        self,
        in_features: int,
        domains: Sequence[str],
        hidden: Sequence[int] = (),
        *,
        activation: str = "softmax",
        pooling: str = "token",
        mix_form: str = "mixture",
        dropout: float = 0.0,
        init_bias: float = 4.0,
        init_weights: bool = True,
    ):
        super().__init__()
        self.domains = list(domains)
        self.enabled = list(domains)
        self.activation = activation
        self.pooling = pooling
        self.mix_form = mix_form
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Dropout(dropout), nn.Linear(in_features, width), nn.ReLU()]
            in_features = width
        self.hidden = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(in_features, len(self.domains) + 1)
        with torch.no_grad():  # in place: the weights may be on the meta device
            if init_weights:
                nn.init.zeros_(self.out.bias)
                self.out.bias[-1:].fill_(init_bias)
            else:
                nn.init.normal_(self.out.weight, std=0.1)
                nn.init.normal_(self.out.bias, std=0.1)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        """The weights of the enabled domains and of F.

        Args:
            q (`torch.Tensor` of shape `(..., F)`): What the gate reads.

        Returns:
            `torch.Tensor` of shape `(..., enabled + 1)`: In the order of `enabled`, F last.
        """
        logits = self.out(self.dropout(self.hidden(q)))  # (..., n + 1)
        if self.enabled != self.domains:
            logits = logits[..., [*map(self.domains.index, self.enabled), -1]]
        weights = logits.float().softmax(-1) if self.activation == "softmax" else logits.float().sigmoid()
        return weights.to(q.dtype)

    @torch.no_grad()
    def add(self, domain: str) -> None:
        """Makes room for one more domain; the rows there are stay as they are.

        Args:
            domain (`str`): Its name.
        """
        old = self.out
        self.out = nn.Linear(old.in_features, old.out_features + 1).to(old.weight)
        n = len(self.domains)
        for new, kept in ((self.out.weight, old.weight), (self.out.bias, old.bias)):
            new[:n] = kept[:n]
            new[n + 1] = kept[n]
        self.out.bias[n] = 0.0
        self.out.requires_grad_(old.weight.requires_grad)
        self.domains.append(domain)
        self.enabled.append(domain)

    @torch.no_grad()
    def remove(self, domain: str) -> None:
        """Drops a domain's row.

        Args:
            domain (`str`): Its name.
        """
        old, index = self.out, self.domains.index(domain)
        kept = [row for row in range(old.out_features) if row != index]
        self.out = nn.Linear(old.in_features, len(kept)).to(old.weight)
        self.out.weight.copy_(old.weight[kept])
        self.out.bias.copy_(old.bias[kept])
        self.out.requires_grad_(old.weight.requires_grad)
        self.domains.remove(domain)
        if domain in self.enabled:
            self.enabled.remove(domain)


def mix(
    weights: torch.Tensor, knowledge: Sequence[torch.Tensor], output: torch.Tensor, form: str = "mixture"
) -> torch.Tensor:
    """`o = sum_j w_j K_j(x) + w_n F(x)`, or with `form="residual"` `o = F(x) + sum_j w_j K_j(x)`.

    The first is the paper's. The second starts as the base exactly, because adapters start at zero.

    Args:
        weights (`torch.Tensor` of shape `(..., n + 1)`): The gate's; F last.
        knowledge (`Sequence[torch.Tensor]`): n tensors of shape `(..., D)`: what the domain adapters give.
        output (`torch.Tensor` of shape `(..., D)`): F(x).
        form (`str`, defaults to `"mixture"`): `"mixture"` or `"residual"`.

    Returns:
        `torch.Tensor` of shape `(..., D)`.

    Example:
        ```python
        mix(torch.tensor([0.25, 0.75]), [torch.tensor([3.0, -1.0])], torch.tensor([1.0, 2.0]))  # [1.5, 1.25]
        ```
    """
    result = output if form == "residual" else weights[..., -1:] * output
    for index, part in enumerate(knowledge):
        result = result + weights[..., index : index + 1] * part
    return result
