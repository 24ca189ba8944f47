"""From a GGUF file, read by transformers' own reader, to an ordinary safetensors folder."""

import importlib.util
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from .folder import first_line


__all__ = ["convert_gguf"]


def convert_gguf(gguf_file: str | os.PathLike, folder: str | os.PathLike, *, name: str | None = None) -> None:
    """Unpack a GGUF file into float32 safetensors, config and tokenizer files.

    Args:
        gguf_file (`str` or `PathLike`): The file to read.
        folder (`str` or `PathLike`): Where the model and tokenizer are saved.
        name (`str`, *optional*): Name kept in the config as `_name_or_path`.

    Raises:
        ImportError: If the `gguf` package is missing.
        ValueError: If the file is not a GGUF file that transformers can read.

    Example:
        ```python
        >>> convert_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")
        >>> model = AutoModelForCausalLM.from_pretrained("smollm2")
        ```
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("Reading a GGUF file needs the package `gguf`. Run `pip install 'hf-moe[demo]'`.")
    gguf_file = Path(gguf_file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent,
            gguf_file=gguf_file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"`{gguf_file}` cannot be read as a GGUF model: {first_line(error)}.") from error
    # The loader keeps its quantizer on the model, which refuses to be saved; the weights are plain float32 by now.
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")}
    )
    config.architectures = [type(model).__name__]
    if name is not None:
        config._name_or_path = name
    plain = type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=torch.float32)
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
