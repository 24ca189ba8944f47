"""Ternary matrices as bytes: four weights in a byte (2 bits each) or five (base 3, 1.6 bits each).

Shapes: N matrices, R rows, D columns.
"""

import torch


__all__ = ["PACKINGS", "pack", "packed_rows", "unpack"]

#: Name of a packing to how many weights of a column share a byte.
PACKINGS = {"2bit": 4, "base3": 5}


def packed_rows(rows: int, packing: str) -> int:
    """Rows of bytes that `rows` rows of weights take."""
    return -(-rows // PACKINGS[packing])


def _places(packing: str, device: torch.device) -> torch.Tensor:
    base, count = (4, 4) if packing == "2bit" else (3, 5)
    return (base ** torch.arange(count, device=device)).to(torch.int32)


def pack(codes: torch.Tensor, packing: str = "2bit") -> torch.Tensor:
    """Packs weights -1, 0, 1.

    The rows are cut into 4 (or 5) blocks of equal height, the last one filled with zeros; byte i of a column holds
    row i of every block, the first block in its lowest place. With `"2bit"` this is the layout of transformers'
    BitNet. A place holds the weight plus one.

    Args:
        codes (`torch.Tensor` of shape `(..., R, D)`): Weights, int8.
        packing (`str`, defaults to `"2bit"`): A key of [`PACKINGS`].

    Returns:
        `torch.Tensor` of shape `(..., ceil(R / 4), D)` (or 5), uint8.
    """
    places = PACKINGS[packing]
    height = packed_rows(codes.shape[-2], packing)
    filled = torch.nn.functional.pad(codes.to(torch.int32) + 1, (0, 0, 0, places * height - codes.shape[-2]), value=1)
    blocks = filled.unflatten(-2, (places, height))  # (..., places, height, D)
    return (blocks * _places(packing, codes.device).view(-1, 1, 1)).sum(dim=-3).to(torch.uint8)


def unpack(packed: torch.Tensor, rows: int, packing: str = "2bit") -> torch.Tensor:
    """The weights again.

    Args:
        packed (`torch.Tensor` of shape `(..., ceil(R / 4), D)`): As [`pack`] returns it.
        rows (`int`): R; what the last block was filled with is left out.
        packing (`str`, defaults to `"2bit"`): As for [`pack`].

    Returns:
        `torch.Tensor` of shape `(..., R, D)`, int8.
    """
    base = 4 if packing == "2bit" else 3
    values = packed.to(torch.int32).unsqueeze(-3)  # (..., 1, height, D)
    places = _places(packing, packed.device).view(-1, 1, 1)
    blocks = values.div(places, rounding_mode="floor") % base  # (..., places, height, D)
    return (blocks.flatten(-3, -2)[..., :rows, :] - 1).to(torch.int8)
