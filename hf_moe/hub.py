"""Pushing models to the Hub, and the one-line shim that lets them load where hf-moe is installed but not imported.

| what the repository holds | hf_moe imported | installed, not imported | absent |
|---|---|---|---|
| shim (default) | loads, no flag | loads with `trust_remote_code=True` | ImportError that says what to install |
| no code | loads | unknown model type | unknown model type |
"""

import importlib
import inspect
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_text


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, ModelCard
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.configuration_utils import PreTrainedConfig


__all__ = ["SHIM_FILE", "attach_shim", "push_to_hub", "shim_auto_map", "write_shim"]

SHIM_FILE = "hf_moe_shim.py"
CODE_CHOICES = ("shim", None)
# What an earlier push may have left that this push does not contain: a single weight file beside new shards would
# be loaded instead of them.
STALE = ["model*.safetensors", "model*.safetensors.index.json", SHIM_FILE]


def shim_auto_map(config: "PreTrainedConfig") -> dict[str, str]:
    """The `auto_map` entries through which the Auto classes find our classes in the shim.

    Args:
        config (`PreTrainedConfig`): A config of a type registered by this package, or by another one.

    Returns:
        `dict[str, str]`: Auto class name to `hf_moe_shim.<class>`; empty for transformers' own types, which need none.

    Example:
        ```python
        shim_auto_map(MoeLlamaConfig())["AutoConfig"]  # 'hf_moe_shim.MoeLlamaConfig'
        ```
    """
    return {auto: f"hf_moe_shim.{cls.__name__}" for auto, cls in _registered_classes(config).items()}


def write_shim(save_directory: str | os.PathLike, config: "PreTrainedConfig") -> Path | None:
    """Write `hf_moe_shim.py` for a config's type and enter it in `config.auto_map`.

    Args:
        save_directory (`str` or `os.PathLike`): The folder the model is saved to; created if missing.
        config (`PreTrainedConfig`): The model's config; its `auto_map` is replaced.

    Returns:
        `Path`: The file, or `None` for transformers' own types, which need no shim.

    Raises:
        ValueError: The classes were defined in a script, so that no import can reach them.

    Example:
        ```python
        write_shim("my-model", model.config)
        ```
    """
    classes = _registered_classes(config)
    if not classes:
        return None
    modules: dict[str, list[str]] = {}
    for cls in classes.values():
        if cls.__module__ == "__main__":
            raise ValueError(
                f"`{cls.__name__}` is defined in a script, so a shim cannot import it. Move it to a module of an "
                "installed package, or save with `code=None`."
            )
        modules.setdefault(cls.__module__, []).append(cls.__name__)
    lines = [
        f"from {module} import {', '.join(sorted(set(names)))}  # noqa: F401" for module, names in modules.items()
    ]
    path = write_text(Path(save_directory) / SHIM_FILE, "\n".join(sorted(lines)) + "\n")
    config.auto_map = shim_auto_map(config)
    return path


def attach_shim(
    model: "PreTrainedModel",
    save_directory: str | os.PathLike,
    *,
    code: str | None = "shim",
    is_main_process: bool = True,
) -> None:
    """Prepare a folder and a model's config for `save_pretrained`: with the shim, or without any code.

    Args:
        model (`PreTrainedModel`): The model about to be saved.
        save_directory (`str` or `os.PathLike`): Where to.
        code (`str`, *optional*, defaults to `"shim"`): `"shim"`, or `None` to remove what an earlier save wrote.
        is_main_process (`bool`, *optional*, defaults to `True`): Other processes only set `config.auto_map`.

    Raises:
        ValueError: `code` is neither of the two.
        NotADirectoryError: `save_directory` is a file.

    Example:
        ```python
        attach_shim(model, "my-model", code=None)
        ```
    """
    _check_code(code)
    folder = Path(save_directory)
    if folder.is_file():
        raise NotADirectoryError(f"`save_directory` must be a folder, but {str(folder)!r} is a file.")
    config = model.config
    # Loading with `trust_remote_code=True` marks the classes it meets for copying into every checkpoint saved later.
    # A copy of one module of ours is useless: it imports its neighbours. So the mark is taken off again.
    for cls in (type(model), type(config)):
        if cls._auto_class is not None and not cls.__module__.startswith(("transformers.", "transformers_modules.")):
            cls._auto_class = None
    if code is None:
        config.auto_map = {}
        if is_main_process:
            (folder / SHIM_FILE).unlink(missing_ok=True)
    elif is_main_process:
        write_shim(folder, config)
    elif auto_map := shim_auto_map(config):
        config.auto_map = auto_map


