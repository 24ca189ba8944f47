"""Fetches the tests of transformers and PEFT themselves, which their wheels leave out, for the inherited batteries.

Run it once from anywhere, with the interpreter that has both installed:

    python tests/fetch_library_tests.py

The source distribution of the *installed* version is downloaded through pip and its `tests/` folder is unpacked to
`.cache/<library>-tests/<library>_tests/`, which git ignores. Tests put `.cache/<library>-tests` on `sys.path` and skip
when it is absent. Without network nothing changes and the exit code is 1.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath


__all__ = ["fetch"]

CACHE = Path(__file__).resolve().parents[1] / ".cache"

# A source distribution holds the top-level test files only; these stand in for what they import from sub-folders.
STAND_INS = {
    "peft": {"__init__.py": ""},
    "transformers": {
        "__init__.py": "",
        "exporters/__init__.py": "",
        "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
        "generation/__init__.py": "",
        "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
        "utils/__init__.py": "",
        "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    },
}


def fetch(library: str, cache: Path = CACHE, force: bool = False) -> bool:
    """Download and unpack the tests of the installed version of a library.

    Args:
        library (`str`): `"transformers"` or `"peft"`.
        cache (`Path`, *optional*): Folder in which `<library>-tests` receives the package `<library>_tests` and the
            file `VERSION`.
        force (`bool`, *optional*, defaults to `False`): Download even if this version is there already.

    Returns:
        `bool`: Whether the tests of the installed version are in place.

    Example:
        ```python
        fetch("peft", Path("somewhere"))
        ```
    """
    wanted = version(library)
    target = cache / f"{library}-tests"
    marker = target / "VERSION"
    if not force and marker.is_file() and marker.read_text().strip() == wanted:
        print(f"The tests of {library} {wanted} are in {target} already.")
        return True
    with tempfile.TemporaryDirectory() as folder:
        # pip prepares a source distribution's metadata even for a download; without build isolation that takes
        # seconds and installs nothing
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        command += ["--no-build-isolation", "--dest", folder, f"{library}=={wanted}"]
        answer = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(folder).glob(f"{library}-*.tar.gz"))
        if answer.returncode or not archives:
            reason = (answer.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            print(f"Could not download {library} {wanted}, so the inherited tests will be skipped: {reason}")
            return False
        count = _unpack(archives[0], target / f"{library}_tests")
    for name, text in STAND_INS[library].items():
        file = target / f"{library}_tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    marker.write_text(f"{wanted}\n")  # last: its presence means the folder is complete
    print(f"Unpacked {count} test files of {library} {wanted} to {target}.")
    return True


def _unpack(archive: Path, target: Path) -> int:
    target.mkdir(parents=True, exist_ok=True)
    count = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            # <name>-<version>/tests/test_x.py and nothing deeper: names are rebuilt, never taken as paths
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                (target / parts[2]).write_bytes(tar.extractfile(member).read())
                count += 1
    return count


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="download even if this version is there already")
    force = parser.parse_args(arguments).force
    return 0 if all([fetch(library, force=force) for library in STAND_INS]) else 1


if __name__ == "__main__":
    sys.exit(main())
