"""Every registered type has a card, and what the cards show runs."""

import re

import pytest

import hf_moe
from hf_moe.model_cards import find_papers, list_papers, list_type_cards, type_card
from hf_moe.models import MODEL_TYPES


def test_every_registered_type_has_a_card_and_every_card_a_type():
    assert list_type_cards() == sorted([*MODEL_TYPES, "upcycled"])


@pytest.mark.parametrize("model_type", list_type_cards())
def test_a_card_names_its_type_classes_and_known_papers(model_type):
    card = type_card(model_type)
    assert card.model_type == ("upcycled_<type>" if model_type == "upcycled" else model_type)
    assert f"(`{card.model_type}`)" in card.body and card.summary in card.body
    assert card.papers and all(paper.arxiv in list_papers() for paper in card.papers)
    for name in re.findall(r"`(Moe\w+)`", card.body):
        assert isinstance(getattr(hf_moe, name), type)


@pytest.mark.parametrize("model_type", list_type_cards())
def test_the_example_of_a_card_runs(model_type):
    namespace = {}
    exec(re.search(r"```python\n(.*?)```", type_card(model_type).body, re.DOTALL)[1], namespace)
    if model_type != "upcycled":
        assert namespace["model"].config.model_type == model_type


def test_a_type_made_on_demand_has_the_shared_card():
    assert type_card("upcycled_gemma2") == type_card("upcycled")


def test_an_unknown_type_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"`model_type='moe_nothing'` has no card. Cards: \['dynamic_moe'"):
        type_card("moe_nothing")


def test_papers_are_found_in_text_once_and_in_order():
    papers = find_papers("as in 2410.07348, 2101.03961 (Eq. 2) and 2410.07348; 1234.56789 is not ours")
    assert [paper.arxiv for paper in papers] == ["2410.07348", "2101.03961", "1234.56789"]
    assert papers[0].title.startswith("MoE++") and papers[2].title == "arXiv 1234.56789"
    assert papers[0].url == "https://huggingface.co/papers/2410.07348"
    assert find_papers(None) == []


def test_bibliography_entries_are_complete_and_their_keys_differ():
    papers = list_papers().values()
    assert all(re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv) and paper.authors and paper.year for paper in papers)
    assert all(paper.year == 2000 + int(paper.arxiv[:2]) for paper in papers)
    assert len({paper.bibtex.splitlines()[0] for paper in papers}) == len(papers)