def push_to_hub(
    model: "PreTrainedModel",
    repo_id: str,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    code: str | None = "shim",
    card: "ModelCard | None" = None,
    files: Iterable[str | os.PathLike] = (),
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "5GB",
    tags: list[str] | None = None,
) -> "CommitInfo":
    """Push a model, its tokenizer and its card in one commit.

    Works for our models, for transformers' own MoE types (which get no shim: they need no plugin) and for adapters.

    Args:
        model (`PreTrainedModel`): What to push.
        repo_id (`str`): `"name"` or `"namespace/name"`; created if it does not exist.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): Pushed with the model.
        code (`str`, *optional*, defaults to `"shim"`): `"shim"`, or `None` for no code.
        card (`ModelCard`, *optional*): The repository's README. By default the one that is there stays; a repository
            without one gets [`~hf_moe.model_cards.create_model_card`]'s.
        files (`Iterable`, *optional*): Further files for the repository's root, such as the card's figures.
        commit_message, commit_description (`str`, *optional*): Of the commit.
        private (`bool`, *optional*): Only for a repository that is created.
        token (`bool` or `str`, *optional*): As in `huggingface_hub`.
        revision (`str`, *optional*): Branch to push to; created if missing.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Of one weight file.
        tags (`list[str]`, *optional*): Further tags for a card that is generated here.

    Returns:
        `CommitInfo`: What `huggingface_hub` says about the commit; its `repo_url` is the page.

    Raises:
        ValueError: Unknown `code`, or a tokenizer with more entries than the model has embeddings.
        FileNotFoundError: One of `files` does not exist.

    Example:
        ```python
        push_to_hub(model, "me/smollm2-moe", tokenizer=tokenizer)
        ```
    """
    from huggingface_hub import HfApi

    _check_code(code)
    files = [Path(file) for file in files]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"`files` names {missing[0]!r}, which does not exist.")
    check_tokenizer(model, tokenizer)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"max_shard_size": max_shard_size}
        if "code" in inspect.signature(model.save_pretrained).parameters:
            options["code"] = code
        model.save_pretrained(folder, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        readme = Path(folder) / "README.md"
        has_card = api.file_exists(repo_id, "README.md", revision=revision)
        if card is None and has_card:
            readme.unlink(missing_ok=True)  # PEFT writes one beside an adapter
        elif card is None and not readme.exists():
            from .model_cards import create_model_card

            card = create_model_card(model, model_name=repo_id.split("/")[-1], repo_id=repo_id, tags=tags or ())
        if card is not None:
            write_text(readme, str(card))
        for file in files:
            (Path(folder) / file.name).write_bytes(file.read_bytes())
        is_whole = any(Path(folder).glob("model*.safetensors"))  # not an adapter, which may live beside a model
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=STALE if is_whole else None,
        )


def check_tokenizer(model: "PreTrainedModel", tokenizer: Any) -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer, or its processor, which has one; nothing is
            checked without it.

    Raises:
        ValueError: The tokenizer has more entries than the embedding has rows.

    Example:
        ```python
        check_tokenizer(model, tokenizer)
        ```
    """
    if tokenizer is None:
        return
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if len(tokenizer) > rows:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer)} entries but the model has embeddings for {rows}: they do not belong "
            "together. Load the tokenizer of the same checkpoint, or call `model.resize_token_embeddings`."
        )


def _check_code(code: str | None) -> None:
    if code not in CODE_CHOICES:
        raise ValueError(
            f'`code` must be "shim" or None, got {code!r}. Modules of hf_moe import each other, so copies of them '
            "would not run."
        )


def _registered_classes(config: "PreTrainedConfig") -> dict[str, type]:
    """Auto class name to class, the config's own first; nothing for transformers' own types."""
    config_class = type(config)
    if config_class.__module__.startswith("transformers."):
        return {}
    modeling_auto = importlib.import_module("transformers.models.auto.modeling_auto")
    classes = {"AutoConfig": config_class}
    for name in sorted(vars(modeling_auto)):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and config_class in mapping:
            classes[name] = mapping[config_class]
    return classes
