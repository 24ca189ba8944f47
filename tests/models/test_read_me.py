"""Read-ME's model: one router for all layers, with its own place in the cache."""

import copy

import pytest
import torch
from common.model_battery import make_inputs, position_ids, seeded
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache
from transformers.utils.output_capturing import maybe_install_capturing_hooks

import hf_moe
from hf_moe import ReadMeConfig, ReadMeForCausalLM


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 3,
    "expert_sizes": [16, 0, 8],
    "shared_sizes": [8, 24, 0],
    "router_hidden_size": 16,
    "initializer_range": 0.2,
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def make_model(seed=0, implementation=None, **changes):
    with seeded(seed):
        return ReadMeForCausalLM._from_config(ReadMeConfig(**{**SIZES, **changes}), **(implementation or {})).eval()


def generate(model, inputs, **options):
    model.generation_config.eos_token_id = None  # so that rows do not end at different places
    with seeded():
        return model.generate(**inputs, max_new_tokens=8, **options)


def train_step(model, inputs):
    model.zero_grad()
    outputs = model(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- sizes -----------------------------------------------------------------------------------------------------------
def test_the_default_sizes_are_those_of_the_paper():
    with torch.device("meta"):
        model = ReadMeForCausalLM(ReadMeConfig())
    router = sum(p.numel() for p in model.model.router.parameters())
    assert router == 32000 * 512 + 4 * (512**2 + 512) + 2 * (512**2 + 512) + 512 * 7 + 7 + 3 * 512 == 17_965_063
    stored = sum(p.numel() for p in model.parameters()) - router
    experts = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    assert round(stored / 1e9, 2) == 17.56
    assert round((stored - experts * 6 / 7) / 1e9, 2) == 4.57  # one expert of seven


def test_each_layer_has_the_sizes_of_its_entry():
    layers = make_model().model.layers
    assert layers[0].mlp.experts.gate_up_proj.shape == (3, 32, 32) and layers[0].mlp.experts.down_proj.shape[-1] == 16
    assert layers[0].mlp.shared.down_proj.weight.shape == (32, 8)
    assert layers[1].mlp.experts is None and layers[1].mlp.gate is None
    assert layers[2].mlp.shared is None and layers[2].mlp.experts.intermediate_dim == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "`num_experts` must be at least 1"),
        ({"num_experts_per_tok": 2}, "`num_experts_per_tok` must be 1, got 2"),
        ({"mlp_bias": True}, "`mlp_bias=True` is not supported"),
        ({"expert_sizes": [16, 8]}, "`expert_sizes` must have one number from 0 on for each of the 3 layers"),
        ({"shared_sizes": [0, -1, 0]}, "`shared_sizes` must have one number from 0 on"),
        ({"expert_sizes": 0, "shared_sizes": 0}, r"of layer 0 must be between 1 and `intermediate_size` \(48\)"),
        ({"expert_sizes": 48, "shared_sizes": 8}, "got 48 [+] 8"),
        ({"router_layers": 0}, "`router_layers` must be at least 1"),
        (
            {"router_hidden_size": 20},
            r"`router_hidden_size` \(20\) must be a multiple of twice",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ReadMeConfig(**{**SIZES, **fields})


# -- routing ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_layer_adds_the_chosen_expert_to_the_shared_channels():
    model, inputs = make_model(), make_inputs()
    seen = {}
    block = model.model.layers[0].mlp
    block.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    logits = model(**inputs, output_router_logits=True).router_logits
    assert logits.shape == (2, 8, 3) and logits.dtype == torch.float32
    x, chosen = seen["x"].reshape(-1, 32), logits.reshape(-1, 3).argmax(-1)
    assert len(chosen.unique()) > 1
    gate, up = block.experts.gate_up_proj[chosen].chunk(2, dim=1)
    state = torch.nn.functional.silu(torch.einsum("tid,td->ti", gate, x)) * torch.einsum("tid,td->ti", up, x)
    expected = block.shared(x) + torch.einsum("tdi,ti->td", block.experts.down_proj[chosen], state)
    torch.testing.assert_close(seen["y"].reshape(-1, 32), expected, **CLOSE)


@torch.no_grad()
def test_the_router_runs_alone_and_sees_no_later_token():
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs, output_router_logits=True)
    alone = model(**inputs, routing_only=True)
    assert torch.equal(alone.router_logits, expected.router_logits) and alone.logits is None
    changed = inputs["input_ids"].clone()
    changed[:, 5] = (changed[:, 5] + 1) % 64
    other = model.model.router(changed, inputs["attention_mask"])
    torch.testing.assert_close(other[:, :5], alone.router_logits[:, :5], **CLOSE)
    assert not torch.allclose(other[:, 5:], alone.router_logits[:, 5:], **CLOSE)


