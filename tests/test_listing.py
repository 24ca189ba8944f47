"""`hf-moe list`: everything that is registered, with papers."""

import json

import pytest

from hf_moe.cli import main
from hf_moe.experts.registry import list_experts
from hf_moe.listing import KINDS, _first_sentence, list_everything
from hf_moe.model_cards import list_papers
from hf_moe.models import MODEL_TYPES
from hf_moe.routing.registry import list_routers


def test_everything_registered_is_listed_with_a_summary():
    found = list_everything()
    assert list(found) == list(KINDS)
    assert [entry.name for entry in found["types"]] == sorted([*MODEL_TYPES, "upcycled_<type>"])
    assert [entry.name for entry in found["routers"]] == list_routers()
    assert [entry.name for entry in found["experts"]] == list_experts()
    for entries in found.values():
        assert entries
        for entry in entries:
            assert 0 < len(entry.summary) < 400, entry


def test_every_paper_that_is_named_is_in_the_bibliography():
    named = {number for entries in list_everything().values() for entry in entries for number in entry.papers}
    assert "2410.07348" in named
    assert named <= set(list_papers())


def test_the_table_and_the_json_say_the_same(capsys):
    assert main(["list", "routers", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in data["routers"]] == list_routers()
    assert main(["list", "routers"]) == 0
    text = capsys.readouterr().out
    for entry in data["routers"]:
        assert entry["name"] in text and all(number in text for number in entry["papers"])
    for title in data["papers"].values():
        assert title in text


def test_an_unknown_kind_is_named_with_those_there_are(capsys):
    assert main(["list", "cakes"]) == 2
    assert "got 'cakes'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`kind` must be one of"):
        list_everything(("cakes",))


def test_a_first_sentence_does_not_end_at_an_abbreviation():
    assert _first_sentence("As in Eq. 2 of v0.1 (cf. Sec. 3). More.\n\nElse.") == "As in Eq. 2 of v0.1 (cf. Sec. 3)."
    assert _first_sentence("Eq. Two holds. Then") == "Eq. Two holds."
    assert _first_sentence("No stop") == "No stop"
