"""Real English text and source code that every machine with this package has: no download, no bundled data.

The text comes from the Python standard library and from the packages `hf_moe` depends on. Documents come in a fixed
order and are split into a training and a held-out part by document; paragraphs that occur in a held-out document are
taken out of the training part, because reference pages and licences quote each other.
"""

import ast
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple


__all__ = ["DOMAINS", "Corpus", "load_corpus", "load_text_file"]

#: Domain name to what it holds.
DOMAINS = {
    "reference": "chapters of the Python language reference (what `help('topics')` shows)",
    "docstrings": "documentation strings of the Python standard library, one document per module",
    "code": "source files of the Python standard library",
    "licences": "licence texts of the packages this package depends on",
    "readmes": "project descriptions of the packages this package depends on",
}

HELD_OUT_EVERY = 5
# Shorter paragraphs ("Example:", "return None") may occur anywhere without giving anything away.
SHARED_PARAGRAPH = 80
SHORTEST_DOCUMENT = 200
DEPENDENCIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "evaluate", "safetensors")


class Corpus(NamedTuple):
    """Text of one kind, split by document.

    Args:
        name (`str`): A domain of [`DOMAINS`], or a file name.
        train (`tuple[str, ...]`): Documents to train on.
        held_out (`tuple[str, ...]`): Documents to evaluate on.
    """

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def load_corpus(domain: str = "reference", *, max_characters: int = 2_000_000) -> Corpus:
    """Collect the text of one domain from this machine.

    Args:
        domain (`str`, defaults to `"reference"`): A key of [`DOMAINS`].
        max_characters (`int`, defaults to 2,000,000): Stop collecting after this much text.

    Returns:
        [`Corpus`]: Every fifth document is held out.

    Raises:
        ValueError: If the domain is unknown, or this Python installation has no such text.

    Example:
        ```python
        >>> corpus = load_corpus("reference")
        >>> corpus.held_out[0].splitlines()[0]
        'Coroutines'
        ```
    """
    if domain not in READERS:
        raise ValueError(f"`domain` must be one of {', '.join(DOMAINS)}, got {domain!r}.")
    documents, characters = [], 0
    for document in READERS[domain]():
        text = document.strip() + "\n"
        if len(text) < SHORTEST_DOCUMENT or text in documents:
            continue
        documents.append(text)
        characters += len(text)
        if characters >= max_characters:
            break
    if len(documents) < 2:
        raise ValueError(
            f"This Python installation has no text for `domain={domain!r}` ({DOMAINS[domain]}). "
            "Choose another domain, or give a text file."
        )
    return split(domain, documents)


def load_text_file(path: str | os.PathLike) -> Corpus:
    """Read the user's own text; its last fifth, cut between paragraphs, is held out.

    Args:
        path (`str` or `PathLike`): A UTF-8 text file.

    Returns:
        [`Corpus`]: One training and one held-out document.

    Raises:
        ValueError: If the file is missing, empty, not UTF-8 text, or a single paragraph.

    Example:
        ```python
        >>> corpus = load_text_file("notes.txt")
        ```
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The text file `{path}` is not UTF-8 text ({error.reason}). Convert it first.") from error
    except OSError as error:
        raise ValueError(f"The text file `{path}` cannot be read: {error.strerror}. Give a readable file.") from error
    if not text.strip():
        raise ValueError(f"The text file `{path}` is empty. Give a file with text in it.")
    pieces = paragraphs(text) if len(paragraphs(text)) > 1 else text.strip().splitlines()
    if len(pieces) < 2:
        raise ValueError(
            f"The text file `{path}` is one single line, so nothing can be held out. Give a file with more lines."
        )
    total, read, cut = sum(map(len, pieces)), 0, len(pieces) - 1
    for index, piece in enumerate(pieces[:-1]):
        read += len(piece)
        if read >= total * (1 - 1 / HELD_OUT_EVERY):
            cut = index + 1
            break
    joint = "\n\n" if len(paragraphs(text)) > 1 else "\n"
    return Corpus(path.name, (joint.join(pieces[:cut]) + "\n",), (joint.join(pieces[cut:]) + "\n",))


def split(name: str, documents: list[str]) -> Corpus:
    """Hold out every fifth document and take its longer paragraphs out of the others."""
    held_out = [text for index, text in enumerate(documents) if index % HELD_OUT_EVERY == HELD_OUT_EVERY // 2]
    held_out = held_out or documents[-1:]
    known = {fingerprint(part) for text in held_out for part in paragraphs(text) if len(part) >= SHARED_PARAGRAPH}
    train = []
    for text in documents:
        if text not in held_out:
            kept = "\n\n".join(part for part in paragraphs(text) if fingerprint(part) not in known)
            if len(kept) >= SHORTEST_DOCUMENT:
                train.append(kept + "\n")
    return Corpus(name, tuple(train), tuple(held_out))


def paragraphs(text: str) -> list[str]:
    """The blank-line separated parts of a text, indentation kept."""
    return [part.rstrip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def fingerprint(paragraph: str) -> str:
    """A paragraph without differences in spacing: the same text is often wrapped or indented differently."""
    return " ".join(paragraph.split())


def read_reference() -> Iterator[str]:
    """Topics of Python's built-in help."""
    topics = import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        # Headlines are underlined with rows of asterisks, equals signs or hyphens.
        yield re.sub(r"\n([*=~-])\1{3,}\n", "\n", topics[name])


def standard_library() -> Iterator[str]:
    """Source texts of the public modules and packages of the standard library, in alphabetical order."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip"}
    for path in sorted([*root.glob("[a-z]*.py"), *root.glob("[a-z]*/[a-z]*.py")]):
        if not skipped & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def read_docstrings() -> Iterator[str]:
    """Documentation strings of each standard module, in the order of its source."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source in standard_library():
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates and test data among the sources
            continue
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield "\n\n".join(inspect.cleandoc(text) for text in found if text)


def installed_dependencies() -> list[Distribution]:
    """The distributions this package needs, directly or not, by name."""
    names, found = list(DEPENDENCIES), {}
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        try:
            if name not in found:
                found[name] = distribution(name)
                required = [line for line in found[name].requires or [] if "extra ==" not in line]
                names += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required]
        except PackageNotFoundError:  # needed on another platform only
            continue
    return [found[name] for name in sorted(found)]


def read_licences() -> Iterator[str]:
    """Licence files that the dependencies ship with their metadata."""
    for package in installed_dependencies():
        for file in sorted(package.files or [], key=str):
            if ".dist-info" in str(file) and re.match(r"(licen[cs]e|copying|notice)", file.name, re.IGNORECASE):
                path = Path(str(file.locate()))
                if path.is_file():
                    yield path.read_text(encoding="utf-8", errors="replace")


def read_readmes() -> Iterator[str]:
    """Long descriptions from the dependencies' metadata."""
    for package in installed_dependencies():
        yield (package.read_text("METADATA") or "").partition("\n\n")[2]  # headers, an empty line, the description


READERS = {
    "reference": read_reference,
    "docstrings": read_docstrings,
    "code": standard_library,
    "licences": read_licences,
    "readmes": read_readmes,
}
