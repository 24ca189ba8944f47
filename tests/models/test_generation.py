"""Caches, masks, attention and expert implementations, and generation: the same numbers by every way."""

import pytest
import torch
from common.model_battery import TYPES, make_inputs, make_model, position_ids, seeded
from transformers import DynamicCache, StaticCache


every_type = pytest.mark.parametrize("model_type", TYPES)
# A router whose state passes through all layers, with dense ones between, besides each type's own router.
ROUTERS = {
    "own": {},
    "stateful": {"router_type": "gating_residual", "num_hidden_layers": 3, "moe_layers": [0, 2]},
    "biased": {"router_type": "sigmoid_topk", "router_config": {"selection_bias": True, "num_expert_groups": 2}},
}
every_router = pytest.mark.parametrize("fields", ROUTERS.values(), ids=ROUTERS)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def real(logits, inputs):
    """Logits at the positions that are not padding."""
    return logits[inputs["attention_mask"].bool()]


def step_by_step(model, inputs, chunks, cache=None):
    """Logits of a sequence fed in chunks through a cache."""
    mask, positions = inputs["attention_mask"], position_ids(inputs["attention_mask"])
    start, logits = 0, []
    for length in chunks:
        end = start + length
        outputs = model(
            input_ids=inputs["input_ids"][:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = outputs.past_key_values, end
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


# -- caches ----------------------------------------------------------------------------------------------------------
@every_type
@every_router
@pytest.mark.parametrize("padding", [None, "left"])
@torch.no_grad()
def test_decoding_step_by_step_equals_the_full_forward(model_type, fields, padding):
    model = make_model(model_type, **fields)
    inputs = make_inputs(padding=padding)
    full = model(**inputs, position_ids=position_ids(inputs["attention_mask"])).logits
    for chunks in ([1] * 8, [5, 1, 2]):
        torch.testing.assert_close(real(step_by_step(model, inputs, chunks), inputs), real(full, inputs), **CLOSE)


@pytest.mark.parametrize("model_type", ["moe_qwen2", "moe_qwen3"])
@torch.no_grad()
def test_sliding_windows_decode_step_by_step_too(model_type):
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    model, inputs = make_model(model_type, num_hidden_layers=3, moe_layers=[0, 2], **window), make_inputs()
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    full = model(**inputs).logits
    assert not torch.allclose(full, make_model(model_type, num_hidden_layers=3, moe_layers=[0, 2])(**inputs).logits)
    torch.testing.assert_close(step_by_step(model, inputs, [3, 1, 1, 3]), full, **CLOSE)


@every_type
@torch.no_grad()
def test_static_and_dynamic_caches_give_the_same_logits(model_type):
    model, inputs = make_model(model_type), make_inputs()
    caches = (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12))
    dynamic, static = (step_by_step(model, inputs, [4, 1, 3], cache) for cache in caches)
    torch.testing.assert_close(static, dynamic, **CLOSE)


@every_type
@every_router
@torch.no_grad()
def test_left_padding_does_not_change_a_sequence(model_type, fields):
    model = make_model(model_type, **fields)
    inputs = make_inputs(padding="left")
    padded = model(**inputs, position_ids=position_ids(inputs["attention_mask"]), output_router_logits=True)
    alone = model(input_ids=inputs["input_ids"][:1, 3:], output_router_logits=True)
    torch.testing.assert_close(padded.logits[:1, 3:], alone.logits, **CLOSE)
    for index, expected in zip(padded.router_indices, alone.router_indices, strict=True):
        assert torch.equal(index[3:8], expected)  # the first row without its padding
        assert (index[:3] == model.config.num_routing_targets).all()  # padding visits nobody


# -- implementations -------------------------------------------------------------------------------------------------
@every_type
@pytest.mark.parametrize("padding", [None, "left", "right"])
@torch.no_grad()
def test_sdpa_equals_eager_attention(model_type, padding):
    inputs = make_inputs(padding=padding)
    eager = make_model(model_type, implementation={"attn_implementation": "eager"})
    sdpa = make_model(model_type, implementation={"attn_implementation": "sdpa"})
    assert eager.config._attn_implementation == "eager" and sdpa.config._attn_implementation == "sdpa"
    expected = real(eager(**inputs).logits, inputs)
    torch.testing.assert_close(real(sdpa(**inputs).logits, inputs), expected, **CLOSE)
    sdpa.set_attn_implementation("eager")
    assert sdpa.config._attn_implementation == "eager"
    torch.testing.assert_close(real(sdpa(**inputs).logits, inputs), expected, rtol=0, atol=0)


@every_type
@pytest.mark.parametrize("padding", [None, "left"])
def test_expert_implementations_agree_in_values_and_gradients(model_type, padding):
    inputs = make_inputs(padding=padding)
    results = {}
    model = make_model(model_type, num_shared_experts=1).train()
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert all(block.experts.config._experts_implementation == implementation for _, block in model.moe_blocks())
        model.zero_grad()
        outputs = model(**inputs, labels=inputs["input_ids"])
        outputs.loss.backward()
        results[implementation] = outputs.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}
    logits, gradients = results.pop("eager")
    for others, other_gradients in results.values():
        torch.testing.assert_close(real(others, inputs), real(logits, inputs), **CLOSE)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-5)


