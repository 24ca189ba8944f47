"""Model types by name."""

import pytest
from transformers import AutoConfig

from hf_moe import list_models


def test_every_listed_type_is_one_that_transformers_knows():
    assert "moe_llama" in list_models()
    assert all(AutoConfig.for_model(name).model_type == name for name in list_models())


def test_a_pattern_selects():
    assert list_models("moe_qwen*") == ["moe_qwen2", "moe_qwen3"]
    assert list_models("moe_llama") == ["moe_llama"]


def test_a_pattern_without_match_names_the_nearest_type():
    with pytest.raises(ValueError, match=r"`pattern='moe_lama'` matches no model type.*Did you mean 'moe_llama'\?"):
        list_models("moe_lama")
