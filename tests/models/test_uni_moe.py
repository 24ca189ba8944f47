"""Uni-MoE: the facts of its sheet, and what its inputs may and may not be."""

import copy
import pickle

import pytest
import torch
from common.tiny_uni_moe import (
    ENCODERS,
    NAMES,
    QUERIES,
    ROWS,
    SHAPES,
    TOKENS,
    VISION,
    inputs_of,
    prompt,
    uni_moe,
    uni_moe_config,
)
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from hf_moe import UniMoeConfig, UniMoeForConditionalGeneration, UniMoeModel, list_routers, moe_layers
from hf_moe.models.llama import MoeLlamaConfig
from hf_moe.routing import build_router


ALL = (2, "image", 3, "video", "speech", 2, "audio", 4)


# -- the language model's gate -----------------------------------------------------------------------------------
def test_weights_are_the_softmax_over_the_chosen_logits():
    text = uni_moe_config(()).text_config
    sizes = {"hidden_size": 3, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 4}
    fields = {"num_experts": 3, "num_experts_per_tok": 2, "router_config": text.router_config}
    router = build_router(MoeLlamaConfig(**sizes, **fields), 0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    output = router(torch.tensor([[2.0, 1, 0]]))
    torch.testing.assert_close(output.top_k_weights, torch.tensor([[0.7311, 0.2689]]), atol=5e-5, rtol=0)
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    expected = logits.topk(2).values.softmax(-1)
    torch.testing.assert_close(router(logits).top_k_weights, expected, atol=1e-6, rtol=0)


def test_a_dense_text_config_gets_the_papers_settings():
    config = uni_moe_config()
    assert (config.num_experts, config.num_experts_per_tok, config.moe_layer_indices) == (4, 2, [0, 2])
    assert config.expert_capacity_factor is None and config.router_aux_loss_coef == 0


def test_identical_experts_are_the_dense_model_for_any_gate():
    model, inputs = uni_moe(), inputs_of(*ALL)
    for _, block in model.moe_blocks():
        for parameter in block.experts.parameters():
            parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    expected = model(**inputs).logits
    for _, block in model.moe_blocks():
        torch.nn.init.normal_(block.gate.weight, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)


# -- configuration -----------------------------------------------------------------------------------------------
def test_configs_survive_files_copies_and_pickles(tmp_path):
    for config in (UniMoeConfig(), uni_moe_config(), uni_moe_config(("speech",), "qwen3", {"head_dim": 8})):
        config.save_pretrained(tmp_path)
        for twin in (AutoConfig.from_pretrained(tmp_path), pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
            twin._name_or_path = config._name_or_path
            assert type(twin) is UniMoeConfig and twin.to_dict() == config.to_dict()


def test_numbers_of_tokens():
    config = uni_moe_config(num_query_tokens=50)
    assert [config.tokens_per_item(name) for name in TOKENS] == [4, 4, 50, 50]
    real = uni_moe_config(vision_config={**VISION, "image_size": 336, "patch_size": 14})
    assert real.tokens_per_item("image") == real.tokens_per_item("video") == 576
    assert uni_moe_config(video_pool="concat", num_video_frames=3).tokens_per_item("video") == 12
    mlp = uni_moe_config(speech_connector={"kind": "mlp"}, audio_connector={"kind": "mlp"})
    assert mlp.tokens_per_item("speech") == 20 and mlp.tokens_per_item("audio") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speech_token_id": 64}, r"`speech_token_id` \(64\) is not in the vocabulary.*vocab_size` = 64"),
        ({"audio_config": None}, r"`audio_token_id` is 63, but there is no encoder for audio.*`audio_config`"),
        ({"speech_token_id": None}, r"`speech_config` is given without a placeholder: set `speech_token_id`"),
        ({"video_token_id": 60}, r"placeholder of its own"),
        ({"text_config": {"model_type": "gemma"}}, r"'gemma', which is no MoE decoder"),
        ({"video_pool": "max"}, r"`video_pool` must be 'mean' or 'concat', got 'max'"),
        ({"image_connector": {"kind": "linear"}}, r"`image_connector\['kind'\]` must be one of.*'linear'"),
        ({"image_connector": {"kind": "mlp", "size": 2}}, r"got \['size'\] too"),
        ({"audio_connector": {"kind": "decoder_query"}}, r"decoder is Whisper's.*audio-spectrogram"),
        ({"speech_connector": {"kind": "decoder_query", "num_query_tokens": 61}}, r"\(61\) exceeds.*= 60"),
        ({"num_query_tokens": 0}, r"`num_query_tokens` must be at least 1, got 0"),
        ({"num_experts_per_tok": 5}, r"`num_experts_per_tok` must be between 1 and.*\(4\), got 5"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_when_the_config_is_made(fields, message):
    full = {**uni_moe_config().to_dict(), **fields}
    with pytest.raises(ValueError, match=message):
        UniMoeConfig(**full)


# -- media -------------------------------------------------------------------------------------------------------
def test_a_video_of_equal_frames_is_the_image_and_its_order_does_not_matter():
    model = uni_moe().model
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for frames in (1, 5):
        same = image[:, None].expand(-1, frames, -1, -1, -1)
        torch.testing.assert_close(model.encode("video", same), model.encode("image", image), rtol=0, atol=1e-5)
    video = torch.randn(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert model.encode("video", video).shape == (1, 4, 32)
    shuffled = model.encode("video", video[:, [2, 0, 3, 1]])
    torch.testing.assert_close(shuffled, model.encode("video", video), rtol=0, atol=1e-5)
    model.config.video_pool = "concat"
    assert model.encode("video", video).shape == (1, 16, 32)
    assert not torch.allclose(model.encode("video", video[:, [2, 0, 3, 1]]), model.encode("video", video))


def test_embeddings_are_those_of_tokens_and_at_placeholders_the_media_in_order():
    model = uni_moe()
    inputs = inputs_of("speech", 2, "image", 1, "image", "video", "speech", 3, "audio")
    embeds = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embeds.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    rows, ids = embeds["inputs_embeds"], inputs["input_ids"]
    text = torch.ones_like(ids, dtype=torch.bool)
    for name, token in TOKENS.items():
        expected = model.model.encode(name, inputs[NAMES[name]])
        assert expected.shape == (len(inputs[NAMES[name]]), ROWS[name], 32)
        torch.testing.assert_close(rows[ids == token], expected.flatten(0, 1))
        text &= ids != token
    assert torch.equal(rows[text], model.get_input_embeddings()(ids)[text])
    assert rows.shape[1] == 6 + 2 * QUERIES + 2 * 4 + 4 + QUERIES


def test_labels_at_placeholders_never_count():
    model, inputs = uni_moe(), inputs_of(*ALL)
    labels = inputs["input_ids"].clone()
    media = sum(labels == token for token in TOKENS.values()).bool()
    loss = model(**inputs, labels=labels).loss
    assert torch.equal(model(**inputs, labels=labels.masked_fill(media, 5)).loss, loss)
    assert torch.equal(model(**inputs, labels=labels.masked_fill(media, -100)).loss, loss)


def test_text_alone_is_the_language_model_and_calls_no_encoder():
    model, ids = uni_moe(), prompt(9)
    expected = model.lm_head(model.model.language_model(ids).last_hidden_state)
    for part in (*model.model.encoders().values(), *model.model.connectors().values()):
        part.forward = None
    assert torch.equal(model(input_ids=ids).logits, expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_mixed_modalities_is_each_row_alone(side):
    model = uni_moe()
    rows = [inputs_of(7), inputs_of(2, "speech", 3), inputs_of("image", 1, "audio", 4, seed=1)]
    length = max(row["input_ids"].shape[1] for row in rows)
    batch = {}
    for name in ("input_ids", "attention_mask"):
        gaps = [length - row[name].shape[1] for row in rows]
        batch[name] = torch.cat([pad(row[name], (gap, 0) if side == "left" else (0, gap))
                                 for row, gap in zip(rows, gaps, strict=True)])  # fmt: skip
    for row in rows:
        batch |= {name: row[name] for name in NAMES.values() if name in row}
    real = batch["attention_mask"].bool()
    together = model(**batch).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(together[index][real[index]], model(**row).logits[0], rtol=0, atol=1e-5)


def test_padding_of_a_sound_is_not_heard():
    model = uni_moe(("audio",)).model
    sound = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(16) < 8).long()[None]
    other = sound.clone()
    other[:, 8:] += 1
    heard = model.encode("audio", sound, mask)
    torch.testing.assert_close(model.encode("audio", other, mask), heard, rtol=0, atol=1e-6)
    assert not torch.allclose(model.encode("audio", other), model.encode("audio", sound), atol=1e-3)


@pytest.mark.parametrize("modality", TOKENS)
def test_every_modality_works_alone(modality):
    model, inputs = uni_moe((modality,)), inputs_of(3, modality, 2)
    assert list(model.model.encoders()) == [ENCODERS[modality]]
    output = model(**inputs, output_router_logits=True)
    assert [x.shape[0] for x in output.router_logits] == [5 + ROWS[modality]] * 2 and output.aux_loss >= 1
    assert [view.name for view in moe_layers(model)] == [f"model.language_model.layers.{i}.mlp" for i in (0, 2)]


@pytest.mark.parametrize("modality", ["image", "speech"])
@pytest.mark.parametrize("kind", ["mlp", "qformer"])
def test_connectors_are_a_choice(modality, kind):
    former = {"config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}}
    settings = {"kind": kind, **(former if kind == "qformer" else {})}
    model = uni_moe((modality,), **{f"{modality}_connector": settings})
    rows = model.model.encode(modality, torch.zeros(2, *SHAPES[modality]))
    assert rows.shape == (2, model.config.tokens_per_item(modality), 32)


@pytest.mark.parametrize("router_type", [name for name in list_routers() if name in ("hash", "top_p", "sigmoid_topk")])
def test_other_routers_route_media_too(router_type):
    model = uni_moe(("speech",), router_type=router_type, router_config={})
    assert model(**inputs_of(3, "speech")).logits.isfinite().all()


# -- training ----------------------------------------------------------------------------------------------------
def test_frozen_encoders_have_no_gradients_and_checkpointing_changes_none():
    gradients = []
    for checkpointing in (False, True):
        model, inputs = uni_moe().train(), inputs_of(*ALL)
        if checkpointing:
            model.activation_checkpointing_enable()
            assert not any(getattr(m, "gradient_checkpointing", False) for m in model.model.speech_connector.modules())
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0] if gradients[0][n] is not None)
    missing = {name.split(".")[1] for name, gradient in gradients[0].items() if gradient is None}
    assert missing == {"vision_encoder", "speech_encoder", "audio_encoder"}
    trained = uni_moe(freeze_encoders=False)
    trained(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert trained.model.speech_encoder.conv1.weight.grad.any()


def test_a_batch_without_media_still_gives_connectors_gradients_under_data_parallelism():
    model, inputs = uni_moe().train(), inputs_of(6, "image")
    alone = model(**inputs, labels=inputs["input_ids"]).loss
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    finally:
        torch.distributed.destroy_process_group()
    loss.backward()
    assert torch.equal(loss, alone)
    assert not any(p.grad is None for p in model.parameters() if p.requires_grad)
    assert not any(p.grad.any() for p in model.model.speech_connector.parameters())


def test_a_few_steps_reduce_the_loss():
    model, inputs = uni_moe(router_aux_loss_coef=0.01).train(), inputs_of(*ALL)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_bfloat16_is_close(tmp_path):
    model, inputs = uni_moe(text={"initializer_range": 0.05}), inputs_of(*ALL)
    model.save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    got = half(**inputs, output_router_logits=True)
    assert got.logits.dtype == torch.bfloat16 and got.router_logits[0].dtype == torch.float32
    torch.testing.assert_close(got.logits.float(), model(**inputs).logits, rtol=0, atol=0.08)


@torch.no_grad()
def test_a_compiled_model_computes_the_same():
    model, inputs = uni_moe(("image",)), inputs_of(2, "image")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


# -- generation and files ----------------------------------------------------------------------------------------
def test_generation_with_a_cache_is_the_full_forward():
    model, inputs = uni_moe(), inputs_of(*ALL)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [*TOKENS.values()]}
    answer = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, use_cache=False, **options), answer)


def test_beams_keep_the_media_of_their_prompt():
    model = uni_moe(("image",))
    rows = [inputs_of(3, "image", "image", seed=1), inputs_of("image", 7, seed=2)]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    options = {"max_new_tokens": 3, "num_beams": 2, "num_return_sequences": 2, "eos_token_id": None}
    together = model.generate(**batch, **options)
    for index, row in enumerate(rows):
        assert torch.equal(model.generate(**row, **options), together[2 * index : 2 * index + 2])


def test_a_reloaded_model_is_the_same(tmp_path):
    model, inputs = uni_moe(), inputs_of(*ALL)
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is UniMoeForConditionalGeneration and not any(info.values())
        torch.testing.assert_close(again.eval()(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
        assert not any(p.requires_grad for p in again.model.speech_encoder.parameters())
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is UniMoeModel
    torch.testing.assert_close(base.eval()(**inputs)[0], model.model(**inputs)[0], rtol=0, atol=1e-5)


# -- what users get wrong ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x.pop("input_features"), r"has 5 speech tokens \(id 62\), but there is no speech: pass"),
    (lambda x: x["input_ids"][0].__setitem__(2, 5), r"has 3 image tokens \(id 60\), but `pixel_values` has 1 items"),
    (lambda x: x.update(audio_values=x["audio_values"].repeat(2, 1, 1)), r"has 5 audio.*2 items that need 10"),
    (lambda x: x.update(input_values=x["audio_values"]), r"`input_values` is not read.*pass `audio_values`"),
    (lambda x: x.update(pixel_values_videos=x["pixel_values"]), r"must have the shape \(videos, frames"),
    (lambda x: x.update(inputs_embeds=torch.zeros(1, 4, 32)), r"Exactly one of `input_ids` and `inputs_embeds`"),
    (lambda x: x.update(inputs_embeds=torch.zeros(1, 4, 32), input_ids=None), r"`pixel_values` needs `input_ids`"),
])  # fmt: skip
def test_inputs_that_do_not_belong_together_are_refused(change, message):
    inputs = inputs_of(*ALL)
    change(inputs)
    with pytest.raises(ValueError, match=message):
        uni_moe()(**inputs)


def test_a_modality_without_encoder_is_told():
    model = uni_moe(("image",))
    with pytest.raises(ValueError, match=r"`input_features`: this `uni_moe` has no encoder for speech"):
        model(**{**inputs_of(3, "image"), "input_features": torch.zeros(1, 8, 40)})
    with pytest.raises(ValueError, match=r"`pixel_values_videos`: this `uni_moe` has no placeholder for video"):
        model(**{**inputs_of(3, "image"), "pixel_values_videos": torch.zeros(1, 2, 3, 16, 16)})
