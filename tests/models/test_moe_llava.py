"""MoE-LLaVA: the facts of its sheet, and that it behaves like transformers' LLaVA everywhere else."""

import copy
import pickle

import pytest
import torch
from common.tiny_llava import IMAGE_TOKEN, TEXT, TEXT_TYPES, VISION, images, llava_inputs, make_processor, moe_llava
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    SiglipVisionConfig,
    pipeline,
)
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from hf_moe import (
    MoeLlavaConfig,
    MoeLlavaForConditionalGeneration,
    MoeLlavaModel,
    list_routers,
    moe_layers,
    record_routing,
)
from hf_moe.models.llama import MoeLlamaConfig
from hf_moe.models.moe_llava.configuration_moe_llava import paper_fields
from hf_moe.routing import LayerRouting, LoadBalancer, build_router


GATE = torch.tensor([[2.0, 1, 0], [0, 2, 1], [1, 0, 2], [2, 0, 1]])  # the logits of the sheet's worked example
CPU = {"device": "cpu"}


def gate(**fields):
    """A router of the paper's settings whose logits are its inputs."""
    sizes = {"hidden_size": 3, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 4}
    config = MoeLlamaConfig(**sizes, **paper_fields(1, **{"num_experts": 3, **fields}))
    router = build_router(config, 0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    return router.train()


def combine(router) -> torch.Tensor:
    output = router(GATE)
    return torch.zeros(4, 4).scatter_add(1, output.top_k_index, output.top_k_weights)[:, :3]


# -- the paper's gate --------------------------------------------------------------------------------------------
def test_the_balance_loss_of_the_worked_example():
    for capacity in (None, 0.375):  # f counts first choices before any is dropped
        router = gate(expert_capacity_factor=capacity)
        output = router(GATE)
        layer = LayerRouting.from_router(router, output.router_logits, output.top_k_index)
        torch.testing.assert_close(
            layer.distribution().mean(0), torch.tensor([0.4163, 0.2725, 0.3112]), atol=5e-5, rtol=0
        )
        assert LoadBalancer([3])([layer]).aux_loss.item() == pytest.approx(1.0622, abs=5e-5)


def test_combine_weights_of_the_worked_example_under_capacity():
    two = torch.tensor([[0.7311, 0.2689, 0], [0, 0.7311, 0.2689], [0, 0, 1], [1, 0, 0]])
    torch.testing.assert_close(combine(gate(expert_capacity_factor=0.75)), two, atol=5e-5, rtol=0)
    one = combine(gate(expert_capacity_factor=0.375))
    assert one[3].tolist() == [0, 0, 0] and one[:3].argmax(-1).tolist() == [0, 1, 2]
    at_least_two = gate(expert_capacity_factor=0.375, router_config={"min_capacity": 2})
    torch.testing.assert_close(combine(at_least_two), two, atol=5e-5, rtol=0)


@pytest.mark.parametrize(("factor", "top_k", "expected"), [(1, 2, 3), (1.5, 2, 4), (1.25, 1, 2)])
def test_capacity_of_four_tokens_and_three_experts(factor, top_k, expected):
    router = gate(expert_capacity_factor=factor, num_experts_per_tok=top_k)
    # A rank r stays if r < C, so C need not be rounded up.
    assert router.capacity(4 * top_k).ceil().tolist() == [expected] * 3


def test_capacity_at_evaluation_is_only_there_on_request():
    router = gate(expert_capacity_factor=0.75)
    assert (combine(router.eval()) > 0).sum() == 8
    router = gate(expert_capacity_factor=1.5, router_config={"eval_capacity_factor": 0.375})
    assert (combine(router.eval())[3] == 0).all()


def test_a_silent_router_costs_alpha_per_layer():
    model = moe_llava(moe_layers="dense").train()
    for _, block in model.moe_blocks():
        torch.nn.init.zeros_(block.gate.weight)
    inputs = llava_inputs()
    output = model(**inputs, labels=inputs["input_ids"])
    model.adds_router_losses = False
    plain = model(**inputs, labels=inputs["input_ids"])
    assert output.aux_loss.item() == pytest.approx(1)
    assert output.loss.item() == pytest.approx(plain.loss.item() + 0.01 * 3, abs=1e-6)


# -- configuration -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("placement", "expected"),
    [("sparse", [0, 2]), ("dense", [0, 1, 2]), ("first_half", [0]), ("second_half", [1, 2]), ([1], [1])],
)
def test_every_placement_of_the_paper(placement, expected):
    model = moe_llava(moe_layers=placement)
    assert model.config.moe_layer_indices == expected
    assert [view.name for view in moe_layers(model)] == [f"model.language_model.layers.{i}.mlp" for i in expected]
    assert model(**llava_inputs()).logits.isfinite().all()


