"""`hf-moe list`: what this package knows, each thing with its paper. Read off the registries and the docstrings."""

import argparse
import importlib
import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass


__all__ = ["KINDS", "Entry", "add_arguments", "list_everything", "run"]

# Bases that a package exports for people who write their own; nothing one could choose by name.
BASE_CLASSES = ("ExpertBuilder", "RouterInit")


@dataclass(frozen=True)
class Entry:
    """One line of the list.

    Args:
        name (`str`): What the user writes.
        summary (`str`): One sentence.
        papers (`tuple[str, ...]`): arXiv numbers.
    """

    name: str
    summary: str
    papers: tuple[str, ...] = ()


def list_everything(kinds: tuple[str, ...] | None = None) -> dict[str, list[Entry]]:
    """The registered things by kind.

    Args:
        kinds (`tuple[str, ...]`, *optional*): Some of [`KINDS`]; all by default.

    Returns:
        `dict[str, list[Entry]]`: Sorted by name.

    Raises:
        ValueError: A kind is unknown.

    Example:
        ```python
        [entry.name for entry in list_everything(("routers",))["routers"]]
        ```
    """
    for kind in kinds or ():
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {list(KINDS)}, got {kind!r}.")
    return {kind: sorted(KINDS[kind](), key=lambda entry: entry.name) for kind in kinds or KINDS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-moe list`."""
    parser.add_argument("kind", nargs="?", help=f"one of {', '.join(KINDS)}; everything by default")
    parser.add_argument("--json", action="store_true", help="as JSON, with the papers' titles")


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    from hf_moe.model_cards import find_papers

    found = list_everything((args.kind,) if args.kind else None)
    titles = {number: find_papers(number)[0].title for rows in found.values() for row in rows for number in row.papers}
    if args.json:
        json.dump({"papers": titles, **{kind: [asdict(row) for row in rows] for kind, rows in found.items()}},
                  sys.stdout, indent=2)  # fmt: skip
        sys.stdout.write("\n")
        return 0
    width = min(shutil.get_terminal_size((100, 24)).columns, 119)
    lines = []
    for kind, rows in found.items():
        lines += [kind, "-" * len(kind)]
        indent = max(len(row.name) for row in rows) + 2
        for row in rows:
            papers = f" [{', '.join(row.papers)}]" if row.papers else ""
            lines += textwrap.wrap(
                f"{row.name:<{indent}}{row.summary}{papers}",
                width,
                subsequent_indent=" " * indent,
                drop_whitespace=True,
                break_on_hyphens=False,
            )
        lines.append("")
    lines += ["papers", "------", *(f"{number}  {title}" for number, title in sorted(titles.items()))]
    print("\n".join(lines))
    return 0


def _types() -> list[Entry]:
    from hf_moe.model_cards import list_type_cards, type_card

    cards = [type_card(name) for name in list_type_cards()]
    return [Entry(card.model_type, card.summary, tuple(paper.arxiv for paper in card.papers)) for card in cards]


def _routers() -> list[Entry]:
    from hf_moe.routing.registry import list_routers, router_class

    return [_entry(name, router_class(name)) for name in list_routers()]


def _experts() -> list[Entry]:
    from hf_moe.experts.registry import experts_class, list_experts

    return [_entry(name, experts_class(name)) for name in list_experts()]


def _recipes() -> list[Entry]:
    return _exported("hf_moe.upcycling.builders")


def _router_inits() -> list[Entry]:
    return _exported("hf_moe.upcycling.router_init")


def _adapters() -> list[Entry]:
    from hf_moe.adapters import config_classes

    return [_entry(cls.__name__, cls) for cls in config_classes()]


def _decoding() -> list[Entry]:
    from hf_moe.generation import SelfContrast

    return [_entry("SelfContrast", SelfContrast)]


def _unlearning() -> list[Entry]:
    from hf_moe.trainers import ExpertUnlearningTrainer

    return [_entry("ExpertUnlearningTrainer", ExpertUnlearningTrainer)]


def _quantization() -> list[Entry]:
    from hf_moe.quantization import MoteQuantizationConfig

    return [_entry(MoteQuantizationConfig.__name__, MoteQuantizationConfig)]


def _statistics() -> list[Entry]:
    from hf_moe.statistics import SoftmaxGaussianMoE

    return [_entry("SoftmaxGaussianMoE", SoftmaxGaussianMoE)]


def _exported(package: str) -> list[Entry]:
    module = importlib.import_module(package)
    return [_entry(name, getattr(module, name)) for name in module.__all__ if name not in BASE_CLASSES]


def _entry(name: str, cls: type) -> Entry:
    from hf_moe.model_cards import find_papers

    doc = inspect.cleandoc(cls.__doc__ or "")
    module_doc = inspect.getmodule(cls).__doc__ or ""
    papers = find_papers(doc) or find_papers(module_doc)
    return Entry(name, _first_sentence(doc) or _first_sentence(module_doc), tuple(paper.arxiv for paper in papers))


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    # a full stop followed by a capital: "cf. Eq. 2" and "v0.1" are not ends
    for position, character in enumerate(paragraph):
        if character == "." and paragraph[position + 1 : position + 2] == " " and paragraph[position + 2].isupper():
            if not paragraph[:position].endswith(("cf", "Eq", "Eqs", "Fig", "Sec")):
                return paragraph[: position + 1]
    return paragraph


KINDS: dict[str, Callable[[], list[Entry]]] = {
    "types": _types,
    "routers": _routers,
    "experts": _experts,
    "recipes": _recipes,
    "router-inits": _router_inits,
    "adapters": _adapters,
    "decoding": _decoding,
    "unlearning": _unlearning,
    "quantization": _quantization,
    "statistics": _statistics,
}
