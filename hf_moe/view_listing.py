"""The families of the installed transformers, and what views know about each."""

import re
from pathlib import Path
from typing import NamedTuple

import transformers

from .view_families import BLOCKS_OF_ROUTERS, FAMILY_RULES, REFUSED_FAMILIES


__all__ = ["RoutedFamily", "supported_families"]


class RoutedFamily(NamedTuple):
    """A family of transformers that records router logits.

    Args:
        name (`str`): Its folder in `transformers.models`.
        router (`str`): Class that its recorder names.
        supported (`bool`): Whether [`~hf_moe.moe_layers`] takes its models.
        reason (`str`): Why not, if not.
    """

    name: str
    router: str
    supported: bool
    reason: str = ""


def supported_families() -> list[RoutedFamily]:
    """Every family of the installed transformers that records router logits, supported or not.

    Read from transformers' files, without importing any. Models of this package are all supported.

    Returns:
        `list[RoutedFamily]`: By name.

    Example:
        ```python
        [family.name for family in hf_moe.supported_families() if family.supported]
        ```
    """
    families = []
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for router in _recorded_classes(file.read_text(encoding="utf-8")):
            supported = router in FAMILY_RULES or router in BLOCKS_OF_ROUTERS
            reason = "" if supported else REFUSED_FAMILIES.get(router, "no rule says how to read it.")
            families.append(RoutedFamily(file.parent.name, router, supported, reason))
    return families


def _recorded_classes(source: str) -> list[str]:
    """Names in `"router_logits": OutputRecorder(Name, ...)`, or a list of these, each once."""
    names: dict[str, None] = {}
    for entry in re.findall(r'^ +"router_logits": (.*(?:OutputRecorder).*)$', source, flags=re.MULTILINE):
        names.update(dict.fromkeys(re.findall(r"OutputRecorder\((\w+)", entry)))
    return [name for name in names if f"class {name}(" in source]
