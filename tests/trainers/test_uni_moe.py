"""The phases of Uni-MoE's training."""

import pytest
import torch
from common.tiny_uni_moe import inputs_of, uni_moe
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_moe.trainers import set_uni_moe_stage, uni_moe_lora_config


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
