"""README says what is there: commands, names, versions, folders."""

import base64
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hf_moe.cli import COMMANDS
from hf_moe.listing import list_everything
from hf_moe.versions import SUPPORTED_VERSIONS


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def row(start):
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {start}"))
    return set(re.findall(r"`([\w<>]+)`", line.split("|")[2]))


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        ("model types", "types"),
        ("routers", "routers"),
        ("experts", "experts"),
        ("upcycling recipes", "recipes"),
        ("router starts", "router-inits"),
        ("adapters", "adapters"),
        ("decoding", "decoding"),
        ("unlearning", "unlearning"),
        ("quantization", "quantization"),
        ("statistics", "statistics"),
    ],
)
def test_the_table_names_exactly_what_is_registered(start, kind):
    assert row(start) == {entry.name for entry in list_everything((kind,))[kind]}


def test_every_command_has_a_row():
    assert set(re.findall(r"^\| `hf-moe ([\w-]+)` \|", README, re.MULTILINE)) == set(COMMANDS)


def test_the_versions_are_those_declared_and_pinned():
    text = " ".join(README.split())
    for name, (lowest, ceiling) in SUPPORTED_VERSIONS.items():
        assert f"{name} >= {lowest}" + (f" and < {ceiling}" if ceiling else "") in text
    pins = (ROOT / "constraints.txt").read_text()
    for name, number in re.findall(r"(torch|transformers|peft|trl) (\d+\.\d+\.\d+)", text):
        assert f"\n{name}=={number}\n" in pins


def test_every_folder_and_link_exists():
    for path in re.findall(r"^\| `([\w/.]+)`", README, re.MULTILINE):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_the_ci_script_finds_the_command_and_the_extra_exists(name):
    command = re.search(rf"<!-- ci:{name} -->\n```bash\n(.*)\n```", README)[1]
    assert "\n" not in command and "-c constraints.txt" in command
    (extra,) = re.findall(r"-e '\.\[(\w+)\]'", command)
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    script = (ROOT / ".ci" / "run").read_text()
    assert f"readme_command {name}" in script


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_the_ci_script_is_valid_bash():
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0


def test_the_first_snippet_runs_against_a_hub_whose_smollm2_is_tiny(
    hub, run_python, tmp_path, tiny_llama, tiny_tokenizer_dir
):
    tiny_llama.save_pretrained(tmp_path / "dense")
    environment = hub.environment(tmp_path / "home")
    hub.create("HuggingFaceTB/SmolLM2-135M-Instruct")
    files = [*(tmp_path / "dense").iterdir(), *tiny_tokenizer_dir.iterdir()]
    changes = [{"path": file.name, "content": base64.b64encode(file.read_bytes())} for file in files]
    hub.commit("HuggingFaceTB/SmolLM2-135M-Instruct", [{"key": "file", "value": value} for value in changes])
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    result = run_python(snippet, env=environment)
    assert result.returncode == 0, result.stderr
    assert "the same function as the dense model" in result.stdout
    assert "model.safetensors" in hub.files("me/smollm2-moe")
