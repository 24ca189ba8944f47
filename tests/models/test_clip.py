"""`moe_clip` takes the place of CLIP: outputs, losses, towers, saving, LLaVA's tower, pipelines."""

import pytest
import torch
from common.tiny_clip import END, TEXT, VISION, clip_inputs, make_clip, make_moe_clip
from common.tiny_llava import dense_llava, llava_inputs
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    pipeline,
)

from hf_moe import (
    MoeClipConfig,
    MoeClipForImageClassification,
    MoeClipTextModelWithProjection,
    MoeClipVisionConfig,
    MoeClipVisionModel,
    MoeClipVisionModelWithProjection,
    MoeLlavaForConditionalGeneration,
    list_routers,
    moe_layers,
    record_routing,
    upcycle_clip,
    upcycle_llava,
)


@torch.no_grad()
def similarity(model, **inputs):
    return model(**(inputs or clip_inputs())).logits_per_image


def test_both_towers_record_their_routing():
    model = make_moe_clip()
    out = model(**clip_inputs(), output_router_logits=True)
    assert [logits.shape for logits in out.text_router_logits] == [(40, 4)] * 2
    assert [logits.shape for logits in out.vision_router_logits] == [(4 * 5, 4)] * 3  # four patches and the class
    assert [index.shape for index in out.vision_router_indices] == [(20, 2)] * 3
    names = [layer.name for layer in moe_layers(model)]
    assert names[0] == "text_model.encoder.layers.0.mlp" and len(names) == 5
    with record_routing(model) as recorder:
        model(**clip_inputs())
    assert torch.equal(recorder.layers[2].router_logits[0], out.vision_router_logits[0])


def test_the_loss_holds_the_balance_losses_of_both_towers_in_training():
    inputs = clip_inputs(padded=True)
    model = make_moe_clip(router_aux_loss_coef=0.1).train()
    out = model(**inputs, return_loss=True)
    model.router_aux_loss_coef = model.config.router_aux_loss_coef = 0.0
    assert model.vision_model.config.router_aux_loss_coef == 0.0
    plain = model(**inputs, return_loss=True)
    assert plain.aux_loss is None
    torch.testing.assert_close(out.loss - plain.loss, 0.1 * out.aux_loss)
    model.eval()
    torch.testing.assert_close(model(**inputs, return_loss=True).loss, plain.loss)


def test_balanced_towers_have_a_loss_of_one_each():
    model = make_moe_clip(router_aux_loss_coef=0.1)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.zero_()
    out = model(**clip_inputs(), output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, torch.tensor(2.0))


def test_padding_is_not_routed():
    model = make_moe_clip()
    out = model(**clip_inputs(padded=True), output_router_logits=True)
    empty = (out.text_router_indices[0] == 4).all(-1).view(4, 10)
    assert empty[0, -3:].all() and empty.sum() == 3
    shorter = clip_inputs(padded=True)
    alone = {name: tensor[:1, :7] if tensor.dim() == 2 else tensor[:1] for name, tensor in shorter.items()}
    torch.testing.assert_close(model(**alone).text_embeds[0], model(**shorter).text_embeds[0], rtol=1e-4, atol=1e-5)


def test_reloaded_models_say_the_same(tmp_path):
    model = make_moe_clip(router_aux_loss_coef=0.03)
    model.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        loaded = auto.from_pretrained(tmp_path)
        assert torch.equal(similarity(loaded), similarity(model))
        assert loaded.config.router_aux_loss_coef == 0.03


def test_towers_can_be_used_alone(tmp_path):
    model, inputs = make_moe_clip(), clip_inputs()
    model.save_pretrained(tmp_path)
    out = model(**inputs)
    text = MoeClipTextModelWithProjection.from_pretrained(tmp_path)
    vision = MoeClipVisionModelWithProjection.from_pretrained(tmp_path)
    words = text(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).text_embeds
    pictures = vision(pixel_values=inputs["pixel_values"]).image_embeds
    torch.testing.assert_close(torch.nn.functional.normalize(words), out.text_embeds)
    torch.testing.assert_close(torch.nn.functional.normalize(pictures), out.image_embeds)


