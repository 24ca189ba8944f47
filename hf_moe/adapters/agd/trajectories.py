"""Guided trajectories on disk: safetensors shards and a JSON index, so that an interruption loses one shard."""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from hf_moe.files import write_text

from .pipelines import PipelineSampler
from .sampling import GuidedStep


__all__ = ["INDEX", "read_index", "record_trajectories"]

logger = logging.get_logger(__name__)

INDEX = "index.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def record_trajectories(
    sampler: Any,
    conditions: Sequence[Any] | Mapping[str, torch.Tensor],
    folder: str | os.PathLike,
    *,
    scale_range: tuple[float, float],
    seed: int = 0,
    shard_size: int = 16,
    step_stride: int = 1,
    dtype: str = "float16",
    max_bytes: int | None = None,
    store_conditional: bool = False,
) -> Path:
    """Samples with classifier-free guidance and stores what the student has to reproduce (Sec. 3 of the paper).

    Each trajectory has a guidance scale of its own, drawn from `scale_range`. Called again with the same arguments it
    goes on where it stopped; each shard has its own random numbers, so the result is the same.

    Args:
        sampler (`DiffusionPipeline`, [`PipelineSampler`], [`DenoisingLoop`] or `Callable`): Called as
            `sampler(conditions, scales, generator, observe)` for the trajectories of one shard; calls `observe` with a
            [`GuidedStep`] at each step.
        conditions (`Sequence` or `Mapping[str, torch.Tensor]`): One per trajectory, as the sampler takes them.
        folder (`str` or `os.PathLike`): Where to write.
        scale_range (`tuple[float, float]`): Lowest and highest guidance scale.
        seed (`int`, defaults to 0): Of the scales and the noise.
        shard_size (`int`, defaults to 16): Trajectories per file; so many are held in memory.
        step_stride (`int`, defaults to 1): Store every so many steps only.
        dtype (`str`, defaults to `"float16"`): Of latents and predictions: or `"bfloat16"`, `"float32"`.
        max_bytes (`int`, *optional*): What all trajectories together may take on disk.
        store_conditional (`bool`, defaults to `False`): Store the conditional prediction too, which the trainer's
            `"weighted_l2"` loss needs.

    Returns:
        `Path`: The folder, for [`AgdDataset`].

    Raises:
        ValueError: An argument is wrong, the folder holds trajectories made with others, or they would take more than
            `max_bytes` or the disk's free space. What has been recorded stays.

    Example:
        ```python
        record_trajectories(pipe, ["a red boat", "two owls"], "trajectories", scale_range=(1, 12), step_stride=4)
        ```
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {list(DTYPES)}, got {dtype!r}.")
    if len(scale_range) != 2 or not scale_range[0] <= scale_range[1]:
        raise ValueError(f"`scale_range` must be two scales, the lower one first, got {scale_range!r}.")
    for name, value in (("shard_size", shard_size), ("step_stride", step_stride)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
    if not callable(sampler) or (hasattr(sampler, "scheduler") and hasattr(sampler, "register_modules")):
        sampler = PipelineSampler(sampler)
    folder = Path(folder)
    total = len(next(iter(conditions.values()))) if isinstance(conditions, Mapping) else len(conditions)
    if total == 0:
        raise ValueError("`conditions` is empty; needed is one per trajectory.")
    settings = {
        "trajectories": total,
        "conditions": _fingerprint(conditions),
        "scale_range": [float(scale) for scale in scale_range],
        "seed": seed,
        "shard_size": shard_size,
        "step_stride": step_stride,
        "dtype": dtype,
        "store_conditional": store_conditional,
    }
    index = _open_index(folder, settings)
    done = {shard["file"] for shard in index["shards"] if (folder / shard["file"]).exists()}
    index["shards"] = [shard for shard in index["shards"] if shard["file"] in done]
    for number, start in enumerate(range(0, total, shard_size)):
        file = f"shard-{number:05d}.safetensors"
        if file in done:
            continue
        stop = min(start + shard_size, total)
        tensors = _record_shard(sampler, _rows(conditions, start, stop), stop - start, number, settings)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        _check_space(folder, index, size, stop - start, total, max_bytes)
        _write(tensors, folder / file)
        index["shards"].append({"file": file, "trajectories": stop - start, "bytes": size})
        index["shards"].sort(key=lambda shard: shard["file"])
        index["steps"] = tensors["target"].shape[1]
        write_text(folder / INDEX, json.dumps(index, indent=1))
        logger.info(f"{file}: {stop} of {total} trajectories")
    return folder


def read_index(folder: str | os.PathLike) -> dict[str, Any]:
    """The index of a folder of trajectories.

    Raises:
        ValueError: There is none.
    """
    path = Path(folder) / INDEX
    if not path.exists():
        raise ValueError(
            f"`{folder}` holds no trajectories: {INDEX} is missing. Make them with `record_trajectories`."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _open_index(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not (folder / INDEX).exists():
        return {"format": "hf-moe agd trajectories", "version": 1, "settings": settings, "shards": []}
    index = read_index(folder)
    differing = [name for name, value in settings.items() if index["settings"].get(name) != value]
    if differing:
        name = differing[0]
        raise ValueError(
            f"`{folder}` holds trajectories recorded with `{name}` {index['settings'].get(name)!r}, now it is "
            f"{settings[name]!r}. Choose another folder, or the same arguments to go on."
        )
    return index


def _record_shard(
    sampler: Callable, conditions: Any, rows: int, number: int, settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(settings["seed"] * 1_000_003 + number)
    low, high = settings["scale_range"]
    scales = low + (high - low) * torch.rand(rows, generator=generator)
    dtype = DTYPES[settings["dtype"]]
    kept: list[GuidedStep] = []
    seen = 0

    def observe(step: GuidedStep) -> None:
        nonlocal seen
        if seen % settings["step_stride"] == 0:
            kept.append(step)
        seen += 1

    sampler(conditions, scales, generator, observe)
    if not kept:
        raise ValueError("The sampler never called `observe`: there is no step to store.")
    tensors = {"scales": scales, "target": _stack([step.target for step in kept], dtype)}
    if settings["store_conditional"]:
        channels = tensors["target"].shape[2]
        tensors["conditional"] = _stack([step.conditional[:, :channels] for step in kept], dtype)
    latents, *others = kept[0].inputs
    tensors[f"inputs.{latents}"] = _stack([step.inputs[latents] for step in kept], dtype)
    for name in others:  # the timestep: float16 has no 1001
        tensors[f"inputs.{name}"] = torch.stack([step.inputs[name].cpu() for step in kept], dim=1).contiguous()
    for name, value in kept[0].conditions.items():
        tensors[f"conditions.{name}"] = _cast(value, dtype)
    for name, tensor in tensors.items():
        if len(tensor) != rows or (tensor.is_floating_point() and not torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name!r} has {len(tensor)} rows (needed {rows}) or values that {settings['dtype']} cannot hold. "
                "Mend the sampler, or record with `dtype='bfloat16'`."
            )
    return tensors


def _stack(steps: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([_cast(step, dtype) for step in steps], dim=1).contiguous()  # (rows, steps, ...)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def _check_space(folder: Path, index: dict[str, Any], size: int, rows: int, total: int, max_bytes: int | None) -> None:
    stored = sum(shard["bytes"] for shard in index["shards"])
    needed = max(size * total // rows, stored + size)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    what = None
    if max_bytes is not None and needed > max_bytes:
        what = f"`max_bytes` is {max_bytes}"
    elif size > free:
        what = f"the disk has {free} bytes left"
    if what is not None:
        raise ValueError(
            f"{total} trajectories need about {needed} bytes ({size // rows} each), but {what}. The "
            f"{sum(shard['trajectories'] for shard in index['shards'])} recorded so far stay in `{folder}`. Make room "
            "and call again to go on, or record into another folder fewer of them or with a larger `step_stride`."
        )


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _rows(conditions: Any, start: int, stop: int) -> Any:
    if isinstance(conditions, Mapping):
        return {name: value[start:stop] for name, value in conditions.items()}
    return conditions[start:stop]


def _fingerprint(conditions: Any) -> int:
    if isinstance(conditions, Mapping):
        parts = [repr((name, value.tolist())) for name, value in sorted(conditions.items())]
    else:
        parts = [repr(condition) for condition in conditions]
    return zlib.crc32("\n".join(parts).encode())
