"""Supported versions: declared once, checked at import, told clearly."""

import re
import tomllib
from pathlib import Path

import pytest

from hf_moe.versions import SUPPORTED_VERSIONS, _release, check_versions


ROOT = Path(__file__).parents[1]


def test_what_is_installed_is_supported():
    check_versions()


def test_pyproject_declares_the_same_ranges():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = dict(re.match(r"([\w-]+)(.*)", line).groups() for line in dependencies)
    for name, (lowest, ceiling) in SUPPORTED_VERSIONS.items():
        assert declared[name] == f">={lowest}" + (f",<{ceiling}" if ceiling else "")


@pytest.mark.parametrize("limits", [("9999", None), ("0", "0.1")])
def test_a_version_outside_the_range_names_package_version_range_and_command(limits):
    from importlib.metadata import version

    with pytest.raises(ImportError) as error:
        check_versions({"torch": limits})
    wanted = f">={limits[0]}" + (f",<{limits[1]}" if limits[1] else "")
    assert "torch" in str(error.value) and version("torch") in str(error.value)
    assert f"`pip install 'torch{wanted}'`" in str(error.value)


def test_a_missing_package_is_named_with_the_command():
    with pytest.raises(ImportError, match=r"no-such-package >=1, which is not installed. Run `pip install"):
        check_versions({"no-such-package": ("1", None)})


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [("5.22.9", "5.23"), ("2.9.1", "2.13.0+cpu"), ("5.9", "5.23.0.dev0"), ("1.16rc1", "1.17"), ("5.99", "6")],
)
def test_versions_are_compared_as_numbers(smaller, larger):
    assert _release(smaller) < _release(larger)


def test_a_development_build_of_the_lowest_version_counts_as_that_version():
    assert _release("5.23.0.dev0") == _release("5.23")
