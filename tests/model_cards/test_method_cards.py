"""Every method has a card, what the cards show is valid, and what they name exists."""

import re

import pytest

import hf_moe
import hf_moe.trainers
from hf_moe.adapters import ADAPTER_FOLDERS
from hf_moe.model_cards import list_method_cards, list_papers, method_card


def test_every_adapter_has_a_card():
    assert set(ADAPTER_FOLDERS) - {"expert_slice"} <= set(list_method_cards())  # the slice is in unlearning's card


@pytest.mark.parametrize("name", list_method_cards())
def test_a_card_names_its_method_and_known_papers(name):
    card = method_card(name)
    assert card.name == name
    assert card.body.startswith(f"# {card.title}") and card.summary in card.body
    assert card.papers and all(paper.arxiv in list_papers() for paper in card.papers)


@pytest.mark.parametrize("name", list_method_cards())
def test_the_code_of_a_card_is_valid_and_its_names_exist(name):
    blocks = re.findall(r"```python\n(.*?)```", method_card(name).body, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, name, "exec")
        for module, names in re.findall(r"from (hf_moe[\w.]*) import ([\w, ]+)", block):
            source = hf_moe.trainers if module == "hf_moe.trainers" else __import__(module, fromlist=["_"])
            assert all(hasattr(source, each.strip()) for each in names.split(",")), names
        assert all(hasattr(hf_moe, each) for each in re.findall(r"\bhf_moe\.(\w+)", block))


def test_an_unknown_method_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"`name='nothing'` has no card. Cards: \['"):
        method_card("nothing")