@torch.no_grad()
def test_a_padded_row_is_routed_and_computed_as_alone():
    model, inputs = make_model(), make_inputs(padding="left")
    padded = model(**inputs, position_ids=position_ids(inputs["attention_mask"]), output_router_logits=True)
    alone = model(input_ids=inputs["input_ids"][:1, 3:], output_router_logits=True)
    torch.testing.assert_close(padded.router_logits[:1, 3:], alone.router_logits, **CLOSE)
    torch.testing.assert_close(padded.logits[:1, 3:], alone.logits, **CLOSE)
    without = model(input_ids=inputs["input_ids"], output_router_logits=True)
    assert not torch.allclose(without.router_logits[:1, 3:], alone.router_logits, **CLOSE)  # the mask does reach it


def test_embeddings_cannot_be_routed():
    model = make_model()
    embeddings = model.get_input_embeddings()(make_inputs()["input_ids"])
    with pytest.raises(ValueError, match="routes by token ids, so it takes `input_ids` and no `inputs_embeds`"):
        model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="`routing_only=True` needs `input_ids`"):
        model(inputs_embeds=embeddings, routing_only=True)
    with pytest.raises(ValueError, match="called without routing"):
        model.model.layers[0].mlp(embeddings)


def test_the_language_model_loss_gives_the_router_no_gradient():
    model, inputs = make_model().train(), make_inputs()
    _, gradients = train_step(model, inputs)
    without = {name for name, _ in model.named_parameters()} - set(gradients)
    assert without == {name for name, _ in model.named_parameters() if ".router." in name}
    model(**inputs, routing_only=True).router_logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.model.router.parameters() if p.dim() > 1)


# -- caches and generation -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("padding", [None, "left"])
@torch.no_grad()
def test_decoding_step_by_step_equals_the_full_forward(padding):
    model, inputs = make_model(router_layers=2), make_inputs(padding=padding)
    mask, positions = inputs["attention_mask"], position_ids(inputs["attention_mask"])
    full = model(**inputs, position_ids=positions, output_router_logits=True)
    config = model.config
    caches = [None, DynamicCache(), DynamicCache(config=config), StaticCache(config=config, max_cache_len=12)]
    for cache in caches:
        start, steps = 0, []
        for length in (4, 1, 3):
            end = start + length
            steps.append(
                model(
                    input_ids=inputs["input_ids"][:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                    output_router_logits=True,
                )
            )
            cache, start = steps[-1].past_key_values, end
        assert len(cache.layers) == 5 and cache.get_seq_length(3) == 8
        for name in ("logits", "router_logits"):
            got = torch.cat([step[name] for step in steps], dim=1)
            torch.testing.assert_close(got[mask.bool()], full[name][mask.bool()], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 8, "num_return_sequences": 2},
        {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    ],
    ids=["greedy", "beams", "several_beams", "several_samples", "static"],
)
def test_generation_with_a_cache_equals_generation_without(options):
    model, inputs = make_model(), make_inputs(padding="left")
    expected = {k: v for k, v in options.items() if k not in ("cache_implementation", "disable_compile")}
    assert torch.equal(generate(model, inputs, **options), generate(model, inputs, use_cache=False, **expected))


