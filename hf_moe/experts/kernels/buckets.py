"""Row counts that matrix products are rounded up to.

oneDNN, which multiplies bfloat16 and float16 on CPU, generates a kernel for every new number of rows, and the number
of tokens of an expert is new nearly every time. Eight sizes per power of two keep the kernels few (they all stay in
oneDNN's cache) for at most an eighth more rows. MKL's float32 products have no such cost.
"""

import torch


__all__ = ["bucket_rows", "generates_kernels"]

_FINEST = 8  # below, every row count has its own kernel: there are only so many


def bucket_rows(rows: int) -> int:
    """The smallest size of the grid that holds `rows`.

    Args:
        rows (`int`): Tokens of one expert.

    Example:
        ```python
        >>> [bucket_rows(n) for n in (3, 9, 33, 130, 1000)]
        [3, 16, 48, 144, 1024]
        ```
    """
    if rows <= _FINEST:
        return rows
    step = max(_FINEST if rows <= 32 else 16, 1 << ((rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def generates_kernels(dtype: torch.dtype) -> bool:
    """Whether products of this dtype pay for every new shape."""
    return dtype in (torch.bfloat16, torch.float16)
