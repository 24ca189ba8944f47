"""What converters of released checkpoints have in common: read a config, check the tensors, write a model folder.

A converter says which tensors of the released layout make each tensor of a model here; the rest is the same for all.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_moe.checkpoints import CheckpointReader, CheckpointWriter
from hf_moe.hub import write_shim
from hf_moe.weights.hub import fetch_from_hub


__all__ = ["find_released", "read_released_config", "write_converted"]

OTHER_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.model")
NOT_WEIGHTS = ("rotary_emb.inv_freq",)


def find_released(source: str | os.PathLike) -> Path:
    """The folder of a released checkpoint, fetched from the Hub where `source` is no folder."""
    source = Path(source) if Path(source).expanduser().exists() else fetch_from_hub(os.fspath(source))
    return source.expanduser()


def read_released_config(source: Path) -> Any:
    """What `config.json` of a released checkpoint holds.

    Args:
        source (`Path`): The folder.

    Raises:
        ValueError: There is no such file, or it is damaged.
    """
    path = source / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"`{source}` has no `config.json`, so it is not a model folder. Give one that has."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` cannot be read. Download or copy it again.") from error


def write_converted(
    source: Path,
    destination: str | os.PathLike,
    config: Any,
    model_class: type,
    pieces: Callable[[str], Sequence[str | tuple[str, ...]]],
    *,
    buffers: Mapping[str, torch.Tensor],
    unused: Collection[str] = (),
    deciding_fields: Collection[str] = (),
    growing: Collection[str] = (),
    max_shard_bytes: int = 2 * 10**9,
) -> Path:
    """Writes a model folder a tensor at a time: memory holds one shard and one layer. The folder appears when it is
    complete, or not at all. Values and their dtypes are copied.

    Args:
        source (`Path`): Folder of the released checkpoint.
        destination (`str` or `os.PathLike`): The folder to make; it may exist if it is empty.
        config: Config of the model to write; its `dtype` and `architectures` are set.
        model_class (`type`): The model's class; its parameters are what is written.
        pieces (`Callable`): Parameter name -> released tensors that make it. Several are stacked; a tuple among them
            is one matrix, its parts one above the other.
        buffers (`Mapping[str, torch.Tensor]`): What the released layout lacks, by name; parameters too.
        unused (`Collection[str]`): Released tensors that are left out.
        deciding_fields (`Collection[str]`): Config fields that decide which tensors there are, for the error message.
        growing (`Collection[str]`): Parameters that may have fewer rows in the release, one for each token it knows;
            the others start as their mean.
        max_shard_bytes (`int`, defaults to 2 GB): Largest size of one weight file.

    Returns:
        `Path`: `destination`.

    Raises:
        ValueError: Tensors are missing, of another shape or too many, or the destination cannot be written.
    """
    with torch.device("meta"):
        model = model_class(config)
    # A tied head appears once.
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if name not in buffers}
    reader = CheckpointReader(source)
    made_of = {name: pieces(name) for name in shapes}
    unused = set(unused) | ({"lm_head.weight"} if config.tie_word_embeddings else set())
    _check_keys(reader, made_of, unused, deciding_fields)
    with CheckpointWriter(destination, max_shard_bytes) as writer:
        for name, shape in logging.tqdm(shapes.items(), desc="Converting", unit="tensor"):
            tensor = _assemble(reader, made_of[name], shape)
            if name in growing and tensor.shape[0] < shape[0]:
                mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
                tensor = torch.cat([tensor, mean.expand(shape[0] - tensor.shape[0], *tensor.shape[1:])])
            if tensor.shape != shape:
                raise ValueError(
                    f"`{source}`: `{made_of[name][0]}` makes a tensor of shape {tuple(tensor.shape)}, but "
                    f"`config.json` asks for {tuple(shape)}. They belong to different models: download both again."
                )
            if name.endswith("experts.down_proj"):
                config.dtype = tensor.dtype
            writer.add(name, tensor)
        for name, buffer in buffers.items():
            writer.add(name, buffer)
        config.architectures = [model_class.__name__]
        write_shim(writer.partial, config)
        config.save_pretrained(writer.partial)
        for pattern in OTHER_FILES:
            for path in source.glob(pattern):
                shutil.copyfile(path, writer.partial / path.name)
    return Path(destination)


def _assemble(reader: CheckpointReader, names: Sequence[str | tuple[str, ...]], shape: torch.Size) -> torch.Tensor:
    tensors = [reader[n] if isinstance(n, str) else torch.cat([reader[part] for part in n]) for n in names]
    if len(shape) == tensors[0].dim():
        return tensors[0]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise ValueError(f"The experts `{names[0]}` to `{names[-1]}` have different shapes. Download the files again.")
    return torch.stack(tensors)


def _check_keys(
    reader: CheckpointReader,
    made_of: Mapping[str, Sequence[str | tuple[str, ...]]],
    unused: set[str],
    deciding_fields: Collection[str],
) -> None:
    entries = [entry for names in made_of.values() for entry in names]
    wanted = {name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)}
    missing = sorted(wanted - reader.keys())
    if missing:
        raise ValueError(
            f"`{reader.folder}` lacks {len(missing)} tensors of the released layout, the first is `{missing[0]}`. "
            "The files are incomplete, or `config.json` belongs to another model: download them again."
        )
    extra = sorted(key for key in reader.keys() - wanted - unused if not key.endswith(NOT_WEIGHTS))
    if extra:
        fields = ", ".join(f"`{name}`" for name in deciding_fields)
        raise ValueError(
            f"`{reader.folder}` has {len(extra)} tensors the released layout does not have, first `{extra[0]}`. "
            f"Check that `config.json` belongs to these weights ({fields})."
        )
