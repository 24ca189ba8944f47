"""The model types of this package by name."""

import difflib
import fnmatch

from .models import MODEL_TYPES


__all__ = ["list_models"]


def list_models(pattern: str = "*") -> list[str]:
    """Model types whose name matches a pattern.

    Beside these, `upcycled_<type>` exists for every dense type of transformers.

    Args:
        pattern (`str`, *optional*, defaults to `"*"`): Shell-style, as in `"moe_q*"`.

    Returns:
        `list[str]`: Sorted names, for `AutoConfig.for_model(name)`.

    Raises:
        ValueError: Nothing matches; the message names the nearest type.

    Example:
        ```python
        >>> list_models("moe_qwen*")
        ['moe_qwen2', 'moe_qwen3']
        ```
    """
    found = sorted(fnmatch.filter(MODEL_TYPES, pattern))
    if not found:
        near = difflib.get_close_matches(pattern.strip("*"), MODEL_TYPES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`pattern={pattern!r}` matches no model type. There are {sorted(MODEL_TYPES)}.{hint}")
    return found
