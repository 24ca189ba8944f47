"""Tokens are sorted by what they look like; the tables of classes add up to the whole."""

import pytest
import torch
from common.tiny_families import tiny_model

import hf_moe
from hf_moe.reporting import routing_report, token_class
from hf_moe.reporting.group_plots import draw_classes, draw_positions
from hf_moe.reporting.groups import PositionCounts, loads_of, total_variation, weighted_shift
from hf_moe.reporting.markdown import render_markdown
from hf_moe.reporting.report import RoutingReport
from hf_moe.reporting.token_classes import (
    POSITION_BINS,
    POSITION_STARTS,
    TOKEN_CLASSES,
    class_of_each_id,
    position_bin,
    token_text,
)


TEXTS = [
    "The 3 rivers run past the old mill.",
    "def add(a, b):\n    return a + b",
    "A miller kept 12 cats; they kept mice.",
]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" river", "word"),
        ("ation", "word part"),
        (" l'eau", "word"),
        (" Ärger", "word"),
        ("河", "word part"),
        (" def", "keyword"),
        ("self", "keyword"),
        ("42", "number"),
        (" 7", "number"),
        ("²", "number"),
        (");", "punctuation"),
        (" ==", "punctuation"),
        ("'", "punctuation"),
        ("\n    ", "whitespace"),
        ("\ufffd", "other"),
        ("x1", "other"),
        ("", "other"),
    ],
)
def test_class_of(text, name):
    assert token_class(text) == name
    assert name in TOKEN_CLASSES


def test_special_tokens_are_a_class_whatever_the_user_says(tiny_tokenizer):
    found = class_of_each_id(tiny_tokenizer, range(384), lambda text: "mine")
    assert {i for i, name in found.items() if name == "special"} == set(tiny_tokenizer.all_special_ids)
    assert set(found.values()) == {"special", "mine"}


def test_a_class_that_is_no_name_is_refused(tiny_tokenizer):
    with pytest.raises(TypeError, match="`token_classes` must return the name of a class, got 3 for the token"):
        class_of_each_id(tiny_tokenizer, [50], lambda text: 3)


def test_the_space_that_decode_drops_is_kept():
    class Spelled:
        def decode(self, ids, **_):
            return "mill"

        def convert_ids_to_tokens(self, token_id):
            return "\u2581mill" if token_id else "mill"

    assert [token_text(Spelled(), i) for i in (0, 1)] == ["mill", " mill"]


def test_bins_begin_where_their_names_say():
    assert [POSITION_BINS[i] for i in position_bin(torch.tensor(POSITION_STARTS)).tolist()] == list(POSITION_BINS)
    assert [name.rstrip("+").split("-")[0] for name in POSITION_BINS] == [str(start) for start in POSITION_STARTS]
    assert position_bin(torch.tensor([3, 15, 5000])).tolist() == [1, 2, 6]


def test_positions_are_counted_without_empty_slots():
    counts = PositionCounts(3)
    counts.update(torch.tensor([0, 0, 2]), torch.tensor([[0, 1], [1, 3], [2, 3]]))
    assert counts.counts[[0, 2]].tolist() == [[1, 2, 0], [0, 0, 1]]
    assert counts.counts.sum() == 4


def test_the_shift_of_groups_is_what_must_move():
    assert total_variation([1.0, 0.0], [0.25, 0.75]) == 0.75
    loads = loads_of(["a", "b"], torch.tensor([[4, 0], [0, 4]]))
    assert loads == {"a": [1.0, 0.0], "b": [0.0, 1.0]}
    assert weighted_shift(loads, {"a": 3, "b": 1}, [0.75, 0.25]) == pytest.approx(0.75 * 0.25 + 0.25 * 0.75)
    assert weighted_shift({"a": [0.5, 0.5]}, {"a": 9}, [0.5, 0.5]) == 0
    assert loads_of(["none"], torch.zeros(1, 2)) == {"none": [0.0, 0.0]}


@pytest.fixture(scope="module")
def report(tiny_tokenizer_dir) -> RoutingReport:
    from transformers import AutoTokenizer

    return routing_report(tiny_model("mixtral"), AutoTokenizer.from_pretrained(tiny_tokenizer_dir), TEXTS * 4)


@pytest.mark.parametrize(("sizes", "loads"), [("token_classes", "class_load"), ("positions", "position_load")])
def test_groups_add_up_to_the_whole_text(report, sizes, loads):
    groups = getattr(report, sizes)
    assert sum(groups.values()) == report.num_tokens and len(groups) > 2
    for layer in report.layers:
        assert list(getattr(layer, loads)) == list(groups)
        for expert in range(layer.num_experts):
            together = sum(size * getattr(layer, loads)[name][expert] for name, size in groups.items())
            assert together * layer.active_experts == pytest.approx(layer.counts[expert])


def test_classes_stand_in_their_order(report):
    assert list(report.token_classes) == [name for name in TOKEN_CLASSES if name in report.token_classes]
    assert report.token_classes["number"] == 12


def test_a_router_that_reads_the_class_is_found(tiny_tokenizer):
    # One expert for digits, another one for the rest: the class says everything about the expert.
    model = tiny_model("mixtral", num_experts_per_tok=1, num_hidden_layers=1)
    view = hf_moe.moe_layers(model)[0]
    digits = torch.tensor([text.strip().isdigit() for text in map(tiny_tokenizer.decode, range(384))])
    tokens = {}
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: tokens.update(ids=args[0].flatten()))

    def replace(_module, _args, output):
        chosen = digits[tokens["ids"]].long().unsqueeze(-1)  # (T, 1)
        return output[0], output[1], chosen

    view.router.register_forward_hook(replace)
    report = routing_report(
        model, tiny_tokenizer, TEXTS, token_classes=lambda t: "digit" if t.strip().isdigit() else "rest"
    )
    share = report.token_classes["digit"] / report.num_tokens
    assert report.layers[0].class_load["digit"][1] == report.layers[0].class_load["rest"][0] == 1
    assert report.metrics()["class_shift"] == pytest.approx(2 * share * (1 - share))


def test_one_class_draws_nothing_and_shifts_nothing(tiny_tokenizer):
    report = routing_report(tiny_model("mixtral"), tiny_tokenizer, TEXTS * 4, token_classes=lambda text: "token")
    assert report.metrics()["class_shift"] == pytest.approx(0, abs=1e-6)
    assert draw_classes(report) is None
    assert "expert" in {axes.get_xlabel() for axes in draw_positions(report).axes}
    assert "Routing by class" not in render_markdown(report, {})
