"""Routing shift: hand-made snapshots with known answers, then models."""

import json
import math

import pytest
import torch
from common.tiny_families import tiny_model

import hf_moe
from hf_moe.reporting import LayerSnapshot, RoutingSnapshot, routing_shift, routing_snapshot
from hf_moe.reporting.shift import SHIFT_FILES


TEXTS = [
    "The river runs past the old mill and down to the sea.",
    "A miller kept three cats.",
    "def add(a, b): return a",
]


def snapshot(index, probabilities, name="A", tokens=None):
    index = torch.tensor(index, dtype=torch.int16)
    n = len(probabilities[0])
    layer = LayerSnapshot(
        "mlp", n, [str(i) for i in range(n)], index, torch.tensor(probabilities, dtype=torch.float16)
    )
    return RoutingSnapshot(name, torch.arange(len(index)) if tokens is None else tokens, [layer])


def test_shares_by_hand():
    a = snapshot([[0, 1], [0, 1]], [[0.5, 0.5, 0, 0], [0.75, 0.25, 0, 0]])
    b = snapshot([[1, 0], [0, 2]], [[0.25, 0.75, 0, 0], [0.75, 0, 0.25, 0]], "B")
    shift = routing_shift(a, b)
    layer = shift.layers[0]
    assert shift.paired and (shift.tokens_a, shift.tokens_b) == (2, 2)
    assert layer.load_a == [0.5, 0.5, 0, 0] and layer.load_b == [0.5, 0.25, 0.25, 0]
    assert layer.load_shift == 0.25
    assert layer.selection_shift == 0.25  # one of the four chosen experts; the order of the slots means nothing
    assert layer.best_shift == 0.5
    assert layer.token_shift == pytest.approx(0.25)
    assert layer.probability_shift == pytest.approx(0.125)  # (.625, .375, 0, 0) and (.5, .375, .125, 0)


def test_opposite_moves_hide_in_the_load_but_not_in_the_selection():
    p = [[0.5, 0.5], [0.5, 0.5]]
    layer = routing_shift(snapshot([[0], [1]], p), snapshot([[1], [0]], p)).layers[0]
    assert (layer.load_shift, layer.selection_shift) == (0, 1)


def test_empty_slots_are_no_experts():
    p = [[0.5, 0.5]] * 3
    layer = routing_shift(snapshot([[0, 2], [0, 1], [2, 2]], p), snapshot([[0, 1], [0, 2], [2, 2]], p)).layers[0]
    assert layer.selection_shift == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert sum(layer.load_a) == pytest.approx(1)


def test_other_tokens_are_compared_as_a_whole_only():
    p = [[1.0, 0.0]] * 2
    shift = routing_shift(snapshot([[0], [0]], p), snapshot([[1]], [[0.0, 1.0]]))
    assert not shift.paired and (shift.tokens_a, shift.tokens_b) == (2, 1)
    assert shift.layers[0].selection_shift is None and shift.layers[0].token_shift is None
    assert shift.layers[0].load_shift == shift.layers[0].probability_shift == 1
    assert set(shift.metrics()) == {"load_shift", "probability_shift", "load_shift_worst_layer"}


def test_a_model_has_not_shifted_from_itself_whatever_the_batches(tiny_tokenizer):
    model = tiny_model("qwen3_moe")
    a = routing_snapshot(model, tiny_tokenizer, TEXTS)
    b = routing_snapshot(model, tiny_tokenizer, iter(TEXTS))
    assert set(routing_shift(a, b).metrics().values()) == {0.0}
    assert a.num_tokens == sum(len(tiny_tokenizer(text)["input_ids"]) for text in TEXTS)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "moe_llama", "moe_plus_plus"])
def test_a_snapshot_is_what_the_router_decided(family, tiny_tokenizer):
    model = tiny_model(family)
    taken = routing_snapshot(model, tiny_tokenizer, TEXTS[:1])
    with torch.no_grad(), hf_moe.record_routing(model) as recorder:
        model(**tiny_tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False))
    for layer, record in zip(taken.layers, recorder.layers, strict=True):
        assert torch.equal(layer.index.long(), record.top_k_index[0])
        p = record.view.probabilities(record.router_logits[0])
        torch.testing.assert_close(layer.probabilities.float(), p.float(), atol=1e-3, rtol=1e-3)


def test_a_rotated_router_shifts_every_choice(tiny_tokenizer):
    model = tiny_model("mixtral", num_experts_per_tok=1)
    before = routing_snapshot(model, tiny_tokenizer, TEXTS)
    view = hf_moe.moe_layers(model)[-1]
    with torch.no_grad():  # expert i takes the tokens of expert i - 1
        view.router.weight.copy_(view.router.weight.roll(1, dims=0))
    shift = routing_shift(before, routing_snapshot(model, tiny_tokenizer, TEXTS))
    assert [layer.selection_shift for layer in shift.layers] == [0, 0, 0, 1]
    assert shift.layers[-1].load_b == pytest.approx(torch.tensor(shift.layers[-1].load_a).roll(1).tolist())
    assert shift.metrics()["selection_shift_worst_layer"] == 1
    assert shift.metrics()["selection_shift"] == 0.25


def test_models_of_other_sizes_are_refused(tiny_tokenizer):
    four = routing_snapshot(tiny_model("mixtral"), tiny_tokenizer, TEXTS, name="four")
    two = routing_snapshot(tiny_model("mixtral", num_hidden_layers=2), tiny_tokenizer, TEXTS, name="two")
    with pytest.raises(ValueError, match="'four' has 4 MoE layers and 'two' 2: their routing cannot be compared"):
        routing_shift(four, two)
    wide = routing_snapshot(tiny_model("mixtral", num_local_experts=6), tiny_tokenizer, TEXTS, name="wide")
    with pytest.raises(ValueError, match=r"has 8 experts in 'model.layers.0.mlp' and 'wide' 6"):
        routing_shift(four, wide)


def test_no_text_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="`texts` holds no token"):
        routing_snapshot(tiny_model("mixtral"), tiny_tokenizer, [""])
    with pytest.raises(ValueError, match="`max_tokens` must be at least 1, got 0"):
        routing_snapshot(tiny_model("mixtral"), tiny_tokenizer, TEXTS, max_tokens=0)


@pytest.mark.parametrize("paired", [True, False])
def test_saved_shift_is_complete(paired, tmp_path, tiny_tokenizer):
    model = tiny_model("mixtral")
    a = routing_snapshot(model, tiny_tokenizer, TEXTS, name="first")
    b = routing_snapshot(model, tiny_tokenizer, TEXTS if paired else TEXTS[:1], name="second")
    folder = routing_shift(a, b).save(tmp_path / "shift")
    assert sorted(path.name for path in folder.iterdir()) == sorted(SHIFT_FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["shift"]
    content = json.loads((folder / "shift.json").read_text())
    assert content["paired"] is paired and len(content["layers"]) == 4
    assert all(math.isfinite(value) for value in content["metrics"].values())
    page = (folder / "shift.md").read_text()
    assert "A: first" in page and "B: second" in page and "(routing_shift.png)" in page
    assert ("Selection shift" in page) is paired
