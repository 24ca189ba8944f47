"""Real weights: SmolLM2-135M-Instruct, converted once and kept in the user's cache."""

import copy
import os
from pathlib import Path

import pytest


# Marks that transformers' own tests carry; see test_transformers_battery.py.
INHERITED_MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_training_test",
    "torch_compile_test",
)


def pytest_configure(config):
    for mark in INHERITED_MARKS:
        config.addinivalue_line("markers", f"{mark}: a mark of transformers' own tests")


@pytest.fixture(scope="session")
def smollm2_session():
    """Model and tokenizer, loaded once; the tests' own `HF_HOME` is empty, so the user's cache is named here."""
    from hf_moe.weights import load_dense

    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hf_moe"
    try:
        return load_dense("auto", cache_dir=cache)
    except ValueError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_session, tmp_path_factory):
    """A folder with the model and its tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("smollm2")
    for part in smollm2_session:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def smollm2(smollm2_session):
    """The dense model in float32 and its tokenizer; the weights are shared between tests, so do not change them."""
    model, tokenizer = smollm2_session
    return model.eval(), copy.deepcopy(tokenizer)
