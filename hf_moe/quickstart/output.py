"""Results that appear in the output folder all together at the end, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


__all__ = ["RESULTS", "output_folder"]

#: What a run leaves in its output folder; the last one says that the others are complete.
RESULTS = ("model", "report", "results.json")


@contextmanager
def output_folder(output: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder inside `output`, whose [`RESULTS`] move to `output` when the block ends without exception.

    However the block ends, the temporary folder goes; folders made on the way go too unless there are results.

    Args:
        output (`str` or `PathLike`): The output folder; may exist.
        overwrite (`bool`, defaults to `False`): Replace the results of an earlier run.

    Yields:
        `Path`: The folder to write [`RESULTS`] into.

    Raises:
        ValueError: If the folder cannot be written, or holds results and `overwrite` is false.

    Example:
        ```python
        with output_folder("out") as folder:
            model.save_pretrained(folder / "model")
        ```
    """
    output = Path(output).expanduser()
    present = [name for name in RESULTS if (output / name).exists()]
    if present and not overwrite:
        raise ValueError(
            f"`--output {output}` already holds {', '.join(f'`{name}`' for name in present)}. "
            "Choose another folder, or add `--overwrite`."
        )
    missing = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=output))
    except OSError as error:
        raise ValueError(
            f"`--output {output}` cannot be written: {error.strerror}. Choose a folder you may write to."
        ) from error
    try:
        yield partial
        replaced = partial / "replaced"
        replaced.mkdir()
        for name in RESULTS:  # renames inside one folder: quick, and each of them all or nothing
            if (output / name).exists():
                os.replace(output / name, replaced / name)
        for name in RESULTS:
            if (partial / name).exists():
                os.replace(partial / name, output / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for path in missing:
            try:
                path.rmdir()
            except OSError:  # not empty: there are results
                break
