"""The papers behind the methods: arXiv number to title, authors and BibTeX entry."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import yaml


__all__ = ["Paper", "find_papers", "list_papers"]

ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


@dataclass(frozen=True)
class Paper:
    """One paper.

    Args:
        arxiv (`str`): Number on arXiv, such as `"2410.07348"`.
        title (`str`): Its title; the number again if it is not in `papers.yaml`.
        authors (`str`): BibTeX's author field, may be empty.
        year (`int`, *optional*): Of the first version.
    """

    arxiv: str
    title: str
    authors: str = ""
    year: int | None = None

    @property
    def url(self) -> str:
        """Its page on the Hub."""
        return f"https://huggingface.co/papers/{self.arxiv}"

    @property
    def bibtex(self) -> str:
        """An entry for a bibliography."""
        fields = {"title": self.title, "author": self.authors, "year": self.year}
        fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
        family_name = (self.authors.split(" and ")[0].split() or ["arxiv"])[-1]
        key = re.sub(r"\W", "", f"{family_name}{self.year or ''}{self.title.split()[0]}").lower()
        return "\n".join([f"@misc{{{key},", *lines, "}"])


@functools.cache
def list_papers() -> dict[str, Paper]:
    """Every paper of `papers.yaml` by arXiv number.

    Returns:
        `dict[str, Paper]`: In the file's order.

    Example:
        ```python
        list_papers()["2410.07348"].title
        ```
    """
    entries = yaml.safe_load((Path(__file__).parent / "papers.yaml").read_text(encoding="utf-8"))
    return {number: Paper(number, **entry) for number, entry in entries.items()}


def find_papers(text: str | None) -> list[Paper]:
    """The papers a text mentions by arXiv number, in order and once each.

    Args:
        text (`str`, *optional*): A docstring, for example.

    Returns:
        `list[Paper]`: Numbers that are not in `papers.yaml` come without title.

    Example:
        ```python
        find_papers("MoE++ (2410.07348, Eq. 6)")[0].title
        ```
    """
    numbers = dict.fromkeys(ARXIV.findall(text or ""))
    return [list_papers().get(number) or Paper(number, f"arXiv {number}") for number in numbers]
