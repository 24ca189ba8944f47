"""The supported ranges of the libraries hf-moe plugs into, checked when it is imported."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


__all__ = ["SUPPORTED_VERSIONS", "check_versions"]

# distribution -> (lowest supported, first unsupported or None); pyproject.toml repeats these, a test compares
SUPPORTED_VERSIONS: dict[str, tuple[str, str | None]] = {
    "torch": ("2.9", None),
    "transformers": ("5.23", "6"),
    "peft": ("0.21", "1"),
    "trl": ("1.16", "2"),
}


def check_versions(supported: dict[str, tuple[str, str | None]] = SUPPORTED_VERSIONS) -> None:
    """Refuse versions hf-moe was not written for, before they fail somewhere less clear.

    Reads the installed packages' metadata; nothing is imported, so the check costs about a millisecond.

    Args:
        supported (`dict`, *optional*): Distribution name to lowest supported and first unsupported version.

    Raises:
        ImportError: A package is missing or outside its range; the message names the package, the version found, the
            range and the command that repairs it.

    Example:
        ```python
        check_versions({"torch": ("2.9", None)})
        ```
    """
    for name, (lowest, ceiling) in supported.items():
        wanted = f">={lowest}" + (f",<{ceiling}" if ceiling else "")
        repair = f"Run `pip install '{name}{wanted}'`."
        try:
            found = version(name)
        except PackageNotFoundError:
            raise ImportError(f"hf_moe needs {name} {wanted}, which is not installed. {repair}", name=name) from None
        if _release(found) < _release(lowest) or (ceiling and _release(found) >= _release(ceiling)):
            raise ImportError(f"hf_moe needs {name} {wanted}, but {name} {found} is installed. {repair}", name=name)


def _release(text: str) -> Version:
    # `2.13.0+cpu` and `5.23.0.dev0` count as 2.13 and 5.23: development builds of a supported minor are welcome
    return Version(Version(text).base_version)