@pytest.mark.parametrize("assistant", [True, False], ids=["assistant", "prompt_lookup"])
def test_rejected_drafts_are_taken_out_of_the_router_too(assistant):
    model, inputs = make_model(), make_inputs(batch=1)
    draft = {"assistant_model": make_model(seed=1)} if assistant else {"prompt_lookup_num_tokens": 3}
    plain = generate(model, inputs, do_sample=False)
    assert torch.equal(generate(model, inputs, do_sample=False, **draft), plain)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_a_static_cache_and_eager_attention(options):
    model, inputs = make_model(implementation={"attn_implementation": "eager"}), make_inputs(padding="left")
    static = {"cache_implementation": "static", "disable_compile": True} if "do_sample" in options else {}
    assert torch.equal(generate(model, inputs, **options, **static), generate(make_model(), inputs, **options))


@torch.no_grad()
def test_a_quantized_cache_keeps_the_router_exact():
    model, inputs = make_model(), make_inputs()
    cache = QuantizedCache("fp8", config=model.config)
    full = model(**inputs, output_router_logits=True)
    ids = inputs["input_ids"]
    first = model(ids[:, :5], past_key_values=cache, output_router_logits=True)
    second = model(ids[:, 5:], past_key_values=first.past_key_values, output_router_logits=True)
    got = torch.cat([first.router_logits, second.router_logits], dim=1)
    torch.testing.assert_close(got, full.router_logits, **CLOSE)


def test_a_padded_batch_generates_what_its_rows_generate_alone():
    model, inputs = make_model(), make_inputs(padding="left")
    batch = generate(model, inputs, do_sample=False)
    alone = generate(model, {key: value[:1, 3:] for key, value in inputs.items()}, do_sample=False)
    assert torch.equal(batch[:1, 3:], alone)


@torch.no_grad()
def test_a_cache_that_another_model_filled_is_refused():
    model, inputs = make_model(), make_inputs()
    cache = DynamicCache(config=model.config)
    for layer in range(3):
        cache.update(torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8), layer)
    with pytest.raises(ValueError, match="holds 4 tokens of the decoder but 0 of the router"):
        model(**inputs, past_key_values=cache)


@torch.no_grad()
def test_new_tokens_get_rows_in_the_router_too():
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs, output_router_logits=True)
    model.resize_token_embeddings(72)
    router = model.model.router.embed_tokens
    assert router.num_embeddings == model.get_input_embeddings().num_embeddings == model.config.vocab_size == 72
    got = model(**inputs, output_router_logits=True)
    torch.testing.assert_close(got.router_logits, expected.router_logits)
    torch.testing.assert_close(got.logits[..., :64], expected.logits, **CLOSE)
    assert router.weight.requires_grad and model(torch.tensor([[70, 71]])).logits.isfinite().all()


# -- views -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_views_record_the_one_decision_in_every_layer_that_has_experts():
    model, inputs = make_model(), make_inputs(padding="left")
    with hf_moe.record_routing(model) as recorder:
        logits = model(**inputs, output_router_logits=True).router_logits
    assert [layer.view.name for layer in recorder.layers] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    mask = inputs["attention_mask"].reshape(-1, 1).bool()
    for layer in recorder.layers:
        expected = logits.reshape(-1, 3).argmax(-1, keepdim=True).masked_fill(~mask, 3)  # padding visits nobody
        assert torch.equal(layer.top_k_index[0], expected)
        assert torch.equal(layer.top_k_weights[0], mask.float())


@torch.no_grad()
def test_an_override_sends_tokens_elsewhere():
    model, inputs = make_model(), make_inputs()
    logits = model(**inputs, output_router_logits=True).router_logits
    with hf_moe.routing_override(model, ranks=[1]), hf_moe.record_routing(model) as recorder:
        model(**inputs)
    second = logits.reshape(-1, 3).topk(2, dim=-1).indices[:, 1:]
    assert torch.equal(recorder.layers[0].top_k_index[0], second)
    assert (recorder.layers[0].top_k_weights[0] == 1).all()


def test_reports_and_cards_are_written(tiny_tokenizer):
    model = make_model(vocab_size=384)
    report = hf_moe.routing_report(model, tiny_tokenizer, ["The river runs past the old mill."] * 2)
    assert "model.layers.0.mlp" in str(report.to_dict()) or report.layers
    assert "read_me" in str(hf_moe.create_model_card(model))


