"""Recorded trajectories as a dataset: one item per trajectory and step."""

import os
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import Dataset

from .conditions import SCALE
from .trajectories import read_index


__all__ = ["CONDITIONAL", "TARGET", "AgdDataset"]

TARGET = "agd_target"
CONDITIONAL = "agd_conditional"


class AgdDataset(Dataset):
    """Items of [`record_trajectories`]: the arguments of the student's call, and what it should return.

    An item is a dictionary of tensors: the denoiser's arguments by name (`"a.b"` for key `b` of the dictionary `a`),
    `"agd_scale"` and `"agd_target"`. Files are memory-mapped: an item reads its own bytes only.

    Args:
        folder (`str` or `os.PathLike`): The folder. It may still be growing; what it holds now counts.
        in_memory (`bool`, defaults to `False`): Read everything at once, for what is small: items come faster.

    Raises:
        ValueError: It holds no trajectories.

    Example:
        ```python
        dataset = AgdDataset("trajectories")
        dataset[0]["agd_target"].shape
        ```
    """

    def __init__(self, folder: str | os.PathLike, in_memory: bool = False):
        index = read_index(folder)
        if not index["shards"]:
            raise ValueError(f"`{folder}` holds no complete shard yet. Call `record_trajectories` again to go on.")
        self.folder = Path(folder)
        self.steps: int = index["steps"]
        self.scale_range: tuple[float, float] = tuple(index["settings"]["scale_range"])
        self.has_conditional: bool = index["settings"]["store_conditional"]
        self._files = [shard["file"] for shard in index["shards"]]
        self._starts = [0]
        for shard in index["shards"]:
            self._starts.append(self._starts[-1] + shard["trajectories"])
        self._open: dict[int, Any] = {}
        self._loaded = [load_file(self.folder / file) for file in self._files] if in_memory else None

    def __len__(self) -> int:
        return self._starts[-1] * self.steps

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= item < len(self):
            raise IndexError(item)
        trajectory, step = divmod(item % len(self), self.steps)
        shard = bisect_right(self._starts, trajectory) - 1
        row = trajectory - self._starts[shard]
        tensors = self._shard(shard)
        found = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "inputs":
                found[name] = tensor[row : row + 1, step : step + 1][0, 0]
            elif kind == "conditions":
                found[name] = tensor[row : row + 1][0]
            elif kind == "scales":
                found[SCALE] = tensor[row : row + 1][0]
            elif kind in ("target", "conditional"):
                value = tensor[row : row + 1, step : step + 1][0, 0]
                found[TARGET if kind == "target" else CONDITIONAL] = value
        return found

    def _shard(self, number: int) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded[number]
        if number not in self._open:
            file = safe_open(self.folder / self._files[number], framework="pt")
            self._open[number] = {key: file.get_slice(key) for key in file.keys()}
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # files are opened anew in a worker process
