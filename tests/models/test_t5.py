"""`moe_t5`: both stacks route their own tokens, and what T5 does otherwise stays T5's."""

import re

import pytest
import torch
from common.model_battery import seeded
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from hf_moe import MoeT5Config, list_routers, upcycle
from hf_moe.layers import MoeBlock
from hf_moe.routing.balance import expert_frequency, load_balance_loss
from hf_moe.routing.steps import target_mask


FORMS = ("relu", "gated-gelu")
both_forms = pytest.mark.parametrize("form", FORMS)
SIZES = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def make_config(form="gated-gelu", **changes):
    sizes = {"num_experts": 4, "initializer_range": 0.3, "decoder_moe_layers": [0, 2]}
    return MoeT5Config(**{**SIZES, **sizes, "feed_forward_proj": form, **changes})


def make_model(form="gated-gelu", auto=AutoModelForSeq2SeqLM, implementation=None, **changes):
    with seeded():
        return auto.from_config(make_config(form, **changes), **(implementation or {})).eval()


def make_inputs(padding=0):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (2, 8), generator=g)
    mask, labels = torch.ones_like(ids), torch.randint(3, 64, (2, 6), generator=g)
    if padding:
        mask[0, -padding:], ids[0, -padding:], labels[1, -padding:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def dense_t5(form, cls=T5ForConditionalGeneration, **changes):
    with seeded():
        model = cls(T5Config(**{**SIZES, "feed_forward_proj": form, **changes}))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


# -- which layers ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("encoder", "decoder", "expected"),
    [
        ("all", None, ([0, 1], [0, 1, 2])),
        ("every:2", None, ([1], [1])),
        ([0], [0, 2], ([0], [0, 2])),
        ("none", "all", ([], [0, 1, 2])),
        ("second_half", "none", ([1], [])),
    ],
    ids=str,
)
def test_each_stack_has_the_moe_layers_of_the_config(encoder, decoder, expected):
    model = make_model(moe_layers=encoder, decoder_moe_layers=decoder)
    for stack, chosen in zip((model.encoder, model.decoder), expected, strict=True):
        is_moe = [isinstance(getattr(block.layer[-1], "mlp", None), MoeBlock) for block in stack.block]
        assert [i for i, moe in enumerate(is_moe) if moe] == chosen
    outputs = model.train()(**make_inputs(), output_router_logits=True)
    recorded = (outputs.encoder_router_logits or (), outputs.decoder_router_logits or ())
    assert [len(layers) for layers in recorded] == [len(chosen) for chosen in expected]
    assert outputs.loss.isfinite() and outputs.aux_loss.isfinite()


def test_a_model_without_any_moe_layer_and_wrong_layers_are_refused():
    with pytest.raises(ValueError, match="leave both stacks dense"):
        make_config(moe_layers="none", decoder_moe_layers=[])
    with pytest.raises(ValueError, match=r"`decoder_moe_layers` has \[3\], but the model has 3 layers"):
        make_config(decoder_moe_layers=[3])
    with pytest.raises(ValueError, match=r"`moe_layers` has \[2\]"):
        make_config(moe_layers=[2])
    with pytest.raises(ValueError, match="one for each of the 4 MoE layers"):
        make_config(num_experts=[2, 2])


def test_layers_may_differ_in_their_number_of_experts():
    model = make_model(num_experts=[2, 4, 3, 6])
    assert [block.num_experts for _, block in model.moe_blocks()] == [2, 4, 3, 6]
    outputs = model.train()(**make_inputs())
    assert [x.shape[-1] for x in (*outputs.encoder_router_logits, *outputs.decoder_router_logits)] == [2, 4, 3, 6]
    outputs.loss.backward()


@both_forms
def test_experts_have_the_form_and_the_scale_of_t5s_own(form):
    model = make_model(form, d_model=64, d_ff=128, moe_intermediate_size=256)
    experts = model.encoder.block[0].layer[1].mlp.experts
    up = experts.gate_up_proj if form == "gated-gelu" else experts.up_proj
    torch.testing.assert_close(up.std().item(), 64**-0.5, rtol=0.05, atol=0)
    torch.testing.assert_close(experts.down_proj.std().item(), 256**-0.5, rtol=0.05, atol=0)


# -- losses ----------------------------------------------------------------------------------------------------------
def balance(stack, logits, indices, mask):
    values = []
    for (_, block), layer, index in zip(stack.moe_blocks(), logits, indices, strict=True):
        frequency = expert_frequency(index, block.num_experts, mask)
        values.append(load_balance_loss(block.gate.probabilities(layer), frequency, mask))
    return torch.stack(values).mean()