def test_fields_about_experts_are_kept_once_and_read_in_both_places():
    config = moe_llava(num_experts=4).config
    config.router_aux_loss_coef = 0.5
    assert config.text_config.router_aux_loss_coef == config.router_aux_loss_coef == 0.5
    assert "num_experts" not in config.to_diff_dict() and config.to_dict()["text_config"]["num_experts"] == 4
    with pytest.raises(AttributeError, match=r"no attribute 'num_expert'"):
        _ = config.num_expert


def test_a_number_of_experts_per_layer_is_possible():
    model = moe_llava(num_experts=[4, 2])
    output = model(**llava_inputs(), output_router_logits=True)
    assert [logits.shape[-1] for logits in output.router_logits] == [4, 2]


def test_configs_survive_files_copies_and_pickles(tmp_path):
    for config in (MoeLlavaConfig(), moe_llava("phi", num_experts=3).config):
        config.save_pretrained(tmp_path)
        for twin in (AutoConfig.from_pretrained(tmp_path), pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
            twin._name_or_path = config._name_or_path
            assert type(twin) is MoeLlavaConfig and twin.to_dict() == config.to_dict()
    fewer = MoeLlavaConfig.from_pretrained(tmp_path, num_experts_per_tok=1)
    assert fewer.text_config.num_experts_per_tok == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_token_index": 64}, r"`image_token_index` \(64\) is not in the vocabulary.*vocab_size` = 64"),
        ({"text_config": {"model_type": "moe_gpt2"}}, r"'moe_gpt2', which is no MoE decoder.*'moe_stablelm'"),
        ({"text_config": {"model_type": "moe_bert"}}, r"'moe_bert', which is no MoE decoder"),
        ({"text_config": {"model_type": "upcycled_gemma", "moe_modules": ["layers.0.mlp"]}}, r"'upcycled_gemma'"),
        ({"text_config": {"model_type": "gemma"}}, r"'gemma', which is no MoE decoder.*'phi'"),
        ({"text_config": {"model_type": "mistral", "sliding_window": 8}}, r"sliding.window"),
        ({"num_experts_per_tok": 5}, r"`num_experts_per_tok` must be between 1 and.*\(4\), got 5"),
        ({"moe_layers": "spars"}, r"`moe_layers` must be 'all'.*got 'spars'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_when_the_config_is_made(fields, message):
    with pytest.raises(ValueError, match=message):
        MoeLlavaConfig(**{"vision_config": VISION, "text_config": {"model_type": "llama", **TEXT},
                          "image_token_index": IMAGE_TOKEN, **fields})  # fmt: skip


# -- forward -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text_type", TEXT_TYPES)
def test_outputs_carry_the_routing(text_type):
    model = moe_llava(text_type)
    inputs = llava_inputs()
    output = model(**inputs, output_router_logits=True)
    assert [x.shape for x in output.router_logits] == [(28, 4)] * 2
    assert [x.shape for x in output.router_indices] == [(28, 2)] * 2
    assert output.aux_loss >= 1 and output.image_hidden_states.shape == (8, 32)
    assert torch.equal(output.logits, model(**inputs).logits)
    base = model.model(**inputs, output_router_logits=True)
    assert all(map(torch.equal, base.router_logits, output.router_logits))
    assert isinstance(model(**inputs, return_dict=False), tuple)


@pytest.mark.parametrize("model_type", ["moe_plus_plus", "dynamic_moe"])
def test_other_moe_decoders_of_the_package_can_be_the_language_model(model_type):
    config = MoeLlavaConfig(
        vision_config=VISION, text_config={"model_type": model_type, **TEXT}, image_token_index=IMAGE_TOKEN
    )
    output = MoeLlavaForConditionalGeneration(config).eval()(**llava_inputs(), output_router_logits=True)
    assert output.aux_loss.isfinite() and {logits.shape[0] for logits in output.router_logits} == {28}


def test_each_row_of_a_batch_is_computed_alone():
    model, inputs = moe_llava(), llava_inputs(batch=3)
    together = model(**inputs).logits
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


def test_padding_changes_nothing_and_takes_no_expert():
    model = moe_llava()
    inputs = llava_inputs(batch=1)
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (3, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (3, 0)),
        "pixel_values": inputs["pixel_values"],
    }
    plain, other = model(**inputs, output_router_logits=True), model(**padded, output_router_logits=True)
    torch.testing.assert_close(other.logits[:, 3:], plain.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.aux_loss, plain.aux_loss)
    assert (other.router_indices[0][:3] == 4).all()


def test_labels_at_images_never_count_and_pixels_only_through_the_projector():
    model, inputs = moe_llava(), llava_inputs()
    labels = inputs["input_ids"].clone()
    loss = model(**inputs, labels=labels).loss
    image = labels == IMAGE_TOKEN
    assert torch.equal(model(**inputs, labels=labels.masked_fill(image, 5)).loss, loss)
    assert torch.equal(model(**inputs, labels=labels.masked_fill(image, -100)).loss, loss)
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    assert not torch.equal(model(**other, labels=labels).loss, loss)
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(model(**other, labels=labels).loss, model(**inputs, labels=labels).loss)


def test_text_without_images_needs_none():
    model = moe_llava()
    ids = torch.arange(3, 13).view(1, -1)
    language = model.model.language_model(ids)
    assert torch.equal(model(input_ids=ids).logits, model.lm_head(language.last_hidden_state))
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)


def _router_case(name):
    options = {"expert_choice": {"router_config": {"fallback": "topk"}}}.get(name, {"router_config": {}})
    return options | ({"num_copy_experts": 1} if name in ("gating_residual", "moepp_release") else {})


@pytest.mark.parametrize("router_type", list_routers())
def test_every_router_routes_images_and_text(router_type):
    model = moe_llava(router_type=router_type, **_router_case(router_type))
    inputs = llava_inputs()
    assert model(**inputs, output_router_logits=True).aux_loss.isfinite()
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert loss.isfinite() and model.model.multi_modal_projector.linear_1.weight.grad.any()


def test_hash_routers_read_the_ids_behind_the_embeddings():
    model, inputs = moe_llava(router_type="hash", router_config={}), llava_inputs()
    table = moe_layers(model)[0].router.table
    index = model(**inputs, output_router_logits=True).router_indices[0]
    expected = table[inputs["input_ids"].flatten() % len(table)]
    assert torch.equal(index.sort(-1).values, expected.sort(-1).values)


def test_views_record_what_images_and_text_visit():
    model, inputs = moe_llava(), llava_inputs()
    with record_routing(model) as recorder:
        output = model(**inputs, output_router_logits=True)
    assert all(torch.equal(layer.top_k_index[0], index) for layer, index in zip(
        recorder.layers, output.router_indices, strict=True))  # fmt: skip
    is_image = inputs["input_ids"].flatten() == IMAGE_TOKEN
    assert recorder.layers[0].top_k_index[0][is_image].shape == (8, 2)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_experts_implementation_computes_the_same(implementation):
    inputs = llava_inputs(padding="left")
    expected = moe_llava()(**inputs).logits
    model = moe_llava(implementation={"experts_implementation": implementation})
    assert model.config.text_config._experts_implementation == implementation
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], rtol=0, atol=1e-5)


def test_another_vision_tower_without_a_class_token():
    tower = SiglipVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                               image_size=16, patch_size=8)  # fmt: skip
    config = MoeLlavaConfig(vision_config=tower, text_config={"model_type": "qwen2", **TEXT},
                            image_token_index=IMAGE_TOKEN, vision_feature_select_strategy="full")  # fmt: skip
    assert MoeLlavaForConditionalGeneration(config).eval()(**llava_inputs()).image_hidden_states.shape == (8, 32)


# -- training ----------------------------------------------------------------------------------------------------
def test_checkpointing_gives_the_same_gradients():
    inputs = llava_inputs()
    gradients = []
    for checkpointing in (False, True):
        model = moe_llava("stablelm").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))
    with pytest.raises(ValueError, match=r"use_reentrant': True}` would drop the gradient"):
        model.activation_checkpointing_enable({"use_reentrant": True})


def test_a_few_steps_reduce_the_loss_with_capacity_and_noise():
    model = moe_llava(expert_capacity_factor=1.5, router_config={"noise": "gumbel_second"}).train()
    inputs = llava_inputs(batch=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_bfloat16_is_close_and_keeps_routers_in_float32(tmp_path):
    model, inputs = moe_llava(text={"initializer_range": 0.05}), llava_inputs()
    model.save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {block.gate.weight.dtype for _, block in half.moe_blocks()} == {torch.float32}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    got = half(**inputs, output_router_logits=True)
    assert got.router_logits[0].dtype == torch.float32
    expected = model(**{**inputs, "pixel_values": inputs["pixel_values"].float()}).logits
    torch.testing.assert_close(got.logits.float(), expected, rtol=0, atol=0.05)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_computes_the_same():
    model = moe_llava(implementation={"experts_implementation": "grouped_mm"})
    inputs = llava_inputs()
    maybe_install_capturing_hooks(model)
    compiled = torch.compile(model, backend="eager")
    expected = model(**inputs, output_router_logits=True)
    got = compiled(**inputs, output_router_logits=True)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss)


# -- generation, files, processor --------------------------------------------------------------------------------
@pytest.mark.parametrize("text_type", ["llama", "phi", "stablelm"])
def test_generation_with_a_cache_is_the_full_forward(text_type):
    model, inputs = moe_llava(text_type), llava_inputs(padding="left")
    # Without a cache the whole prompt is read again with its images, so an answer may hold no image token.
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE_TOKEN]}
    answer = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, use_cache=False, **options), answer)
    beams = model.generate(**inputs, num_beams=3, num_return_sequences=2, **options)
    assert beams.shape == (4, answer.shape[1])


