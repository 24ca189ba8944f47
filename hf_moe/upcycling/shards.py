"""Reading and writing safetensors checkpoints tensor by tensor."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


__all__ = ["ShardReader", "ShardWriter"]


class ShardReader:
    """The tensors of a checkpoint folder, read one at a time.

    Args:
        folder (`Path`): With `model.safetensors`, or shards and their index.

    Raises:
        ValueError: no safetensors, or a file that cannot be read or is missing (the message names it).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, safe_open] = {}
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            self.weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (folder / SAFE_WEIGHTS_NAME).is_file():
            self.weight_map = dict.fromkeys(self._open(SAFE_WEIGHTS_NAME).keys(), SAFE_WEIGHTS_NAME)
        else:
            raise ValueError(
                f"{str(folder)!r} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}; load the model and "
                "save it once with `save_pretrained`."
            )

    def _open(self, name: str) -> safe_open:
        if name not in self._files:
            try:
                self._files[name] = self._stack.enter_context(safe_open(self.folder / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{str(self.folder / name)!r} cannot be read ({error}): it is missing, truncated or damaged; "
                    "download it again."
                ) from error
        return self._files[name]

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def keys(self) -> list[str]:
        """Names of all tensors, file by file, so that reading in this order opens each file once."""
        return sorted(self.weight_map, key=lambda key: (self.weight_map[key], key))

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor.

        Raises:
            ValueError: it is not in the file the index names.
        """
        name = self.weight_map[key]
        try:
            return self._open(name).get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{str(self.folder / name)!r} has no readable {key!r} ({error}).") from error


class ShardWriter:
    """Writes tensors into shards as they come; `close` names the shards and writes the index.

    Args:
        folder (`Path`): Where to; exists.
        max_shard_bytes (`int`): A shard is written once it holds this much.
    """

    def __init__(self, folder: Path, max_shard_bytes: int):
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.num_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Takes one tensor; it is on disk once the shard it falls into is full."""
        self._pending[key] = tensor
        size = tensor.numel() * tensor.element_size()
        self.num_bytes += size
        self._pending_bytes += size
        if self._pending_bytes >= self.max_shard_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            path = self.folder / f"shard-{len(self._shards):05d}.safetensors"
            # A file holds each tensor once: views of one storage (copies that stayed one tensor) become their own.
            owned = {key: _owned(tensor) for key, tensor in _without_sharing(self._pending)}
            save_file(owned, path, metadata={"format": "pt"})
            self._shards.append((path, list(self._pending)))
            self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Writes what is left, and the index where there are several shards."""
        self._flush()
        if len(self._shards) == 1:
            os.replace(self._shards[0][0], self.folder / SAFE_WEIGHTS_NAME)
            return
        weight_map = {}
        for number, (path, keys) in enumerate(self._shards, start=1):
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            os.replace(path, self.folder / name)
            weight_map |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _without_sharing(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[int] = set()
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        yield key, tensor.clone() if storage in seen else tensor
        seen.add(storage)


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return (
        tensor.contiguous()
        if whole and tensor.is_contiguous()
        else tensor.clone(memory_format=torch.contiguous_format)
    )
