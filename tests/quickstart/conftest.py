"""A tiny dense model folder and the options that make a quickstart run in seconds."""

import pytest


@pytest.fixture
def tiny_dense_dir(tiny_llama, tiny_tokenizer, tmp_path):
    """Folder with a dense Llama of two layers and its tokenizer."""
    folder = tmp_path / "dense"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small(tiny_dense_dir, tmp_path):
    """Words after `hf-moe` for a run on the tiny model into `<tmp_path>/out`."""
    words = ["quickstart", "--model", str(tiny_dense_dir), "--output", str(tmp_path / "out"), "--domain", "reference"]
    return [*words, "--steps", "2", "--layers", "1", "--sequence-length", "32", "--held-out-tokens", "64"]
