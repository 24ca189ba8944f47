"""Writing the files of a report together."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


__all__ = ["check_writable", "replace_files"]


@contextmanager
def replace_files(directory: str | os.PathLike, names: Sequence[str]) -> Iterator[Path]:
    """A temporary folder whose files take their place when the block ends; on an exception an older report stays.

    Args:
        directory (`str` or `os.PathLike`): Created if missing. Files with other names stay.
        names (`Sequence[str]`): All that a report may consist of; those not written now are taken away.

    Yields:
        `Path`: Where to write.

    Raises:
        OSError: `directory` cannot be written.

    Example:
        ```python
        with replace_files("report", ["report.md", "load.png"]) as temporary:
            (temporary / "report.md").write_text(page)
        ```
    """
    directory = Path(directory)
    check_writable(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
        yield Path(temporary)
        directory.mkdir(exist_ok=True)
        for name in names:
            if Path(temporary, name).exists():
                os.replace(Path(temporary, name), directory / name)
            else:
                (directory / name).unlink(missing_ok=True)  # a plot of an older report does not belong to this one


def check_writable(directory: str | os.PathLike) -> None:
    """Finds out whether a report can be written, without writing.

    Args:
        directory (`str` or `os.PathLike`): Where the report should go; may not exist yet.

    Raises:
        OSError: it is a file, lies below a file, or may not be written.
    """
    directory = Path(directory)
    nearest = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"`output` {str(directory)!r} cannot be a folder: {str(nearest)!r} is a file. Choose another folder."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"`output` {str(directory)!r} cannot be written: no permission in {str(nearest)!r}. Choose another folder."
        )
