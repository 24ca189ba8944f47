"""Writing a file so that it is either the old one or the new one, never half of it."""

import os
import tempfile
from pathlib import Path


__all__ = ["write_text"]


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
        umask = os.umask(0)  # readable only by setting it; a temporary file is made for its owner alone
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
