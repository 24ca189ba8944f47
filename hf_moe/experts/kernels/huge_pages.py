"""Large fresh tensors on pages of 2 MiB.

Memory of this size is mapped anew for every call, and the kernel hands it out zeroed, page by page, at the first
touch: with pages of 4 KiB that is a sixth of a training step of a wide bank. Asking for huge pages is an advice which
Linux follows where it can; elsewhere nothing happens.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import Any

import torch


__all__ = ["advise_huge_pages"]

# Below a few pages of 2 MiB there is nothing to gain.
_MIN_BYTES = 8 << 20


def advise_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Asks the system to back the memory of a tensor, which nobody has written yet, with huge pages.

    Args:
        tensor (`torch.Tensor`): Contiguous; on another device than the CPU, or small, it is left alone.

    Returns:
        `tensor`.

    Example:
        ```python
        gradient = advise_huge_pages(torch.empty_like(weight))
        ```
    """
    size = tensor.numel() * tensor.element_size()
    if size < _MIN_BYTES or tensor.device.type != "cpu" or type(tensor) is not torch.Tensor:
        return tensor
    advise = _madvise()
    if advise is not None:
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only
        end = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(begin, end - begin, mmap.MADV_HUGEPAGE)  # a refusal costs nothing and changes nothing
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], Any] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