def test_an_answer_may_hold_an_image_token():
    model = moe_llava()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    forced = torch.full((1, model.config.text_config.vocab_size), -1.0)
    forced[:, IMAGE_TOKEN] = 1.0
    answer = model.generate(
        **llava_inputs(batch=1), max_new_tokens=3, do_sample=False, eos_token_id=None,
        logits_processor=[lambda ids, scores: forced],
    )  # fmt: skip
    assert answer[0, -3:].tolist() == [IMAGE_TOKEN] * 3


@pytest.mark.parametrize("residual", [False, True])
def test_a_reloaded_model_is_the_same(residual, tmp_path):
    model = moe_llava("qwen3", residual_expert=residual)
    model.save_pretrained(tmp_path)
    inputs = llava_inputs()
    for auto, cls in ((AutoModelForImageTextToText, MoeLlavaForConditionalGeneration),
                      (AutoModelForCausalLM, MoeLlavaForConditionalGeneration)):  # fmt: skip
        again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is cls and not any(info.values())
        assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MoeLlavaModel and torch.equal(base.eval()(**inputs)[0], model.model(**inputs)[0])


def test_a_head_with_a_bias_is_saved_with_it(tmp_path):
    config = moe_llava("phi").config
    config.lm_head_bias = True
    model = MoeLlavaForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.bias, model.lm_head.bias)


