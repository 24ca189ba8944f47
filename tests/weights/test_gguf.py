import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe.weights import convert_gguf


def test_conversion_keeps_weights_and_tokens(tiny_llama, tiny_tokenizer, write_tiny_gguf, tmp_path):
    write_tiny_gguf(tiny_llama, tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", name="me/tiny")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    text = "The river runs past the old mill.\n    return a + b"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == tiny_tokenizer(text).input_ids


def test_the_converted_config_is_an_ordinary_one(tiny_llama, write_tiny_gguf, tmp_path):
    write_tiny_gguf(tiny_llama, tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(model.config, "quantization_config")
    assert model.config.architectures == ["LlamaForCausalLM"]
    model.save_pretrained(tmp_path / "again")


def test_a_file_that_is_not_gguf_is_named(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "bad.gguf").write_bytes(b"no" * 100)
    with pytest.raises(ValueError, match=r"bad\.gguf` cannot be read as a GGUF model"):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "out")


def test_a_missing_reader_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf-moe\[demo\]'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
