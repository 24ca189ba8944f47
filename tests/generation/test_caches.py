"""Self-contrast decoding over every kind of cache, and what the second one costs."""

import pytest
import torch
from common.decoding import prompt, slow_self_contrast, spread_model
from transformers import DynamicCache, StaticCache

from hf_moe.generation import SelfContrast, SelfContrastOutput


MODES = ("separate", "fused")


@pytest.fixture(scope="module")
def model():
    return spread_model("mixtral")


@pytest.fixture(scope="module")
def expected(model):
    return slow_self_contrast(model, prompt(2), 8, beta=0.9)


def generate(model, mode, ids=None, **kwargs):
    ids = prompt(2) if ids is None else ids
    decoder = SelfContrast(beta=0.9, mode=mode)
    return model.generate(ids, max_new_tokens=8, do_sample=False, custom_generate=decoder, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_cache_says_the_same(model, expected, mode, cache):
    assert torch.equal(generate(model, mode, cache_implementation=cache), expected)


@pytest.mark.parametrize("mode", MODES)
def test_no_cache_says_the_same(model, expected, mode):
    assert torch.equal(generate(model, mode, use_cache=False), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_read_in_chunks_says_the_same(model, expected, mode):
    assert torch.equal(generate(model, mode, prefill_chunk_size=3), expected)


@pytest.mark.parametrize("mode", MODES)
def test_prompt_embeddings_say_the_same(model, expected, mode):
    embeds = model.get_input_embeddings()(prompt(2))
    decoder = SelfContrast(beta=0.9, mode=mode)
    output = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, custom_generate=decoder)
    assert torch.equal(output, expected[:, 7:])


@pytest.mark.parametrize("mode", ["separate", "auto"])
@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=32)])
def test_a_cache_of_the_users_is_filled_by_the_strong_stream(model, expected, mode, make):
    cache = make(config=model.config)
    assert torch.equal(generate(model, mode, past_key_values=cache), expected)
    assert int(cache.get_seq_length()) == 14


@pytest.mark.parametrize("mode", ["separate", "auto"])
def test_a_filled_cache_of_the_users_is_continued(model, expected, mode):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(2)[:, :4], past_key_values=cache, use_cache=True)
    keys = cache.layers[0].keys.clone()
    assert torch.equal(generate(model, mode, past_key_values=cache), expected)
    assert torch.equal(cache.layers[0].keys[:, :, :4], keys)


def test_a_filled_cache_without_its_tokens_is_refused(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(2)[:, :4], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="`past_key_values` holds 4 tokens, and the prompt has 3 of 7"):
        generate(
            model, "auto", prompt(2)[:, 4:], past_key_values=cache, attention_mask=torch.ones(2, 7, dtype=torch.long)
        )
    assert cache.get_seq_length() == 4


def test_fused_mode_refuses_a_cache_it_cannot_double(model):
    with pytest.raises(ValueError, match=r'`mode="fused"` is not possible.* the DynamicCache .* a row per sequence'):
        generate(model, "fused", past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match=r'`mode="fused"` is not possible.*StaticLayer cannot be cut'):
        generate(model, "fused", cache_implementation="static", return_dict_in_generate=True)
    minimax = spread_model("minimax")
    with pytest.raises(ValueError, match=r"MiniMaxForCausalLM makes its cache itself"):
        generate(minimax, "fused")


def test_where_it_cannot_be_doubled_auto_is_separate(model, expected):
    output = generate(model, "auto", cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    minimax = spread_model("minimax")
    assert torch.equal(generate(minimax, "auto"), slow_self_contrast(minimax, prompt(2), 8, beta=0.9))


@pytest.mark.parametrize("mode", MODES)
def test_the_output_reports_the_memory_of_the_second_cache_and_holds_the_strong_one(model, expected, mode):
    output = generate(model, mode, return_dict_in_generate=True)
    assert isinstance(output, SelfContrastOutput)
    keys = output.past_key_values.layers[0].keys
    assert keys.shape[:3] == (2, 4, 14)
    assert output.weak_cache_bytes == 4 * 2 * keys.numel() * 4  # layers, keys and values, bytes of float32
    with torch.no_grad():
        exact = model(expected[:, :-1], use_cache=True).past_key_values.layers[0].keys
    torch.testing.assert_close(keys, exact)


@pytest.mark.parametrize("mode", MODES)
def test_without_cache_there_is_none_to_report(model, mode):
    output = generate(model, mode, use_cache=False, return_dict_in_generate=True)
    assert output.weak_cache_bytes is None and output.past_key_values is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["jamba", "lfm2_moe"])
def test_models_with_recurrent_states_keep_two_of_them(family, mode):
    model = spread_model(family)
    assert torch.equal(generate(model, mode), slow_self_contrast(model, prompt(2), 8, beta=0.9))
