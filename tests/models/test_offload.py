"""Models whose layers live partly on disk give the same numbers, router state included."""

import pytest
import torch
from common.model_battery import TYPES, make_inputs, make_model
from transformers import AutoModelForCausalLM


every_type = pytest.mark.parametrize("model_type", TYPES)
MIXED = {"num_hidden_layers": 3, "moe_layers": [0, 2], "num_shared_experts": 1}


def device_map(model, places) -> dict[str, str]:
    """Every child of the base model on the CPU, its layers at `places`."""
    base, prefix = model.base_model, model.base_model_prefix
    spread = {"lm_head": "cpu"}
    for name, _ in base.named_children():
        if name == base.layers_attribute:
            spread |= {f"{prefix}.{name}.{i}": place for i, place in enumerate(places)}
        else:
            spread[f"{prefix}.{name}"] = "cpu"
    return spread


@pytest.fixture
def saved(model_type, tmp_path):
    model = make_model(model_type, **MIXED)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model", {"offload_folder": tmp_path / "offload"}


def assert_same_outputs(actual, expected):
    inputs = make_inputs(padding="left")
    a, e = actual(**inputs, output_router_logits=True), expected(**inputs, output_router_logits=True)
    torch.testing.assert_close(a.logits, e.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.aux_loss, e.aux_loss)
    assert all(torch.equal(x, y) for x, y in zip(a.router_indices, e.router_indices, strict=True))
    ids = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (actual, expected)]
    assert torch.equal(*ids)


@every_type
@pytest.mark.parametrize("places", [("cpu", "disk", "disk"), ("disk", "cpu", "cpu")], ids="-".join)
def test_layers_on_disk_give_the_same_outputs(model_type, places, saved):
    model, folder, options = saved
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map(model, places), **options)
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert_same_outputs(offloaded, model)


@every_type
def test_an_automatic_map_keeps_layers_whole(model_type, saved):
    model, folder, options = saved
    layer = getattr(model.base_model, model.base_model.layers_attribute)[0]
    whole, part = (sum(p.numel() * 4 for p in module.parameters()) for module in (model, layer))
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": int(whole - 0.3 * part)}, **options
    )
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    layers = f".{model.base_model.layers_attribute}."
    assert not any(name.count(".") > 2 for name in offloaded.hf_device_map if layers in name)
    assert_same_outputs(offloaded, model)


@every_type
def test_a_map_that_forgets_the_load_balancer_is_no_problem(model_type, saved):
    model, folder, options = saved
    places = device_map(model, ("cpu", "disk", "cpu"))  # as one written for the dense model
    del places[f"{model.base_model_prefix}.load_balancer"]
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, **options)
    assert_same_outputs(offloaded, model)


@every_type
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_an_offloaded_model_can_be_saved(model_type, saved, tmp_path):
    model, folder, options = saved
    places = device_map(model, ("cpu", "disk", "disk"))
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, **options)
    offloaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
