"""Identities of self-contrast decoding on tiny random models of many families."""

import copy

import pytest
import torch
from common.decoding import prompt, slow_self_contrast, spread_model
from common.tiny_families import tiny_model

from hf_moe.generation import SelfContrast


FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe",
    "jamba", "ernie4_5_moe", "moe_gpt2", "moe_llama", "moe_qwen3", "moe_plus_plus",
)  # fmt: skip
MODES = ("separate", "fused")


def generate(model, ids, decoder=None, steps=6, **kwargs):
    return model.generate(ids, max_new_tokens=steps, do_sample=False, custom_generate=decoder, **kwargs)


@pytest.fixture(scope="module")
def mixtral():
    return spread_model("mixtral")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_modes_are_the_slow_and_obvious_algorithm(family, mode):
    model, ids = spread_model(family), prompt()
    expected = slow_self_contrast(model, ids, 6, beta=0.9)
    assert torch.equal(generate(model, ids, SelfContrast(beta=0.9, mode=mode)), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_contrast_it_is_greedy_decoding(family, mode):
    model, ids = spread_model(family), prompt()
    greedy = generate(model, ids)
    assert torch.equal(generate(model, ids, SelfContrast(beta=0, alpha=1e-6, mode=mode)), greedy)
    assert torch.equal(generate(model, ids, SelfContrast(beta=3, alpha=1, mode=mode)), greedy)


@pytest.mark.parametrize("mode", MODES)
def test_a_weak_stream_that_routes_as_the_model_does_is_greedy_decoding(mixtral, mode):
    # float64: products of 2B rows and of B rows may differ by more than 2e-6 in float32, depending on the threads
    ids, model = prompt(3), copy.deepcopy(mixtral).double()
    model.set_experts_implementation("eager")  # grouped_mm takes no float64
    decoder = SelfContrast(beta=0.9, weak="top:2", mode=mode)
    output = generate(model, ids, decoder, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(output.sequences, generate(model, ids))
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(output.weak_logits), atol=2e-6, rtol=0)


def test_the_contrast_changes_what_is_said(mixtral):
    changed = [
        not torch.equal(generate(mixtral, prompt(seed=seed), SelfContrast()), generate(mixtral, prompt(seed=seed)))
        for seed in range(4)
    ]
    assert any(changed)


@pytest.mark.parametrize("weak", ["rank:1", "rank:2", "rank:8", "top:1", "top:4"])
@pytest.mark.parametrize("family", ["mixtral", "jamba", "deepseek_v3", "gpt_oss", "phimoe", "moe_plus_plus"])
def test_fused_is_separate(family, weak):
    model, ids = tiny_model(family), prompt(2)
    outputs = [
        generate(
            model, ids, SelfContrast(beta=0.9, weak=weak, mode=mode), steps=4, return_dict_in_generate=True,
            output_logits=True, output_scores=True, eos_token_id=None,
        )
        for mode in MODES
    ]  # fmt: skip
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for name in ("logits", "weak_logits", "scores"):
        separate, fused = (torch.stack(output[name]) for output in outputs)
        torch.testing.assert_close(fused, separate, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "moe_llama", "moe_gpt2", "jamba"])
def test_a_left_padded_row_is_the_prompt_alone(family, mode):
    model = spread_model(family)
    short, long = prompt(length=4, seed=1), prompt(length=9, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=-1), long])
    mask = (torch.arange(9) >= torch.tensor([[5], [0]])).long()
    decoder = SelfContrast(beta=0.9, mode=mode)
    together = generate(model, batch, decoder, attention_mask=mask)
    assert torch.equal(together[:1, 5:], generate(model, short, decoder))
    assert torch.equal(together[1:], generate(model, long, decoder))


@pytest.mark.parametrize("mode", MODES)
def test_random_experts_are_those_of_the_seed(mixtral, mode):
    ids = prompt(2)

    def weak_logits(**source):
        decoder = SelfContrast(weak="random:1", mode=mode, **source)
        output = generate(mixtral, ids, decoder, steps=2, return_dict_in_generate=True, output_logits=True)
        return output.weak_logits[0]

    assert torch.equal(weak_logits(seed=1), weak_logits(seed=1))
    assert not torch.equal(weak_logits(seed=1), weak_logits(seed=2))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(weak_logits(generator=generator), weak_logits(seed=1))
    assert not torch.equal(weak_logits(generator=generator), weak_logits(seed=1))


@pytest.mark.parametrize("mode", MODES)
def test_temperatures_divide_the_logits_before_the_contrast(mixtral, mode):
    decoder = SelfContrast(beta=0.7, strong_temperature=2.0, weak_temperature=0.5, mode=mode)
    output = generate(
        mixtral, prompt(), decoder, return_dict_in_generate=True, output_logits=True, output_scores=True, steps=2
    )
    strong, weak, scores = output.logits[0] / 2, output.weak_logits[0] / 0.5, output.scores[0]
    valid = scores.isfinite()
    torch.testing.assert_close(scores[valid], (1.7 * strong - 0.7 * weak)[valid])
    probabilities = strong.softmax(-1)
    assert torch.equal(valid, probabilities >= 0.1 * probabilities.max())


def test_the_same_object_serves_any_number_of_calls_and_models(mixtral):
    decoder, ids = SelfContrast(beta=0.9), prompt()
    first = generate(mixtral, ids, decoder)
    generate(spread_model("qwen3_moe"), prompt(3, 5), decoder)
    assert torch.equal(generate(mixtral, ids, decoder), first)


def test_the_recorded_router_logits_of_the_first_layer_are_the_strong_ones(mixtral):
    from hf_moe import record_routing

    with record_routing(mixtral) as recorder:
        generate(mixtral, prompt(), SelfContrast(mode="separate"), steps=1)
    strong, weak = recorder.layers[0].router_logits
    assert torch.equal(strong, weak)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "hf_moe"])
def test_every_experts_implementation_says_the_same(implementation):
    model, ids = spread_model("mixtral"), prompt(2)
    model.set_experts_implementation("eager")
    expected = generate(model, ids, SelfContrast(beta=0.9, mode="separate"))
    model.set_experts_implementation(implementation)
    for mode in MODES:
        assert torch.equal(generate(model, ids, SelfContrast(beta=0.9, mode=mode)), expected)


def test_bfloat16_decodes_with_scores_in_single_precision(mixtral):
    model = spread_model("mixtral").bfloat16()
    output = generate(model, prompt(), SelfContrast(), return_dict_in_generate=True, output_scores=True)
    assert output.scores[0].dtype == torch.float32 and output.sequences.shape == (1, 13)


def test_a_model_under_peft_decodes_with_its_adapter():
    from peft import LoraConfig, get_peft_model

    model, ids = spread_model("mixtral"), prompt()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    expected = slow_self_contrast(wrapped, ids, 6, beta=0.9)
    for mode in MODES:
        assert torch.equal(generate(wrapped, ids, SelfContrast(beta=0.9, mode=mode)), expected)


@pytest.mark.parametrize("mode", ["fused", pytest.param("separate", marks=pytest.mark.slow)])  # traces twice
def test_a_compiled_model_decodes_as_the_model_does(mode):
    model, ids = spread_model("mixtral", num_hidden_layers=2), prompt()
    expected = generate(model, ids, SelfContrast(beta=0.9, mode=mode), steps=3)
    model.compile(backend="eager")
    assert torch.equal(generate(model, ids, SelfContrast(beta=0.9, mode=mode), steps=3), expected)
    torch.compiler.reset()
