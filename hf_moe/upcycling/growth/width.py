"""One weight of the wider model, made from one (or, for AKI, two) of the small model's."""

from dataclasses import dataclass

import torch

from .families import Axes
from .unit_maps import UnitMap


__all__ = ["WIDTHS", "Widener"]

WIDTHS = ("fpi_uneven", "fpi", "aki")
# Shares are drawn for so many rows at a time: those of a whole head would take more memory than the head.
ROWS = 4096


@dataclass
class Widener:
    r"""Copies units and shares out what leaves them.

    Input side: W'[:, j] = s_j W[:, g(j)] with shares s that sum to 1 over the copies of a unit, so that W' x' = W x
    where x'_j = x_g(j). Output side: W'[i] = W[g(i)]. With `"fpi"` s_j = 1 / c(g(j)): function-preserving
    initialisation (bert2BERT 2110.07143, Sec. 3.2; AquilaMoE 2408.06567, Sec. 3.2), where the copies of a unit get
    equal gradients for ever. With `"fpi_uneven"` the shares are random, and the copies part. With `"aki"` the added
    rows of a layer come from the next layer (advanced knowledge initialisation).

    Args:
        maps (`dict[str, UnitMap]`): By units.
        width (`str`): `"fpi_uneven"`, `"fpi"` or `"aki"`.
        noise_std (`float`): Noise on added rows, relative to the standard deviation of the matrix.
        generator (`torch.Generator`): CPU generator; the only source of randomness.
    """

    maps: dict[str, UnitMap]
    width: str
    noise_std: float
    generator: torch.Generator

    def matrix(self, weight: torch.Tensor, axes: Axes, following: torch.Tensor | None = None) -> torch.Tensor:
        """A wider matrix.

        Args:
            weight (`torch.Tensor` of shape `(outputs, inputs)`): Of the small model, float32.
            axes ([`Axes`]): Its units.
            following (`torch.Tensor`, *optional*): The same matrix of the next layer, for AKI.

        Returns:
            `torch.Tensor` of shape `(new outputs, new inputs)`.
        """
        rows = self._rows(weight, axes)
        columns = self.maps.get(axes.inputs or "")
        wide = rows if columns is None else self._columns(rows, columns)
        outputs = self.maps.get(axes.outputs or "")
        if outputs is None or outputs.is_identity:
            return wide
        if following is not None and self.width == "aki":
            other = self._rows(following, axes)
            other = other if columns is None else self._columns(other, columns)
            wide = torch.where(outputs.added.unsqueeze(-1), other, wide)
        if self.noise_std:
            noise = torch.randn(wide.shape, generator=self.generator) * (self.noise_std * weight.std())
            wide = torch.where(outputs.added.unsqueeze(-1), wide + noise, wide)
        return wide

    def vector(self, values: torch.Tensor, axes: Axes, following: torch.Tensor | None = None) -> torch.Tensor:
        """A longer bias or norm weight; `following` (biases only) as in [`matrix`]."""
        outputs = self.maps.get(axes.outputs or "")
        if outputs is None or outputs.is_identity:
            return values
        wide = values[outputs.index]
        if following is not None and self.width == "aki":
            wide = torch.where(outputs.added, following[outputs.index], wide)
        return wide

    def head_shares(self) -> torch.Tensor:
        """Shares of the residual stream's coordinates, `(D,)`, for heads that cannot share out their own columns
        because these are the embeddings."""
        hidden = self.maps["hidden"]
        if self.width == "fpi_uneven":
            return hidden.uneven_shares(1, self.generator)[0]
        return hidden.shares()

    def _rows(self, weight: torch.Tensor, axes: Axes) -> torch.Tensor:
        outputs = self.maps.get(axes.outputs or "")
        return weight if outputs is None or outputs.is_identity else weight[outputs.index]

    def _columns(self, weight: torch.Tensor, columns: UnitMap) -> torch.Tensor:
        if columns.is_identity:
            return weight
        if self.width != "fpi_uneven":
            return weight[:, columns.index] * columns.shares()
        wide = weight.new_empty(len(weight), len(columns.index))
        for start in range(0, len(weight), ROWS):
            rows = weight[start : start + ROWS, columns.index]
            wide[start : start + ROWS] = rows * columns.uneven_shares(len(rows), self.generator)
        return wide