def test_the_pipeline_answers_about_images(tmp_path, tiny_tokenizer):
    processor = make_processor(tiny_tokenizer)
    text = {"vocab_size": len(processor.tokenizer)}
    model = moe_llava(text=text)
    model.config.image_token_index = processor.image_token_id
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    answer = pipeline("image-text-to-text", model=str(tmp_path), **CPU)
    messages = [{"role": "user", "content": [{"type": "image", "image": images(1)[0]},
                                             {"type": "text", "text": "what runs here?"}]}]  # fmt: skip
    said = answer(text=messages, max_new_tokens=4, generate_kwargs={"do_sample": False})[0]["generated_text"]
    assert said[-1]["role"] == "assistant" and isinstance(said[-1]["content"], str)
    plain = answer(images=images(1), text="<image>a river", max_new_tokens=4, generate_kwargs={"do_sample": False})
    assert plain[0]["generated_text"].endswith("") and "a river" in plain[0]["generated_text"]


def test_the_processor_expands_one_token_to_the_patches_of_the_model(tiny_tokenizer):
    processor = make_processor(tiny_tokenizer)
    model = moe_llava(text={"vocab_size": len(processor.tokenizer)})
    model.config.image_token_index = processor.image_token_id
    batch = processor(
        images=images(3), text=["<image>one <image>two", "<image>three"], padding=True, return_tensors="pt"
    )
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [8, 4]
    assert model(**batch).logits.isfinite().all()


