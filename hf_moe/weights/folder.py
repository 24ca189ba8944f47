"""Loading a model folder, with every defect of the files turned into one sentence that names file and fix."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


__all__ = ["check_safetensors", "load_folder"]

INDEX = "model.safetensors.index.json"


def check_safetensors(folder: str | os.PathLike) -> list[str]:
    """Check that a folder's safetensors files are all there and complete, without reading the tensors.

    Args:
        folder (`str` or `PathLike`): A model folder.

    Returns:
        `list[str]`: The names of the files checked; empty for a folder without safetensors files.

    Raises:
        ValueError: If a shard is missing, or a file is truncated or corrupt.

    Example:
        ```python
        >>> model.save_pretrained("folder")
        >>> check_safetensors("folder")
        ['model.safetensors']
        ```
    """
    folder = Path(folder)
    names = {path.name for path in folder.glob("*.safetensors")}
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names |= set(weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`{folder / INDEX}` is not a weight index. Download or copy it again.") from error
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"`{path}` is missing although `{INDEX}` lists it. Download or copy it again.")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"`{path}` ({path.stat().st_size} bytes) is truncated or corrupt: {first_line(error)}. "
                "Download or copy the file again."
            ) from error
    return sorted(names)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a final full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


def check_causal_lm(config, source: str) -> None:
    """Refuse a config of which no causal language model can be built, or whose weights belong to another head."""
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    registered = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if registered:
        known.add(getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "__name__", ""))
    architectures = config.architectures or []
    other_head = bool(architectures) and not known & {*architectures}
    if not registered or other_head or getattr(config, "is_encoder_decoder", False):
        what = f"`{architectures[0]}`" if architectures else f"model type `{config.model_type}`"
        raise ValueError(
            f"`{source}` holds {what}, which is not a causal language model. "
            "Give the folder or Hub id of a decoder that `AutoModelForCausalLM` loads, such as a Llama or Qwen model."
        )


def load_folder(
    folder: str | os.PathLike, dtype: torch.dtype = torch.float32, *, source: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a local folder, or say what is wrong with the folder.

    Args:
        folder (`str` or `PathLike`): A folder as `save_pretrained` writes it.
        dtype (`torch.dtype`, defaults to `torch.float32`): Type of the loaded weights.
        source (`str`, *optional*): What the user called this model; used in messages. Defaults to the folder.

    Returns:
        `tuple`: The model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If a file is missing, truncated or corrupt, the model is not a causal language model, weights
            are missing, or the tokenizer has more tokens than the model has embeddings.

    Example:
        ```python
        >>> model, tokenizer = load_folder("path/to/SmolLM2-135M-Instruct")
        ```
    """
    folder = Path(folder).expanduser()
    source = source or str(folder)
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is not a folder. Give a folder written by `save_pretrained`, or a Hub id.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"`{folder}` has no `config.json`, so it is not a model folder. Give one that has.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"`{folder / 'config.json'}` cannot be read: {first_line(error)}.") from error
    check_causal_lm(config, source)
    check_safetensors(folder)
    tokenizer = load_tokenizer(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights in `{folder}` cannot be loaded: {first_line(error)}.") from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"The weights in `{folder}` lack {len(missing)} tensors of {type(model).__name__}, first `{missing[0]}`. "
            "The files belong to another model or are incomplete: download or copy them again."
        )
    embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embeddings:
        raise ValueError(
            f"The tokenizer in `{folder}` has {len(tokenizer)} tokens but the model only {embeddings} embeddings, so "
            "they do not belong together. Put the model's own tokenizer files there."
        )
    return model, tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; a padding token is chosen where none is set."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the Rust tokenizer raises bare `Exception`
        raise ValueError(
            f"The tokenizer in `{folder}` cannot be loaded: {first_line(error)}. "
            "Put the model's tokenizer files (`tokenizer.json`, `tokenizer_config.json`) there."
        ) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