@every_type
def test_expert_implementation_can_be_chosen_when_a_model_is_made_and_loaded(model_type, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(model_type, implementation={"experts_implementation": "batched_mm"})
    assert model.config._experts_implementation == "batched_mm"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert loaded.config._experts_implementation == "eager"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "grouped_mm"
    with pytest.raises(ValueError, match="nonsense"):
        model.set_experts_implementation("nonsense")


@pytest.mark.parametrize("model_type", ["moe_llama", "moe_gpt2"])
def test_registered_expert_functions_run_our_banks(model_type):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    calls = []

    def counting(self, hidden_states, top_k_index, top_k_weights):
        calls.append(type(self).__name__)
        return torch.zeros_like(hidden_states)

    ALL_EXPERTS_FUNCTIONS.register("test_counting", counting)
    try:
        model = make_model(model_type, implementation={"experts_implementation": "test_counting"})
        model(**make_inputs())
        assert len(calls) == 2
    finally:
        del type(ALL_EXPERTS_FUNCTIONS)._global_mapping["test_counting"]


# -- generate --------------------------------------------------------------------------------------------------------
def by_hand(model, inputs, steps):
    """Greedy decoding without any cache."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(steps):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


def generate(model, inputs, **kwargs):
    model.generation_config.eos_token_id = None  # so that rows do not end at different places
    with seeded():
        return model.generate(**inputs, max_new_tokens=6, **kwargs)


@every_type
@every_router
@pytest.mark.parametrize("padding", [None, "left"])
@torch.no_grad()
def test_greedy_generation_equals_decoding_by_hand(model_type, fields, padding):
    model, inputs = make_model(model_type, **fields), make_inputs(padding=padding)
    assert torch.equal(generate(model, inputs, do_sample=False), by_hand(model, inputs, 6))


@every_type
def test_a_padded_batch_generates_what_its_rows_generate_alone(model_type):
    model, inputs = make_model(model_type), make_inputs(padding="left")
    batch = generate(model, inputs, do_sample=False)
    alone = generate(model, {key: value[:1, 3:] for key, value in inputs.items()}, do_sample=False)
    assert torch.equal(batch[:1, 3:], alone)


@every_type
@pytest.mark.parametrize(
    "kwargs",
    [{"do_sample": True, "top_k": 8}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"use_cache": False}],
    ids=["sampling", "beams", "beam_sampling", "no_cache"],
)
def test_every_way_of_generating_works(model_type, kwargs):
    model, inputs = make_model(model_type), make_inputs(padding="left")
    ids = generate(model, inputs, **kwargs)
    assert ids.shape == (2, 14) and torch.equal(ids[:, :8], inputs["input_ids"])
    assert torch.equal(ids, generate(model, inputs, **kwargs))


@every_type
def test_a_static_cache_generates_what_a_dynamic_one_does(model_type):
    model, inputs = make_model(model_type), make_inputs(padding="left")
    dynamic = generate(model, inputs, do_sample=False)
    static = generate(model, inputs, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, dynamic)


@every_type
@every_router
def test_beams_reorder_the_cache_correctly(model_type, fields):
    model, inputs = make_model(model_type, **fields), make_inputs(padding="left")
    cached, uncached = (generate(model, inputs, num_beams=4, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


@every_type
def test_generation_starts_from_embeddings_too(model_type):
    model, inputs = make_model(model_type), make_inputs(padding="left")
    expected = generate(model, inputs, do_sample=False)[:, 8:]
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(generate(model, given, do_sample=False), expected)


@every_type
def test_generation_can_record_the_routing(model_type):
    model, inputs = make_model(model_type), make_inputs()
    model.config.output_router_logits = True
    ids = generate(model, inputs, do_sample=False)
    model.config.output_router_logits = False
    assert torch.equal(ids, generate(model, inputs, do_sample=False))


@every_type
def test_prompt_lookup_decoding_equals_greedy(model_type):
    model = make_model(model_type)
    inputs = {key: value[:1] for key, value in make_inputs().items()}
    expected = generate(model, inputs, do_sample=False)
    assert torch.equal(generate(model, inputs, do_sample=False, prompt_lookup_num_tokens=2), expected)
