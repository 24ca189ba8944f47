"""A folder cache in which an entry is either complete and unchanged, or absent."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_moe.files import current_umask


__all__ = ["building", "default_cache_dir", "find_damage", "write_manifest"]

MANIFEST = "manifest.json"
PARTIAL = ".partial-"
# A build that was killed cannot clean up; what it left is removed by a later build, once nobody can be writing it.
ABANDONED_AFTER_SECONDS = 24 * 3600


def default_cache_dir() -> Path:
    """The folder beside the Hub's own cache in which converted weights are kept.

    Returns:
        `Path`: `hf_moe/` in the folder that huggingface_hub calls `HF_HOME` (it may not exist yet).

    Example:
        ```python
        >>> default_cache_dir().name
        'hf_moe'
        ```
    """
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_moe"


@contextmanager
def building(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends without an exception.

    Whatever ends the block early, Ctrl-C included, removes the temporary folder and leaves `target` as it was.

    Args:
        target (`Path`): Folder to make. Its parent is created.
        replace (`bool`, defaults to `False`): Take the place of an existing `target`.

    Yields:
        `Path`: The folder to write into.

    Raises:
        ValueError: If the folder cannot be created, or `target` exists and `replace` is false.
    """
    if target.exists() and not replace:
        raise ValueError(f"`{target}` exists already. Choose another folder, or remove this one.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}{PARTIAL}", dir=target.parent))
    except OSError as error:
        raise ValueError(
            f"Cannot write in `{target.parent}`: {error.strerror}. Choose a folder you may write to."
        ) from error
    try:
        yield partial
        partial.chmod(0o777 & ~current_umask())  # `mkdtemp` makes folders that only their owner can read
        if target.exists():
            old = partial.with_name(partial.name + ".old")
            os.replace(target, old)
            os.replace(partial, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders of builds that were killed long ago."""
    for leftover in folder.glob(f".*{PARTIAL}*"):
        try:
            if time.time() - leftover.stat().st_mtime > ABANDONED_AFTER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
        except FileNotFoundError:  # another process was quicker
            continue


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Record the size and SHA-256 of every file of `folder`, for [`find_damage`].

    Args:
        folder (`Path`): A finished cache entry.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """Compare a cache entry with its manifest.

    Args:
        folder (`Path`): A cache entry.

    Returns:
        `str` or `None`: What is wrong with the first damaged file, or `None` for an intact entry.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in entries.items():
            path = folder / name
            if not path.is_file():
                return f"`{name}` is missing"
            if path.stat().st_size != expected["size"]:
                return f"`{name}` has {path.stat().st_size} bytes instead of {expected['size']}"
            if digest(path) != expected["sha256"]:
                return f"the content of `{name}` has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"`{MANIFEST}` cannot be read ({type(error).__name__})"
    return None
