import json
import weakref
from functools import partial

import pytest
import torch
from common.tiny_families import tiny_model
from torch.utils.data import DataLoader
from transformers.utils import logging

from hf_moe import attribute_experts, moe_layers
from hf_moe.attribution import ExpertScores, _Totals, pad_token_rows
from hf_moe.views import LayerRecord, record_routing


FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "moe_llama", "moe_plus_plus")


def rows(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 384, (n,), generator=generator).tolist()} for n in lengths]


def attribute(model, data, **options):
    return attribute_experts(model, data, show_progress=False, **options)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_mean_within_a_sequence_comes_before_the_mean_over_sequences():
    (view,) = moe_layers(tiny_model("mixtral", num_local_experts=3, num_hidden_layers=1))
    weights = torch.tensor([[0.6, 0.4], [0.5, 0.5], [1.0, 0.0], [0.9, 0.1]])  # the last token is padding
    index = torch.tensor([[0, 1], [1, 2], [0, 1], [2, 1]])
    totals = _Totals([view])
    totals.add([LayerRecord(view, [torch.zeros(4, 3)], [weights], [index])], torch.tensor([[1, 1], [1, 0]]).bool())
    scores = totals.scores()
    assert scores.layers[view.name] == pytest.approx([0.65, 0.225, 0.125])  # pooled tokens: 0.533, 0.300, 0.167
    assert (scores.num_sequences, scores.num_tokens) == (2, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_weights_the_experts_receive(family):
    model, data = tiny_model(family), rows(7, 3, 5)
    expected = {view.name: torch.zeros(view.num_computing_experts) for view in moe_layers(model)}

    def note(name, _module, args):
        _, index, weights = args
        for expert in range(len(expected[name])):
            weight = weights.masked_fill(index != expert, 0.0).sum()
            expected[name][expert] += weight / len(index) / len(data)

    handles = [view.experts.register_forward_pre_hook(partial(note, view.name)) for view in moe_layers(model)]
    for row in data:
        with torch.no_grad():
            model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    scores = attribute(model, data)
    assert scores.layers.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(scores.layers[name]), values, rtol=1e-4, atol=1e-6)


def test_only_routed_experts_with_weights_have_scores():
    deepseek = tiny_model("deepseek_v3")  # the first layer is dense, the others have a shared expert
    assert {name: len(s) for name, s in attribute(deepseek, rows(4)).layers.items()} == {
        f"model.layers.{i}.mlp": 8 for i in (1, 2, 3)
    }
    plus = tiny_model("moe_plus_plus")
    view = moe_layers(plus)[0]
    assert len(attribute(plus, rows(4)).layers[view.name]) == view.num_computing_experts < view.num_experts


def test_padding_does_not_count():
    model, data = tiny_model("mixtral"), rows(3, 9)
    apart = [attribute(model, [row]) for row in data]
    together = attribute(model, data, batch_size=2)
    for name, values in together.layers.items():
        alone = [torch.tensor(scores.layers[name]) for scores in apart]
        torch.testing.assert_close(torch.tensor(values), torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6)


def test_loader_batches_and_rows_agree():
    model, data = tiny_model("mixtral"), rows(3, 9, 4)
    loader = DataLoader(data, batch_size=2, collate_fn=pad_token_rows)
    expected = attribute(model, data, batch_size=2).layers
    assert attribute(model, loader).layers == expected
    assert attribute(model, list(loader)).layers == expected


def test_one_expert_per_token_is_a_share_of_tokens():
    model = tiny_model("mixtral", num_experts_per_tok=1)
    for values in attribute(model, rows(6, 6)).layers.values():
        assert sum(values) == pytest.approx(1.0)


