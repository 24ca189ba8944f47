"""Writing a file or a folder so that it is there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


__all__ = ["check_new_folder", "current_umask", "new_folder", "write_text"]


def check_new_folder(folder: str | os.PathLike) -> Path:
    """Refuses a destination that would overwrite something.

    Raises:
        ValueError: `folder` exists and is not an empty folder.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"`{folder}` exists already. Choose another folder, or remove this one.")
    return folder


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its place when the block ends, and goes on an exception or Ctrl-C.

    Args:
        folder (`str` or `os.PathLike`): The folder to make. It may exist, if it is empty.

    Yields:
        `Path`: Where to write.

    Raises:
        ValueError: `folder` exists and is not an empty folder, or cannot be made.

    Example:
        ```python
        with new_folder("out") as partial:
            model.save_pretrained(partial)
        ```
    """
    folder = check_new_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"`{folder}` cannot be written: {error.strerror}. Choose a folder you may write to."
        ) from error
    try:
        yield partial
        partial.chmod(0o777 & ~current_umask())  # temporary folders are made for their owner alone
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def current_umask() -> int:
    """The permissions new files do not get."""
    umask = os.umask(0)  # readable only by setting it
    os.umask(umask)
    return umask


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write UTF-8 text under a temporary name and rename it into place.

    Args:
        path (`str` or `os.PathLike`): The file; missing parent folders are created.
        text (`str`): Its new content.

    Returns:
        `Path`: The path written.

    Raises:
        OSError: The folder cannot be created or written. The old file, if any, is untouched.

    Example:
        ```python
        write_text("report/README.md", "# Report")
        ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~current_umask())  # temporary files are made for their owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
