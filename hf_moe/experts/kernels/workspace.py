"""Memory that one call needs only until it returns, kept for the next call of the same thread.

Fresh memory of this size is mapped and zeroed page by page on every call, which costs as much as the arithmetic at
small batches. What is handed out here must never be returned to the user or saved for backward.
"""

import threading

import torch


__all__ = ["MAX_KEPT_BYTES", "Borrowed", "Workspace", "workspace"]

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
            del buffer
            self.release(name)  # before its successor is there
            with torch.inference_mode(False):  # a tensor born in inference mode could not be written outside it
                buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
            if size <= MAX_KEPT_BYTES:
                self._buffers[name] = buffer
        return buffer[:size].view(dtype).view(shape)

    def release(self, *names: str) -> None:
        """Gives some of the memory back.

        Args:
            names (`str`): Of the buffers; those that do not exist are passed over.
        """
        for name in names:
            self._buffers.pop(name, None)

    def clear(self) -> None:
        """Gives the memory of this thread back."""
        self._buffers.clear()


#: The buffers of the running thread.
workspace = Workspace()


class Borrowed:
    """Memory that will be written at the end and serves as buffers until then.

    Args:
        memory (`torch.Tensor`, *optional*): Contiguous; by default there is none to borrow.
    """

    def __init__(self, memory: torch.Tensor | None = None):
        self._rest = None if memory is None else memory.view(-1)

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory: of what is left here if that is enough, else of the [`workspace`].

        Args:
            name (`str`): Name of the buffer in the workspace.
            shape (`tuple[int, int]`): Shape.
            dtype (`torch.dtype`): Dtype; that of the borrowed memory, if there is any.
        """
        size = shape[0] * shape[1]
        if self._rest is None or self._rest.numel() < size:
            return workspace.take(name, shape, dtype)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken.view(shape)

    def rows_left(self, width: int, most: int) -> int:
        """How many rows of a width still fit, at most `most`; that many, too, if nothing was borrowed."""
        return most if self._rest is None else min(most, self._rest.numel() // width)
