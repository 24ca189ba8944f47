"""Memory that one call needs only until it returns, kept for the next call of the same thread.

Fresh memory of this size is mapped and zeroed page by page on every call, which costs as much as the arithmetic at
small batches. What is handed out here must never be returned to the user or saved for backward.
"""

import threading

import torch


__all__ = ["MAX_KEPT_BYTES", "Workspace", "workspace"]

#: A buffer above this is not kept after the call.
MAX_KEPT_BYTES = 64 << 20


class Workspace(threading.local):
    """Named buffers of one thread, which grow as needed."""

    def __init__(self):
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory.

        Args:
            name (`str`): Two tensors in use at the same time need two names.
            shape (`tuple[int, ...]`): Shape.
            dtype (`torch.dtype`): Dtype.

        Returns:
            `torch.Tensor` on the CPU; its content is whatever was there.
        """
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # a tensor born in inference mode could not be written outside it
                buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
            if size <= MAX_KEPT_BYTES:
                self._buffers[name] = buffer
        return buffer[:size].view(dtype).view(shape)

    def clear(self) -> None:
        """Gives the memory of this thread back."""
        self._buffers.clear()


#: The buffers of the running thread.
workspace = Workspace()
