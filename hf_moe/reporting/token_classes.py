"""Sorting tokens into a few classes by what they look like, and by where in a window they stand."""

import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

import torch


__all__ = ["POSITION_BINS", "TOKEN_CLASSES", "class_of_each_id", "position_bin", "token_class", "token_text"]

#: Classes of the tokens that stand for media.
MEDIA_CLASSES = ("image", "video", "speech", "audio")
#: What [`token_class`] answers, in the order of tables and plots. `"special"` is decided by the tokenizer, media by
#: the processor.
TOKEN_CLASSES = (
    *("word", "word part", "keyword", "number", "punctuation", "whitespace", "special"),
    *MEDIA_CLASSES,
    "other",
)
#: First position of each bin.
POSITION_STARTS = (0, 1, 4, 16, 64, 256, 1024)
#: Names of the bins.
POSITION_BINS = ("0", "1-3", "4-15", "16-63", "64-255", "256-1023", "1024+")
# Of programming languages, without those that prose uses too ("for", "if", "class", ...).
KEYWORDS = frozenset(
    "async await const def del elif endif enum except fn func import int isinstance lambda len nonlocal null nullptr "
    "print println self sizeof static std str struct typedef var void yield".split()
)


def token_class(text: str) -> str:
    """The class of one token by its text.

    | class | tokens |
    |---|---|
    | `word` | letters at the beginning of a word, e.g. `" river"` |
    | `word part` | letters that go on with one, e.g. `"ation"` |
    | `keyword` | words of programming languages that prose hardly has, e.g. `"def"`, `"elif"`, `"self"` |
    | `number` | digits |
    | `punctuation` | punctuation and symbols only |
    | `whitespace` | white space only |
    | `other` | everything else: mixtures, pieces of a character |

    Note: whether letters begin a word is told by the space before them, as tokenizers keep it. The first word of a
    line counts as a part.

    Args:
        text (`str`): The token with its space.

    Returns:
        `str`: One of [`TOKEN_CLASSES`], never `"special"` or one of media.

    Example:
        ```python
        >>> [token_class(text) for text in (" river", "ation", " def", "42", ");", "\\n")]
        ['word', 'word part', 'keyword', 'number', 'punctuation', 'whitespace']
        ```
    """
    if not text or text.isspace():
        return "whitespace" if text else "other"
    core = text.strip()
    if core in KEYWORDS:
        return "keyword"
    if core.isnumeric():
        return "number"
    if all(unicodedata.category(c)[0] == "L" or c in "'’" for c in core) and core.strip("'’"):
        return "word" if text[0].isspace() else "word part"
    if all(unicodedata.category(c)[0] in "PS" for c in core) and "\ufffd" not in core:
        return "punctuation"
    return "other"


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token with the space before it, also where `decode` drops that at the beginning of a text.

    Args:
        tokenizer: A transformers tokenizer.
        token_id (`int`): The token.

    Returns:
        `str`
    """
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    spelled = tokenizer.convert_ids_to_tokens(token_id)
    if isinstance(spelled, str) and spelled.startswith("\u2581") and not text.startswith(" "):
        return " " + text
    return text


def class_of_each_id(
    tokenizer: Any,
    token_ids: Iterable[int],
    classes: Callable[[str], str] | None = None,
) -> dict[int, str]:
    """The class of each token id.

    Args:
        tokenizer: A transformers tokenizer, whose special tokens are of class `"special"`; or a processor, whose
            placeholders are of class `"image"`, `"video"`, `"speech"` and `"audio"`.
        token_ids (`Iterable[int]`): The ids to sort.
        classes (`Callable[[str], str]`, *optional*): Text of a token to the name of its class; [`token_class`] by
            default.

    Returns:
        `dict[int, str]`

    Raises:
        TypeError: `classes` answered something that is no text.
    """
    classes = classes or token_class
    media = {getattr(tokenizer, f"{name}_token_id", None): name for name in MEDIA_CLASSES}
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    special = set(tokenizer.all_special_ids)
    found = {}
    for token_id in token_ids:
        text = token_text(tokenizer, token_id)
        name = "special" if token_id in special else classes(text)
        name = media.get(token_id, name)
        if not isinstance(name, str):
            raise TypeError(f"`token_classes` must return the name of a class, got {name!r} for the token {text!r}.")
        found[token_id] = name
    return found


def position_bin(positions: torch.Tensor) -> torch.Tensor:
    """The bin of each position, as an index into [`POSITION_BINS`]; bins grow fourfold.

    Args:
        positions (`torch.Tensor` of shape `(T,)`): Places in a window, from 0.

    Returns:
        `torch.Tensor` of shape `(T,)`, int64.
    """
    return torch.bucketize(positions, torch.tensor(POSITION_STARTS), right=True) - 1