@both_forms
@pytest.mark.parametrize("padding", [0, 2])
def test_loss_is_cross_entropy_plus_both_balance_losses(form, padding):
    model, inputs = make_model(form, router_aux_loss_coef=0.5).train(), make_inputs(padding)
    outputs = model(**inputs)
    own = F.cross_entropy(outputs.logits.flatten(0, 1), inputs["labels"].flatten())
    masks = inputs["attention_mask"].flatten().bool(), inputs["labels"].ne(-100).flatten()
    encoder = balance(model.encoder, outputs.encoder_router_logits, outputs.encoder_router_indices, masks[0])
    decoder = balance(model.decoder, outputs.decoder_router_logits, outputs.decoder_router_indices, masks[1])
    torch.testing.assert_close(outputs.encoder_aux_loss, encoder)
    torch.testing.assert_close(outputs.decoder_aux_loss, decoder)
    torch.testing.assert_close(outputs.aux_loss, encoder + decoder)
    torch.testing.assert_close(outputs.loss, own + 0.5 * (encoder + decoder))
    assert model.eval()(**inputs).aux_loss is None


def test_num_items_in_batch_normalises_the_cross_entropy():
    model, inputs = make_model(), make_inputs(2)
    mean = model(**inputs).loss
    torch.testing.assert_close(model(**inputs, num_items_in_batch=torch.tensor(100)).loss * 10, mean)


def test_loss_without_router_losses_is_t5s():
    dense = dense_t5("relu")
    moe, _ = upcycle(dense, num_experts=2, top_k=1, check=False)
    inputs = make_inputs(2)
    torch.testing.assert_close(moe(**inputs).loss, dense(**inputs).loss)


# -- padding ---------------------------------------------------------------------------------------------------------
def test_padding_is_routed_nowhere_and_takes_no_capacity():
    model, inputs = make_model(num_experts_per_tok=1, expert_capacity_factor=1.0).train(), make_inputs(2)
    outputs = model(**inputs)
    real = inputs["attention_mask"].flatten().bool(), inputs["labels"].ne(-100).flatten()
    for indices, mask in zip((outputs.encoder_router_indices, outputs.decoder_router_indices), real, strict=True):
        for index in indices:
            assert (index[~mask] == 4).all()
            assert torch.bincount(index[index < 4], minlength=4).max() <= -(-int(mask.sum()) // 4)  # C = ceil(T / N)


def test_what_padding_holds_changes_nothing():
    model, inputs = make_model(), make_inputs(2)
    expected = model(**inputs).logits
    inputs["input_ids"][0, -2:] = 17
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_only_what_lies_behind_the_last_target_counts_as_padding():
    labels = torch.tensor([[-100, 5, -100, 6, -100], [5, 6, 7, 8, 9], [-100] * 5])
    assert target_mask(labels).tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1, 0, 0, 0, 0]]


# -- routers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("router_type", list_routers())
def test_every_router_works_or_is_refused_early(router_type):
    try:
        model = make_model(router_type=router_type)
    except ValueError as error:
        assert "`" in str(error)  # names what cannot be
        return
    inputs = make_inputs(2)
    outputs = model.train()(**inputs)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    inputs.pop("labels")
    try:
        generated = model.generate(**inputs, max_new_tokens=3)
    except ValueError as error:
        assert getattr(type(model.moe_blocks()[0][1].gate), "non_causal", False), error
    else:
        assert generated.shape[0] == 2


def test_router_state_is_handed_on_inside_each_stack():
    model = make_model(router_type="gating_residual", moe_layers="all", decoder_moe_layers="all")
    blocks = dict(model.moe_blocks())
    seen = {}
    for name, block in blocks.items():
        block.gate.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[1].prev_state is not None)
        )
    inputs = make_inputs()
    states = model(**inputs, output_hidden_states=True)
    assert seen == {name: "block.0." not in name for name in blocks}
    assert all(state.shape == (2, 8, 32) for state in states.encoder_hidden_states)
    assert all(state.shape == (2, 6, 32) for state in states.decoder_hidden_states)


def test_token_ids_reach_a_hash_router_of_either_stack():
    model, inputs = make_model(router_type="hash", num_experts_per_tok=1), make_inputs()
    outputs = model(**inputs, output_router_logits=True)
    table = model.encoder.block[0].layer[1].mlp.gate.table
    assert torch.equal(outputs.encoder_router_indices[0], table[inputs["input_ids"].flatten()])
    shifted = model._shift_right(inputs["labels"]).flatten()
    table = model.decoder.block[2].layer[2].mlp.gate.table
    assert torch.equal(outputs.decoder_router_indices[1], table[shifted])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="routes by token id"):
        model(inputs_embeds=embeds, labels=inputs["labels"])


# -- generation ------------------------------------------------------------------------------------------------------
@both_forms
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_beams_are_those_without_a_cache(form, beams):
    model, inputs = make_model(form), make_inputs(3)
    inputs.pop("labels")
    arguments = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6}
    cached = model.generate(**inputs, **arguments)
    assert torch.equal(cached, model.generate(**inputs, **arguments, use_cache=False))
    alone = model.generate(inputs["input_ids"][:1, :-3], **arguments)
    assert torch.equal(alone[0], cached[0])  # padding and neighbours do not matter


