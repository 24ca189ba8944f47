"""The cards of methods that are no model type (adapters, decoding, unlearning): one file per method in `methods/`."""

from dataclasses import dataclass
from pathlib import Path

from .type_cards import Card, read_card


__all__ = ["MethodCard", "list_method_cards", "method_card"]

FOLDER = Path(__file__).parent / "methods"


@dataclass(frozen=True, kw_only=True)
class MethodCard(Card):
    """The card of a method: use, settings, what was measured.

    Args:
        name (`str`): The method, as its folder or module is called.
    """

    name: str


def list_method_cards() -> list[str]:
    """Methods that have a card, sorted.

    Returns:
        `list[str]`: File names without ending.

    Example:
        ```python
        list_method_cards()  # [..., 'local_expert', ...]
        ```
    """
    return sorted(path.stem for path in FOLDER.glob("*.md"))


def method_card(name: str) -> MethodCard:
    """Read the card of a method.

    Args:
        name (`str`): Such as `"local_expert"`.

    Returns:
        [`MethodCard`]

    Raises:
        ValueError: There is no card of this name.

    Example:
        ```python
        method_card("local_expert").papers[0].url
        ```
    """
    if name not in list_method_cards():
        raise ValueError(f"`name={name!r}` has no card. Cards: {list_method_cards()}.")
    return MethodCard(**read_card(FOLDER / f"{name}.md"))