# -- training, compiling, saving -------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    model, inputs = make_model().train(), make_inputs(padding="left")
    plain, expected = train_step(model, {**inputs})
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.config.use_cache = False
    checkpointed, gradients = train_step(model, inputs)
    assert torch.equal(checkpointed.loss, plain.loss) and set(gradients) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # inside transformers
def test_a_compiled_step_has_the_same_loss_and_gradients():
    torch._dynamo.reset()
    model, inputs = make_model().train(), make_inputs(padding="right")
    plain, expected = train_step(model, {**inputs, "use_cache": False})
    maybe_install_capturing_hooks(model.base_model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.zero_grad()
    outputs = compiled(**inputs, labels=inputs["input_ids"], use_cache=False)
    torch.testing.assert_close(outputs.loss, plain.loss)
    outputs.loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@torch.no_grad()
def test_experts_implementations_agree(implementation):
    inputs = make_inputs(padding="left")
    real = inputs["attention_mask"].bool()
    expected = make_model(implementation={"experts_implementation": "eager"})(**inputs).logits[real]
    got = make_model(implementation={"experts_implementation": implementation})(**inputs).logits[real]
    torch.testing.assert_close(got, expected, **CLOSE)


def test_grouped_products_are_refused_where_sizes_do_not_suit_them():
    assert make_model(expert_sizes=[16, 0, 12]).config._experts_implementation == "eager"
    with pytest.raises(ValueError, match="`expert_sizes` to be multiples of 8"):
        make_model(expert_sizes=[16, 0, 12], implementation={"experts_implementation": "grouped_mm"})


@torch.no_grad()
def test_half_precision_keeps_the_router_in_float32(tmp_path):
    model, inputs = make_model(), make_inputs(padding="left")
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in half.model.router.parameters()} == {torch.float32}
    real = inputs["attention_mask"].bool()
    got, expected = (m(**inputs, output_router_logits=True) for m in (half, model))
    torch.testing.assert_close(got.router_logits[real], expected.router_logits[real], **CLOSE)
    torch.testing.assert_close(got.logits[real].float(), expected.logits[real], rtol=0.1, atol=0.15)
    assert torch.equal(generate(half, inputs, num_beams=2)[:, :8], inputs["input_ids"])


def test_fields_that_are_changed_while_loading_are_checked(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`num_experts_per_tok` must be 1, got 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=2)


@torch.no_grad()
def test_a_saved_model_comes_back_through_the_auto_classes(tmp_path):
    model, inputs = make_model(), make_inputs(padding="left")
    model.model.layers[0].mlp.channel_masks[0, :24] = True
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ReadMeConfig and config.expert_sizes == [16, 0, 8] and config.shared_sizes == [8, 24, 0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ReadMeForCausalLM
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    base = AutoModel.from_pretrained(tmp_path)
    states = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(base(**inputs).last_hidden_state, states, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
def test_a_pushed_model_loads_elsewhere_without_importing_the_package(hub, run_python, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
import hf_moe
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
model.push_to_hub("me/read-me")
"""
    environment = hub.environment(tmp_path / "home")
    result = run_python(code, env=environment)
    assert result.returncode == 0, result.stderr
    code = """
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained("me/read-me", trust_remote_code=True)).__name__)
"""
    result = run_python(code, env=hub.environment(tmp_path / "another"))
    assert result.stdout.splitlines()[-1:] == ["ReadMeForCausalLM"], result.stderr


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_lora_on_attention_trains_and_leaves_the_router_alone(targets):
    from peft import LoraConfig, get_peft_model

    model, inputs = make_model(), make_inputs()
    options = {"exclude_modules": r".*\.router\..*"} if targets == "all-linear" else {}
    with seeded():  # of the adapter's weights
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **options)).train()
    assert not any("lora" in name and ".router." in name for name, _ in tuned.named_parameters())
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(6):
        loss = tuned(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len(hf_moe.moe_layers(tuned)) == 2