def test_a_fresh_process_finds_processor_and_model_in_either_order(tmp_path, tiny_tokenizer, run_python):
    processor = make_processor(tiny_tokenizer)
    moe_llava(text={"vocab_size": len(processor.tokenizer)}).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = f"""
import sys, hf_moe
from transformers import AutoModelForImageTextToText, AutoProcessor
assert "transformers.models.llava" not in sys.modules
processor = AutoProcessor.from_pretrained({str(tmp_path)!r})
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r})
print(type(processor).__name__, type(processor.image_processor).__name__, type(model).__name__)
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["LlavaProcessor", "CLIPImageProcessorPil", "MoeLlavaForConditionalGeneration"]


@pytest.mark.slow
def test_a_pushed_model_answers_where_the_plugin_is_not_imported(tmp_path, tiny_tokenizer, hub, run_python):
    processor = make_processor(tiny_tokenizer)
    moe_llava(text={"vocab_size": len(processor.tokenizer)}).save_pretrained(tmp_path / "moe")
    processor.save_pretrained(tmp_path / "moe")
    push = f"""
from transformers import AutoModelForImageTextToText, AutoProcessor
import hf_moe
folder = {str(tmp_path / "moe")!r}
model = AutoModelForImageTextToText.from_pretrained(folder)
model.push_to_hub("me/moe", tokenizer=AutoProcessor.from_pretrained(folder))
"""
    run = run_python(push, env=hub.environment(tmp_path / "a"))
    assert run.returncode == 0, run.stderr
    load = """
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("me/moe", trust_remote_code=True)
print(type(model).__module__, type(AutoProcessor.from_pretrained("me/moe")).__name__)
"""
    run = run_python(load, env=hub.environment(tmp_path / "b"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["hf_moe.models.moe_llava.modeling_moe_llava", "LlavaProcessor"]


# -- what users get wrong ----------------------------------------------------------------------------------------
def test_missing_images_are_told_also_by_generate():
    model, inputs = moe_llava(), llava_inputs()
    del inputs["pixel_values"]
    for call, options in ((model, {}), (model.generate, {"max_new_tokens": 3})):
        with pytest.raises(ValueError, match=r"`input_ids` has 8 image tokens \(id 63\), but there are no images"):
            call(**inputs, **options)


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x["input_ids"][0].__setitem__(2, 5), r"has 7 image tokens \(id 63\), but 2 images need 8 \(4 each\)"),
    (lambda x: x.update(pixel_values=x["pixel_values"][:1]), r"has 8 image tokens.*but 1 images need 4 \(4 each\)"),
    (lambda x: x["input_ids"].fill_(5), r"has 0 image tokens.*its image token, `patch_size`"),
    (lambda x: x.update(input_features=x["pixel_values"]), r"`input_features`:.*and none for audio"),
    (lambda x: x.update(pixel_values_videos=x["pixel_values"]), r"`pixel_values_videos`:.*and none for video"),
    (lambda x: x.update(inputs_embeds=torch.zeros(2, 14, 32)), r"Exactly one of `input_ids` and `inputs_embeds`"),
])  # fmt: skip
def test_inputs_that_do_not_belong_together_are_refused(change, message):
    inputs = llava_inputs()
    change(inputs)
    with pytest.raises(ValueError, match=message):
        moe_llava()(**inputs)