def test_reads_no_more_than_asked_and_keeps_no_batch():
    model, alive = tiny_model("mixtral", num_hidden_layers=1), []

    def stream():
        for seed in range(50):
            batch = pad_token_rows(rows(5, 5, seed=seed))
            alive.append(weakref.ref(batch["input_ids"]))
            assert sum(ref() is not None for ref in alive) <= 3
            yield batch

    assert attribute(model, stream(), n_tokens=41).num_tokens == 50
    assert len(alive) == 6  # the sixth tells that the fifth was enough


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path):
    model, batches = tiny_model("mixtral"), [pad_token_rows(rows(5, 3, seed=seed)) for seed in range(6)]

    def breaking():
        yield from batches[:4]
        raise KeyboardInterrupt

    state = tmp_path / "deep" / "state.json"
    with pytest.raises(KeyboardInterrupt):
        attribute(model, breaking(), state_path=state, save_every=3)
    assert json.loads(state.read_text())["batches"] == 4
    resumed = attribute(model, batches, resume_from=state)
    assert resumed.layers == attribute(model, batches).layers
    assert [path.name for path in state.parent.iterdir()] == ["state.json"]
    with pytest.raises(ValueError, match="was written for a model with other MoE layers"):
        attribute(tiny_model("mixtral", num_hidden_layers=1), batches, resume_from=state)
    state.write_text("{}")
    with pytest.raises(ValueError, match=r"`resume_from` .* is no state"):
        attribute(model, batches, resume_from=state)


def test_the_bar_counts_tokens(capfd, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    attribute_experts(tiny_model("mixtral", num_hidden_layers=1), rows(8, 8), n_tokens=16)
    assert "16/16" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "holds no token"),
        (
            [{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4)}],
            ValueError,
            "Batch 0 of `data` is nothing but padding",
        ),
        ([{"text": "a"}], TypeError, "need a column `input_ids`"),
        (iter([{"text": "a"}]), TypeError, "Batches of `data` need `input_ids`"),
        (
            [{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 1, 4, 4)}],
            ValueError,
            "attribution needs a mask of tokens",
        ),
    ],
)
def test_bad_data_are_refused_and_the_model_is_as_it_was(data, error, message):
    model = tiny_model("mixtral").train()
    model.model.layers[0].eval()
    modes, count = [m.training for m in model.modules()], hooks(model)
    with pytest.raises(error, match=message):
        attribute(model, data)
    assert [m.training for m in model.modules()] == modes and hooks(model) == count


def test_a_dense_model_and_bad_numbers_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="has no MoE layer"):
        attribute(tiny_llama, rows(4))
    model = tiny_model("mixtral", num_hidden_layers=1)
    for name in ("n_tokens", "batch_size", "save_every"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            attribute(model, rows(4), **{name: 0})


def test_a_failing_forward_leaves_no_hook():
    model = tiny_model("mixtral")
    count = hooks(model)
    with pytest.raises(IndexError):
        attribute(model, [{"input_ids": [10**6]}])
    assert hooks(model) == count and not model.training
    with record_routing(model):
        assert hooks(model) > count


def test_best_experts_over_all_layers_or_in_the_best_one():
    scores = ExpertScores({"a": [0.5, 0.1, 0.2], "b": [0.45, 0.4, 0.4]}, 2, 9)
    assert [(s.layer, s.expert) for s in scores] == [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("a", 2), ("a", 1)]
    assert scores.best() == [("a", 0, 0.5)]
    assert scores.targets(3, same_layer=False) == {"a": [0], "b": [0, 1]}
    assert scores.targets(2) == {"a": [0, 2]}
    with pytest.raises(ValueError, match=r"the experts of layer 'a' \(3\), got 4"):
        scores.best(4, same_layer=True)
    with pytest.raises(ValueError, match=r"number of all experts \(6\), got 0"):
        scores.best(0)


def test_scores_survive_their_file(tmp_path):
    scores = ExpertScores({"a": [0.5, 1 / 3]}, 2, 9)
    again = ExpertScores.from_json(scores.to_json(tmp_path / "scores.json"))
    assert (again.layers, again.num_sequences, again.num_tokens) == (scores.layers, 2, 9)
    assert repr(again) == repr(scores) and len(again) == 2
