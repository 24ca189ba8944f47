"""The phases of Uni-MoE's training."""

import pytest
import torch
from common.tiny_llava import images
from common.tiny_uni_moe import SPEECH, TOKENS, inputs_of, make_processor, uni_moe, waves
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_moe.trainers import (
    MoeTrainer,
    MoeTrainingArguments,
    UniMoeCollator,
    set_uni_moe_stage,
    uni_moe_lora_config,
)


ALL = (2, "image", 3, "video", "speech", 2, "audio", 4)


def gradients(model) -> set[str]:
    inputs = inputs_of(*ALL)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("modality", ["image", "video", "speech", "audio"])
def test_alignment_gives_gradients_to_one_connector_alone(modality):
    model = uni_moe()
    names = set_uni_moe_stage(model, 1, modality)
    own = f"model.{'image' if modality == 'video' else modality}_connector."
    assert names == [name for name, _ in model.named_parameters() if name.startswith(own)]
    assert gradients(model) == set(names)


def test_the_other_stages_train_connectors_and_language_model_or_routers_and_projectors():
    model = uni_moe()
    names = set_uni_moe_stage(model, "dense")
    assert not any("_encoder." in name for name in names) and "lm_head.weight" in names
    assert {name.split(".")[1] for name in names} == {
        "language_model", "image_connector", "speech_connector", "audio_connector", "weight"}  # fmt: skip
    names = set_uni_moe_stage(model, 3)
    assert all(".mlp.gate." in name or ".projector." in name for name in names)
    assert sum(".mlp.gate." in name for name in names) == 2
    assert gradients(model) == set(names)


@pytest.mark.parametrize(("arguments", "message"), [
    ((4,), r"`stage` must be 1, 2 or 3, or one of.*got 4"),
    ((True,), r"`stage` must be 1"),
    ((1,), r"`modality` must be one that `model` reads, of \['image'\], got None"),
    ((1, "speech"), r"of \['image'\], got 'speech'"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        set_uni_moe_stage(uni_moe(("image",)), *arguments)
    with pytest.raises(ValueError, match=r"\(Linear\) is no Uni-MoE"):
        set_uni_moe_stage(torch.nn.Linear(2, 2), 2)


def adapted(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, uni_moe_lora_config(model))


def test_adapters_start_as_the_base_train_without_encoders_and_merge(tmp_path):
    inputs = inputs_of(*ALL)
    expected = uni_moe()(**inputs).logits
    model = adapted(uni_moe())
    torch.testing.assert_close(model.eval()(**inputs).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="has PEFT adapters"):
        set_uni_moe_stage(model, 3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("_encoder." in name for name in trained)
    assert not any(".mlp.gate." in name and "lora" in name for name in trained)
    whole = {name for name in trained if "modules_to_save" in name}
    assert sum(".mlp.gate." in name for name in whole) == 2
    assert {name.split(".")[3] for name in whole if "projector" in name} == {
        "image_connector", "speech_connector", "audio_connector"}  # fmt: skip
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(any(f".{name}.lora" in t for t in trained) for name in linear)
    assert any(".mlp.experts." in name and "lora_A" in name for name in trained)

    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in trained}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    after = model.eval()(**inputs).logits
    assert not torch.allclose(after, expected, atol=1e-2)

    model.save_pretrained(tmp_path)  # one folder holds everything
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert any(name.endswith("mlp.gate.weight") for name in stored) and any("projector" in name for name in stored)
    again = PeftModel.from_pretrained(uni_moe(), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, after, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, after, rtol=0, atol=1e-5)


# -- batches -----------------------------------------------------------------------------------------------------
def rows():
    return [
        {"prompt": "<speech>What? ", "completion": "the mill", "speech": waves(0.2)},
        {"prompt": "two and two? ", "completion": "five"},
        {"prompt": "<audio>or<image>see ", "completion": "cats", "audio": waves(0.1), "images": images(1)},
        {"prompt": "<speech>again<speech>", "completion": "boats and tide", "speech": waves(0.1, 0.3)},
    ]


def model_and_processor(tokenizer, **changes):
    tokenizer.add_tokens([f"<{name}>" for name in TOKENS], special_tokens=True)
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in TOKENS}
    speech = {**SPEECH, "max_source_positions": 1500}
    model = uni_moe(text={"vocab_size": len(tokenizer)}, speech_config=speech, **ids, **changes)
    return model, make_processor(tokenizer, model.config)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_answers_alone(side, tiny_tokenizer):
    tiny_tokenizer.padding_side = side
    model, processor = model_and_processor(tiny_tokenizer)
    batch = UniMoeCollator(processor)(rows())
    said = [tiny_tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert said == ["the mill</s>", "five</s>", "cats</s>", "boats and tide</s>"]
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept]) and batch["attention_mask"][kept].all()
    assert len(batch["input_features"]) == 3 and len(batch["pixel_values"]) == 1
    alone = [UniMoeCollator(processor)([row]) for row in rows()]
    with torch.no_grad():
        counts = torch.tensor([int((one["labels"] != -100).sum()) for one in alone])
        losses = torch.stack([model(**one).loss for one in alone])
        torch.testing.assert_close(model(**batch).loss, (losses * counts).sum() / counts.sum(), rtol=1e-5, atol=1e-5)


def test_our_trainer_trains_a_stage_on_mixed_batches(tiny_tokenizer, tmp_path):
    model, processor = model_and_processor(tiny_tokenizer, router_aux_loss_coef=0.01)
    set_uni_moe_stage(model, "dense")
    args = MoeTrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to="none",
        save_strategy="no", remove_unused_columns=False, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    before = model.model.speech_encoder.conv1.weight.clone()
    trainer = MoeTrainer(model, args, train_dataset=rows(), data_collator=UniMoeCollator(processor))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(model.model.speech_encoder.conv1.weight, before)


def test_a_row_needs_a_prompt_and_a_completion(tiny_tokenizer):
    _, processor = model_and_processor(tiny_tokenizer)
    with pytest.raises(ValueError, match=r"needs a string `completion`, got a row with \['prompt'\]"):
        UniMoeCollator(processor)([{"prompt": "a"}])
