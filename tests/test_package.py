"""The distribution: what is built holds what the tree holds, imports, and stays cheap to import."""

import importlib
import inspect
import json
import pkgutil
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hf_moe


ROOT = Path(__file__).parents[1]
# where the folders of the checkout are in the installed package
FOLDERS = {"hf_moe": "hf_moe", "trainers": "hf_moe/trainers", "model_cards": "hf_moe/model_cards"}
SOURCES = [*FOLDERS, "tests", "examples", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]
SOURCES += ["CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt"]

needs_checkout = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the checkout")


def module_names():
    return [
        info.name for info in pkgutil.walk_packages(hf_moe.__path__, "hf_moe.") if not info.name.endswith("__main__")
    ] + [f"hf_moe.{folder}.{info.name}" for folder in ("trainers", "model_cards")
         for info in pkgutil.walk_packages([str(ROOT / folder)])]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """`(sdist, wheel made from it)`, built from a copy: building writes into the folder it builds."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "checkout"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".pytest_cache")
    for name in SOURCES:
        source = ROOT / name
        shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy / name)

    def run(cwd, code):
        result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()[-1]

    # the build backend itself, as pip would call it, in the environment at hand: no download
    sdist = folder / run(copy, f"import setuptools.build_meta as b; print(b.build_sdist({str(folder)!r}))")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    wheel = folder / run(source, f"import setuptools.build_meta as b; print(b.build_wheel({str(folder)!r}))")
    return sdist, wheel


@needs_checkout
def test_the_wheel_made_from_the_sdist_holds_exactly_the_files_of_the_tree(built):
    expected = {
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(built[1]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(metadata).decode()
    assert found == expected
    assert "\nLicense-Expression: Apache-2.0\n" in text and "\nRequires-Python: >=3.11\n" in text


@needs_checkout
def test_the_sdist_holds_tests_examples_and_constraints(built):
    with tarfile.open(built[0]) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"LICENSE", "README.md", "constraints.txt", "tests/conftest.py", "setup.py"} <= names
    assert "examples/benchmarks/import_time.py" in names


@needs_checkout
def test_the_wheel_imports_from_elsewhere_without_the_checkout(built, run_python, tmp_path):
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path / "site")
    code = """
import hf_moe, hf_moe.trainers, hf_moe.model_cards as cards
print(hf_moe.__file__)
print(cards.__file__)
print(cards.type_card("moe_llama").title, len(cards.list_papers()) > 5)
"""
    result = run_python(code, env={"PYTHONPATH": str(tmp_path / "site")})
    first, second, third = result.stdout.splitlines()
    assert first.startswith(str(tmp_path / "site")) and second.startswith(str(tmp_path / "site")), result.stderr
    assert third == "MoE on Llama True"


def test_the_installed_metadata_say_the_same_version():
    assert version("hf-moe") == hf_moe.__version__


def test_every_module_imports_and_no_second_copy_under_a_bare_name(run_python):
    # with the checkout's root on the path, `import trainers` would work and load every class a second time
    code = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
for name in {module_names()!r}:
    importlib.import_module(name)
print([name for name in sys.modules if name.split(".")[0] in ("trainers", "model_cards")])
"""
    result = run_python(code)
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stderr


def test_every_public_name_exists_and_is_documented():
    undocumented = []
    for name in module_names():
        module = importlib.import_module(name)
        assert hasattr(module, "__all__"), f"{name} has no `__all__`"
        for public in module.__all__:
            value = getattr(module, public)
            if (inspect.isclass(value) or inspect.isfunction(value)) and not inspect.getdoc(value):
                undocumented.append(f"{name}.{public}")
    assert undocumented == []


def test_every_name_of_the_top_level_resolves():
    for name in hf_moe.__all__:
        value = getattr(hf_moe, name)
        ours = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "hf_moe")
        assert ours.split(".")[0] == "hf_moe", f"{name} comes from {ours}"
    assert set(hf_moe.__all__) <= set(dir(hf_moe))


def test_importing_hf_moe_imports_nothing_heavy(run_python):
    code = """
import sys, json, transformers, torch
before = set(sys.modules)
import hf_moe
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    result = run_python(code)
    added = json.loads(result.stdout)
    heavy = (
        "transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.models.llama",
        "transformers.generation.utils", "transformers.trainer", "torch._dynamo", "torch._inductor",
        "peft", "trl", "datasets", "evaluate", "accelerate", "matplotlib", "gguf", "pandas", "pyarrow", "sklearn",
        "scipy", "jinja2", "hf_moe.layers", "hf_moe.routing", "hf_moe.experts", "hf_moe.models.llama",
        "hf_moe.upcycling", "hf_moe.trainers", "hf_moe.model_cards", "hf_moe.reporting", "hf_moe.metrics",
    )  # fmt: skip
    assert [name for name in added if name.startswith(tuple(f"{h}." for h in heavy)) or name in heavy] == []
    assert "hf_moe.models" in added


@needs_checkout
def test_constraints_pin_a_version_inside_every_declared_range():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {name.replace("_", "-"): number for name, number in (line.split("==") for line in lines)}
    assert pins["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["demo"], *extras["test"], *extras["dev"]]
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        if name != "hf-moe":
            assert pins[name] in requirement.specifier, requirement
