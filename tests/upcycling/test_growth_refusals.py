"""What growth refuses, before anything is computed, and the fix it names."""

import pytest
from common.growth_toys import small_model

from hf_moe import MoeLlamaConfig, MoeLlamaForCausalLM, grow_model


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"hidden_size": 16}, ValueError, "`hidden_size` must be at least the 32 of the model, got 16: growth only"),
        ({"intermediate_size": 47}, ValueError, "`intermediate_size` must be at least the 48"),
        ({"num_hidden_layers": 1}, ValueError, "`num_hidden_layers` must be at least the 2"),
        ({"num_attention_heads": 3}, ValueError, "`num_attention_heads` must be at least the 4"),
        ({"num_attention_heads": 7}, ValueError, r"a multiple of the 2 key-value heads.*got 7. Use 6 or 8"),
        ({"num_attention_heads": 6}, ValueError, r"LlamaConfig refuses these sizes: The hidden size \(32\) is not a"),
        ({"num_key_value_heads": 3}, ValueError, r"a multiple of the 3 key-value heads"),
        ({"num_key_value_heads": 0}, ValueError, r"Fewer can be: \[1, 2\]"),
        ({"hidden_size": 64.0}, TypeError, "`hidden_size` must be a whole number, got 64.0"),
        ({"hidden_size": True}, TypeError, "`hidden_size` must be a whole number"),
        ({}, ValueError, "nothing to grow: pass at least one of `hidden_size`"),
        ({"hidden_size": 32}, ValueError, "nothing to grow: the model has these sizes"),
        ({"hidden_size": 64, "width": "wide"}, ValueError, r"`width` must be one of .*got 'wide'"),
        ({"hidden_size": 64, "depth": "deep"}, ValueError, r"`depth` must be one of .*got 'deep'"),
        ({"hidden_size": 64, "order": "none"}, ValueError, r"`order` must be one of .*got 'none'"),
        ({"hidden_size": 64, "method": "lemon"}, ValueError, r"`method` must be None or one of .*got 'lemon'"),
        ({"hidden_size": 64, "noise_std": -1.0}, ValueError, "`noise_std` must be a number of at least 0, got -1.0"),
        ({"hidden_size": 64, "seed": -1}, ValueError, "`seed` must be a whole number of at least 0, got -1"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(sizes, error, message):
    with pytest.raises(error, match=message):
        grow_model(small_model("llama"), **sizes)


def test_too_few_heads_for_more_groups_are_refused():
    model = small_model("llama", hidden_size=72, num_attention_heads=8)
    with pytest.raises(ValueError, match=r"leaves 3 query heads to a group that has 4 now. Use at least 12 heads"):
        grow_model(model, num_attention_heads=9, num_key_value_heads=3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_attention_heads": 8}, "Use `hidden_size=64` with `num_attention_heads=8`"),
        ({"hidden_size": 60}, "Use `hidden_size=64` with `num_attention_heads=8`"),
        ({"hidden_size": 64, "num_key_value_heads": 2}, "has as many as query heads; leave it out"),
    ],
)
def test_families_with_a_derived_head_size_grow_heads_and_width_together(sizes, message):
    with pytest.raises(ValueError, match=message):
        grow_model(small_model("gpt2"), **sizes)


def test_models_of_other_families_are_refused_by_name():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    moe = MoeLlamaForCausalLM(
        MoeLlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    with pytest.raises(ValueError, match=r"MoeLlamaForCausalLM cannot be grown: .*'moe_llama'. Known are arcee"):
        grow_model(moe, hidden_size=32)


def test_a_variant_outside_of_the_table_is_refused_by_the_name_of_the_weight():
    model = small_model("phi", qk_layernorm=True)
    with pytest.raises(ValueError, match=r"`model\.layers\.0\.self_attn.q_layernorm\.weight` is not in the growth"):
        grow_model(model, hidden_size=64)
