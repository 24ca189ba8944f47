"""The short cards of the registered model types: one file per type in `types/`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .bibliography import Paper, find_papers


__all__ = ["Card", "TypeCard", "list_type_cards", "read_card", "type_card"]

FOLDER = Path(__file__).parent / "types"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What every card file says.

    Args:
        title (`str`): A reader's name for the thing.
        summary (`str`): One sentence.
        papers (`tuple[Paper, ...]`): Its own paper first.
        body (`str`): Markdown below the metadata.
    """

    title: str
    summary: str
    papers: tuple[Paper, ...]
    body: str


@dataclass(frozen=True, kw_only=True)
class TypeCard(Card):
    """The card of a registered model type.

    Args:
        model_type (`str`): The registered type; `"upcycled_<type>"` for those made on demand.
    """

    model_type: str


def list_type_cards() -> list[str]:
    """Model types that have a card of their own, sorted, and `"upcycled"` for those made on demand.

    Returns:
        `list[str]`: File names without ending.

    Example:
        ```python
        list_type_cards()  # ['moe_gpt2', 'moe_llama', ..., 'upcycled']
        ```
    """
    return sorted(path.stem for path in FOLDER.glob("*.md"))


def type_card(model_type: str) -> TypeCard:
    """Read the card of a type.

    Args:
        model_type (`str`): Such as `"moe_llama"` or `"upcycled_gemma2"`.

    Returns:
        [`TypeCard`]

    Raises:
        ValueError: There is no card for this type.

    Example:
        ```python
        type_card("moe_plus_plus").papers[0].bibtex
        ```
    """
    # `upcycled_gemma2` and its like exist for every dense type; they share a card
    name = "upcycled" if model_type.startswith("upcycled_") else model_type
    if name not in list_type_cards():
        raise ValueError(f"`model_type={model_type!r}` has no card. Cards: {list_type_cards()}.")
    return TypeCard(**read_card(FOLDER / f"{name}.md"))


def read_card(path: Path) -> dict[str, Any]:
    """The parts of a card file.

    Args:
        path (`Path`): The file.

    Returns:
        `dict`: Its metadata, with `papers` found in the bibliography, and the Markdown below as `body`.
    """
    _, metadata, body = path.read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(metadata)
    return {**fields, "papers": tuple(find_papers(" ".join(fields["papers"]))), "body": body.strip() + "\n"}
