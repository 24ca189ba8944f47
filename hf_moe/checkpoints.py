"""Checkpoints read and written a tensor at a time, so that memory holds no more than what is being worked on."""

import json
import os
import pickle
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .files import check_new_folder, new_folder
from .weights.folder import INDEX, check_safetensors, first_line


__all__ = ["CheckpointReader", "CheckpointWriter"]

BIN_INDEX = "pytorch_model.bin.index.json"


class CheckpointReader:
    """The tensors of a model folder, each read when it is asked for.

    Reads safetensors files where there are any, else `pytorch_model*.bin` (memory-mapped, tensors only: nothing
    pickled in them is executed).

    Args:
        folder (`str` or `os.PathLike`): A folder with the weights of a model.

    Raises:
        ValueError: No folder, no weights in it, or a file is missing, truncated or corrupt.

    Example:

    ```python
    >>> reader = CheckpointReader("path/to/model")
    >>> reader["model.norm.weight"].shape
    torch.Size([1536])
    ```
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"`{self.folder}` is not a folder. Give the folder of a model.")
        self._tensors = {}
        self._shapes = {}
        for name in check_safetensors(self.folder):
            file = safe_open(self.folder / name, framework="pt")
            self._tensors.update((key, lambda key=key, file=file: file.get_tensor(key)) for key in file.keys())
            self._shapes.update(
                (key, lambda key=key, file=file: file.get_slice(key).get_shape()) for key in file.keys()
            )
        if not self._tensors:
            for name in self._bin_files():
                tensors = _load_bin(self.folder / name)
                self._tensors.update((key, lambda tensor=tensor: tensor) for key, tensor in tensors.items())
        if not self._tensors:
            raise ValueError(
                f"`{self.folder}` holds no weights: neither `*.safetensors` nor `pytorch_model*.bin`. Download them."
            )

    def keys(self) -> set[str]:
        """Names of the tensors."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read for it where the file says."""
        return tuple(self._shapes[name]()) if name in self._shapes else tuple(self[name].shape)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise ValueError(f"`{self.folder}` lacks the tensor `{name}`. Download or copy its weights again.")
        return self._tensors[name]()

    def _bin_files(self) -> list[str]:
        names = {path.name for path in self.folder.glob("pytorch_model*.bin")}
        index = self.folder / BIN_INDEX
        if index.is_file():
            try:
                listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"`{index}` is not a weight index. Download or copy it again.") from error
            for name in sorted(listed - names):
                raise ValueError(
                    f"`{self.folder / name}` is missing although `{BIN_INDEX}` lists it. Download or copy it again."
                )
            names = listed
        return sorted(names)


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"`{path}` ({path.stat().st_size} bytes) cannot be read: {first_line(error)}. Download or copy it again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"`{path}` holds something else than named tensors. Give a file with a state dict.")
    return tensors


class CheckpointWriter:
    """A new model folder of safetensors shards that appears when the block ends, or not at all.

    Everything is written to a hidden folder beside `folder`, which is renamed at the end and removed on an exception
    or Ctrl-C. Other files of the model go to `writer.partial`.

    Args:
        folder (`str` or `os.PathLike`): The folder to make. It may exist, if it is empty.
        max_shard_bytes (`int`, defaults to 2 GB): A shard is written when the next tensor would exceed this.

    Raises:
        ValueError: `folder` exists and is not an empty folder, or cannot be made, or `max_shard_bytes` is below 1.

    Example:

    ```python
    >>> with CheckpointWriter("out") as writer:
    ...     config.save_pretrained(writer.partial)
    ...     for name in reader.keys():
    ...         writer.add(name, reader[name])
    ```
    """

    def __init__(self, folder: str | os.PathLike, max_shard_bytes: int = 2 * 10**9):
        self.folder = Path(folder)
        if max_shard_bytes < 1:
            raise ValueError(f"`max_shard_bytes` must be at least 1, got {max_shard_bytes}.")
        check_new_folder(self.folder)
        self.max_shard_bytes = max_shard_bytes
        self._shard: dict[str, torch.Tensor] = {}
        self._shard_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def __enter__(self) -> "CheckpointWriter":
        self._place = new_folder(self.folder)
        self.partial = self._place.__enter__()
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds one tensor. It is kept until its shard is written, so it must not change afterwards.

        Raises:
            ValueError: a tensor of this name was added before.
        """
        if name in self._shard or any(name in shard for shard in self._shards):
            raise ValueError(f"`{name}` was added to `{self.folder}` twice.")
        if self._shard and self._shard_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._shard_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                self._name_shards()
        except BaseException as late:
            self._place.__exit__(type(late), late, late.__traceback__)
            raise
        self._place.__exit__(kind, error, traceback)

    def _flush(self) -> None:
        if self._shard:
            self._shards.append(list(self._shard))
            save_file(self._shard, self.partial / f"{len(self._shards)}.safetensors", metadata={"format": "pt"})
            self._shard, self._shard_bytes = {}, 0

    def _name_shards(self) -> None:
        # The names say how many shards there are, which is known only now.
        count = len(self._shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        else:
            weight_map = {key: name for keys, name in zip(self._shards, names, strict=True) for key in keys}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for i, name in enumerate(names, start=1):
            os.replace(self.partial / f"{i}.safetensors", self.partial / name)
