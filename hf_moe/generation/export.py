"""The folder that brings self-contrast decoding to people who name it instead of importing it."""

import os
from pathlib import Path
from typing import Any

from hf_moe.files import new_folder, write_text

from .self_contrast import SelfContrast


__all__ = ["DECODER_SETTINGS", "export_decoder"]

# What a folder can fix: the rest of `SelfContrast` belongs to a call.
DECODER_SETTINGS = ("beta", "alpha", "weak", "weak_weights", "strong_temperature", "weak_temperature", "mode")

GENERATE = '''"""Self-contrast decoding (https://huggingface.co/papers/2405.14507), run by hf-moe."""

import hf_moe


SETTINGS = {settings}


def generate(inputs=None, *, model, **kwargs):
    """What `generate(custom_generate=...)` calls: all its arguments, and those of `hf_moe.SelfContrast`."""
    if kwargs.get("custom_generate") is not None:  # another method, asked for on a model loaded with this folder
        return type(model).generate(model, inputs, **kwargs)
    return hf_moe.scmoe_generate(model, inputs, **{{**SETTINGS, **kwargs}})
'''

README = """---
library_name: transformers
tags:
- custom_generate
- mixture-of-experts
arxiv: 2405.14507
---
# Self-contrast decoding (SCMoE)

Runs a Mixture-of-Experts language model twice per token, with its own routing and with a worse one
(`weak={weak!r}`), and contrasts the two ([paper](https://huggingface.co/papers/2405.14507)). No training. Needs
`pip install hf_moe`; a token costs a second forward pass and the cache twice the memory.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-30B-A3B")
inputs = tokenizer("Question: ...", return_tensors="pt")
model.generate(**inputs, custom_generate="{name}", trust_remote_code=True, max_new_tokens=256, beta={beta})
```

Settings of this folder, each of which a call may change: {settings}.
"""


def export_decoder(folder: str | os.PathLike, **settings: Any) -> Path:
    """Write a folder that `generate(custom_generate=folder, trust_remote_code=True)` runs.

    Push it to the Hub, alone or inside a model's repository. It holds no weights and no copy of the method, which it
    takes from the installed hf-moe. Paper: https://huggingface.co/papers/2405.14507.

    Args:
        folder (`str` or `os.PathLike`): New, or an empty folder.
        **settings: `beta`, `alpha`, `weak`, `weak_weights`, `strong_temperature`, `weak_temperature` or `mode` of
            [`SelfContrast`]: what holds where a call says nothing else.

    Returns:
        `Path`: The folder, with `custom_generate/generate.py`, `custom_generate/requirements.txt` and `README.md`.

    Raises:
        ValueError: `folder` is not empty, or a setting is unknown or out of range. Nothing is written then.

    Example:
        ```python
        export_decoder("scmoe", beta=0.3)
        model.generate(**inputs, custom_generate="scmoe", trust_remote_code=True)
        ```
    """
    unknown = sorted(set(settings) - set(DECODER_SETTINGS))
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no setting of a folder. They are {list(DECODER_SETTINGS)}.")
    decoder = SelfContrast(**settings)
    settings = {name: getattr(decoder, name) for name in DECODER_SETTINGS}
    folder = Path(folder)
    with new_folder(folder) as partial:
        write_text(partial / "custom_generate" / "generate.py", GENERATE.format(settings=_python(settings)))
        write_text(partial / "custom_generate" / "requirements.txt", "hf_moe\n")
        shown = ", ".join(f"`{name}={value!r}`" for name, value in settings.items())
        text = README.format(weak=decoder.weak, beta=decoder.beta, name=folder.resolve().name, settings=shown)
        write_text(partial / "README.md", text)
    return folder


def _python(settings: dict[str, Any]) -> str:
    return "{\n" + "".join(f'    "{name}": {value!r},\n' for name, value in settings.items()).replace("'", '"') + "}"