def test_beams_are_searched_also_where_routing_is_recorded():
    model, inputs = make_model(output_router_logits=True), make_inputs(2)
    inputs.pop("labels")
    assert model.generate(**inputs, num_beams=3, max_new_tokens=3).shape[0] == 2


def test_a_decoder_fed_step_by_step_gives_the_logits_of_one_pass():
    model, inputs = make_model(), make_inputs()
    ids = model._shift_right(inputs.pop("labels"))
    whole, encoded, cache, steps = model(**inputs, decoder_input_ids=ids).logits, None, None, []
    for t in range(ids.shape[1]):
        outputs = model(
            **inputs,
            encoder_outputs=encoded,
            decoder_input_ids=ids[:, t : t + 1],
            past_key_values=cache,
            use_cache=True,
        )
        encoded, cache = (outputs.encoder_last_hidden_state,), outputs.past_key_values
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


# -- training --------------------------------------------------------------------------------------------------------
def gradients(model, inputs):
    model.zero_grad()
    with seeded(3):
        loss = model(**inputs).loss
        loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, **tolerance):
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_a_few_steps_learn_a_batch_by_heart():
    model, inputs = make_model("relu", initializer_range=0.02).train(), make_inputs(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        losses.append(gradients(model, inputs)[0].item())
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("router_type", ["softmax_topk", "gating_residual"])
def test_checkpointing_gives_the_same_gradients(router_type):
    model = make_model(router_type=router_type, router_aux_loss_coef=0.5).train()
    inputs = make_inputs(2)
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    assert_same(gradients(model, inputs), expected)
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_compiled_and_eager_give_the_same_gradients():
    model, inputs = make_model(implementation={"experts_implementation": "grouped_mm"}).train(), make_inputs(2)
    expected = gradients(model, inputs)
    for stack in (model.encoder, model.decoder):
        maybe_install_capturing_hooks(stack)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    loss = compiled(**inputs).loss
    model.zero_grad()
    loss.backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same((loss, actual), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_finite_and_near():
    model, inputs = make_model(), make_inputs(2)
    expected = model(**inputs).logits
    half = model.to(torch.bfloat16)
    logits = half(**inputs).logits
    assert logits.isfinite().all()
    assert (logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_loading_in_bfloat16_keeps_routers_in_float32(tmp_path):
    make_model().save_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    block = model.decoder.block[0].layer[2].mlp
    assert block.gate.weight.dtype == torch.float32 and block.experts.down_proj.dtype == torch.bfloat16
    outputs = model(**make_inputs(2), output_router_logits=True)
    assert outputs.loss.isfinite() and outputs.encoder_router_logits[0].dtype == torch.float32


# -- saving and other classes ----------------------------------------------------------------------------------------
@both_forms
@pytest.mark.parametrize("auto", [AutoModelForSeq2SeqLM, AutoModel, AutoModelForTextEncoding])
def test_a_reloaded_model_gives_the_same_outputs(form, auto, tmp_path):
    model, inputs = make_model(form, auto), make_inputs(2)
    labels = inputs.pop("labels").clamp(min=0)
    if auto is not AutoModelForTextEncoding:
        inputs["decoder_input_ids"] = labels
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    assert again.config.decoder_moe_layers == [0, 2] and again.config.expert_type == model.config.expert_type


def test_the_encoder_alone_is_the_models_encoder(tmp_path):
    model, inputs = make_model(), make_inputs(2)
    model.save_pretrained(tmp_path)
    encoder = AutoModelForTextEncoding.from_pretrained(tmp_path)
    inputs.pop("labels")
    outputs = encoder(**inputs, output_router_logits=True)
    assert torch.equal(outputs.last_hidden_state, model.encoder(**inputs).last_hidden_state)
    assert len(outputs.router_logits) == 2


def test_the_base_model_returns_the_routing_of_both_stacks():
    model, inputs = make_model(auto=AutoModel), make_inputs(2)
    labels = inputs.pop("labels").clamp(min=0)
    assert model(**inputs, decoder_input_ids=labels).encoder_router_logits is None
    outputs = model(**inputs, decoder_input_ids=labels, output_router_logits=True)
    assert outputs.encoder_router_logits[0].shape == (16, 4) and outputs.decoder_router_indices[1].shape == (12, 2)


def test_the_experts_implementation_reaches_both_stacks():
    model, inputs = make_model(implementation={"experts_implementation": "eager"}), make_inputs(2)
    expected = model(**inputs).logits
    model.set_experts_implementation("batched_mm")
    used = {block.experts.config._experts_implementation for _, block in model.moe_blocks()}
    assert used == {"batched_mm"}
    torch.testing.assert_close(model(**inputs).logits, expected)


# -- watching --------------------------------------------------------------------------------------------------------
def test_expert_load_is_watched_in_both_stacks():
    from hf_moe.reporting.callback import TrainingRecorder

    model, inputs = make_model().train(), make_inputs(2)
    recorder = TrainingRecorder(model)
    model(**inputs).loss.backward()
    summary = recorder.stats.compute()
    recorder.close()
    assert summary.counts.sum(-1).tolist() == [28, 28, 20, 20]  # 14 real source tokens, 10 targets, 2 slots
    torch.testing.assert_close(summary.active_experts, torch.full((4,), 2.0))
    torch.testing.assert_close(summary.mean_probability.sum(-1), torch.ones(4))


def test_a_report_of_the_encoder_is_asked_of_the_encoder(tiny_tokenizer):
    from hf_moe import routing_report

    model = make_model(vocab_size=len(tiny_tokenizer))
    with pytest.raises(ValueError, match=r"Pass `model.get_encoder\(\)`"):
        routing_report(model, tiny_tokenizer, ["one two three"])
    report = routing_report(model.get_encoder(), tiny_tokenizer, ["one two three", "four"])
    assert len(report.layers) == 2 and report.num_tokens > 0


def test_parallel_plans_name_parameters_of_both_stacks():
    model = make_model()
    plan = model.config.base_model_ep_plan
    names = [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_modules()]
    for pattern in plan:
        assert any(re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) for name in names), pattern
    assert {pattern.partition(".")[0] for pattern in plan} == {"encoder", "decoder"}


# -- upcycling -------------------------------------------------------------------------------------------------------
@both_forms
@pytest.mark.parametrize("cls", [T5ForConditionalGeneration, T5Model, T5EncoderModel])
def test_copies_of_a_dense_t5_compute_what_it_does(form, cls):
    dense = dense_t5(form, cls)
    moe, report = upcycle(dense, num_experts=4, top_k=2)
    assert moe.config.model_type == "moe_t5" and report.predicted_exact and report.measured.is_rounding
    if cls is T5ForConditionalGeneration:
        source = make_inputs()["input_ids"]
        arguments = {"num_beams": 2, "max_new_tokens": 5}
        # a T5 of transformers sizes its cache by the encoder's depth
        assert torch.equal(moe.generate(source, **arguments), dense.generate(source, **arguments, use_cache=False))


@both_forms
def test_a_t5_in_float16_keeps_its_output_matrices_in_float32_and_its_experts_do_not(form, tmp_path):
    dense_t5(form).save_pretrained(tmp_path)
    dense = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    assert dense.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    moe, report = upcycle(dense, num_experts=2, top_k=1, layers=r"block\.0", target="moe_t5")
    assert moe.encoder.block[0].layer[1].mlp.experts.down_proj.dtype == torch.float16
    assert moe.encoder.block[1].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert report.measured.max_difference < 0.02 * report.measured.largest


def test_layers_are_chosen_in_each_stack():
    dense = dense_t5("relu")
    moe, report = upcycle(dense, num_experts=2, top_k=1, layers="every:2", target="moe_t5")
    assert (moe.config.moe_layers, moe.config.decoder_moe_layers) == ([1], [1])
    assert [entry["layer"] for entry in report.layers] == [1, 3] and report.num_layers == 5
    moe, _ = upcycle(dense, num_experts=2, top_k=1, layers=r"decoder\.block\.[02]", target="moe_t5", check=False)
    assert (moe.config.moe_layers, moe.config.decoder_moe_layers) == ("none", [0, 2])


def test_an_untied_head_stays_untied():
    dense = dense_t5("gated-gelu", tie_word_embeddings=False)
    with torch.no_grad():
        dense.lm_head.weight = torch.nn.Parameter(torch.randn_like(dense.lm_head.weight))
    dense.all_tied_weights_keys.pop("lm_head.weight", None)
    moe, report = upcycle(dense, num_experts=2, top_k=2)
    assert report.measured.is_rounding
    assert torch.equal(moe.lm_head.weight, dense.lm_head.weight)
    assert not moe.config.scale_decoder_outputs


def test_a_stack_without_input_says_which():
    model = make_model()
    with pytest.raises(ValueError, match="Pass `decoder_input_ids` or `decoder_inputs_embeds`"):
        model(input_ids=make_inputs()["input_ids"])


def test_calibration_sees_the_tokens_of_each_stack():
    from hf_moe.upcycling import ImportanceShared

    dense, inputs = dense_t5("relu"), make_inputs(2)
    _, report = upcycle(
        dense, num_experts=2, top_k=1, experts=ImportanceShared(8), calibration=[inputs], weights="softmax"
    )
    assert len(report.layers) == 5