def test_a_classifier_trains_with_the_tower(tmp_path):
    config = make_moe_clip(num_labels=3).config
    torch.manual_seed(0)
    model = MoeClipForImageClassification(config).train()
    out = model(clip_inputs()["pixel_values"], labels=torch.tensor([0, 1, 2, 0]))
    out.loss.backward()
    assert model.vision_model.encoder.layers[0].mlp.gate.weight.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = clip_inputs()["pixel_values"]
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_training_reduces_the_contrastive_loss():
    model, inputs = make_moe_clip().train(), clip_inputs(batch=6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("router_type", sorted(set(list_routers()) - {"expert_choice", "hash"}))
def test_every_router_without_token_ids_works_in_both_towers(router_type):
    fields = {"router_type": router_type}
    if router_type == "fixed_random":
        fields["router_aux_loss_coef"] = 0.0
    model = make_moe_clip(text=fields, vision=fields).train()
    out = model(**clip_inputs(padded=True), return_loss=True)
    out.loss.backward()
    assert out.loss.isfinite()
    assert torch.isfinite(similarity(model.eval())).all()


def test_gradient_checkpointing_and_compilation_change_nothing():
    inputs, grads = clip_inputs(padded=True), []
    for checkpointing in (False, True):
        model = make_moe_clip().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**inputs, return_loss=True).loss.backward()
        grads.append(model.vision_model.encoder.layers[0].mlp.experts.up_proj.grad)
    torch.testing.assert_close(*grads)
    model = make_moe_clip()
    compiled = torch.compile(model.vision_model, backend="eager")
    torch.testing.assert_close(
        compiled(inputs["pixel_values"]).pooler_output, model.vision_model(inputs["pixel_values"]).pooler_output
    )


def test_half_precision_stays_close():
    model = make_moe_clip()
    expected, inputs = similarity(model), clip_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    half = similarity(model.to(torch.bfloat16), **inputs)
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.5)


def test_the_image_tower_serves_llava(tmp_path):
    tower = MoeClipVisionModel(MoeClipVisionConfig(**VISION, expert_dropout=0.0)).eval()
    sizes = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = LlavaConfig(
        vision_config=tower.config,
        text_config={"model_type": "llama", **sizes, "num_attention_heads": 2},
        image_token_index=END,
        image_seq_length=4,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    ids = torch.tensor([[5, END, END, END, END, 7]])
    pixels = clip_inputs(1)["pixel_values"]
    logits = llava(input_ids=ids, pixel_values=pixels).logits
    llava.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(loaded.model.vision_tower, MoeClipVisionModel)
    assert torch.equal(loaded(input_ids=ids, pixel_values=pixels).logits, logits)


def test_the_image_tower_serves_moe_llava(tmp_path):
    """A CLIP-MoE of copies in the place of a LLaVA's CLIP, then the language model sparse too: the same function."""
    dense, clip = dense_llava(vision=VISION), make_clip()
    dense.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    tower = upcycle_clip(clip, num_experts=4).vision_model
    sparse = dense_llava(vision=tower.config.to_dict())
    sparse.load_state_dict(dense.state_dict(), strict=False)
    sparse.model.vision_tower.load_state_dict(tower.state_dict())
    model, _ = upcycle_llava(sparse.eval())
    inputs = llava_inputs()
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(logits, dense(**inputs).logits, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert isinstance(loaded, MoeLlavaForConditionalGeneration)
        assert isinstance(loaded.model.vision_tower, MoeClipVisionModel)
        assert torch.equal(loaded(**inputs).logits, logits)
    assert [len(layers) for layers in (moe_layers(model.model.vision_tower), moe_layers(model))] == [3, 5]


def test_the_zero_shot_pipeline_takes_it(tmp_path, tiny_tokenizer):
    from PIL import Image

    tiny_tokenizer.add_special_tokens({"eos_token": "</s>"})
    end = tiny_tokenizer.eos_token_id
    model = make_moe_clip(text={"vocab_size": len(tiny_tokenizer), "eos_token_id": end, "max_position_embeddings": 64})
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**size).save_pretrained(tmp_path)
    classify = pipeline(
        "zero-shot-image-classification",
        model=str(tmp_path),
        image_processor=CLIPImageProcessorPil.from_pretrained(tmp_path),
    )
    found = classify(Image.new("RGB", (20, 18), (200, 30, 30)), candidate_labels=["the old mill", "a river"])
    assert sorted(row["label"] for row in found) == ["a river", "the old mill"]
    assert sum(row["score"] for row in found) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": {"num_experts_per_tok": 9}}, "`num_experts_per_tok` must be between 1 and the number of experts"),
        ({"vision": {"router_type": "hash"}}, "reads token ids, which image patches have not"),
        ({"vision": {"expert_dropout": 1.0}}, "`expert_dropout` must be at least 0 and below 1, got 1.0"),
        ({"text": {"moe_layers": "none"}, "vision": {"moe_layers": "none"}}, "leaves both towers dense"),
    ],
)
def test_wrong_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_moe_clip(**fields)


def test_one_tower_may_stay_dense():
    model = make_moe_clip(text={"moe_layers": "none"}).train()
    out = model(**clip_inputs(), return_loss=True)
    assert not out.text_router_logits and out.aux_loss > 0
    assert MoeClipConfig(text_config=TEXT, vision_config={**VISION, "moe_layers": [1]}).experts_per_layer == [4] * 3
