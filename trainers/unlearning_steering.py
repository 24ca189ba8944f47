"""Where RMU reads and what it steers to.

Shapes: B batch, S sequence, D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_moe.views import in_backward, unwrap_model


__all__ = ["Steering", "decoder_layers"]


class _Read:
    """What a reading found."""

    found: torch.Tensor | None = None

    @property
    def states(self) -> torch.Tensor:
        if self.found is None:
            raise ValueError(
                "The decoder layer that RMU steers was not seen to run. RMU cannot train a compiled model."
            )
        return self.found


class Steering:
    """Hidden states after one decoder layer, and the vector c u that those of the forget set are to become.

    Args:
        model (`nn.Module`): The model that trains, for the width and the dtype.
        path (`str`): Of the decoder layer.
        seed (`int`): Seed of u.
    """

    def __init__(self, model: nn.Module, path: str, seed: int):
        self.path = path
        embedding: Any = unwrap_model(model).get_input_embeddings().weight
        direction = torch.rand(embedding.shape[-1], generator=torch.Generator().manual_seed(seed))
        self.direction = direction / direction.norm()  # u
        self.length = 1.0  # c

    @property
    def vector(self) -> torch.Tensor:
        """c u, `(D,)` float32."""
        return self.length * self.direction

    @contextmanager
    def reading(self, model: nn.Module) -> Iterator[_Read]:
        """Keeps the hidden states of the model's pass inside the block."""
        read = _Read()

        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            if not in_backward():
                read.found = output[0] if isinstance(output, tuple) else output

        handle = unwrap_model(model).get_submodule(self.path).register_forward_hook(hook)
        try:
            yield read
        finally:
            handle.remove()

    @torch.no_grad()
    def hidden_states(self, model: nn.Module, batch: dict[str, torch.Tensor], options: dict) -> torch.Tensor:
        """Those of a batch, `(B, S, D)`, without gradient."""
        with self.reading(model) as read:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **options)
        return read.states


def decoder_layers(model: nn.Module) -> list[str]:
    """Paths of the decoder layers of a language model: the children of its longest module list."""
    lists = [(p, m) for p, m in unwrap_model(model).base_model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError(f"`forget_loss='rmu'` needs a model with a list of layers; {type(model).__name__} has none.")
    path, layers = max(lists, key=lambda item: (len(item[1]), -item[0].count(".")))
    inner = unwrap_model(model)
    root = path if inner.base_model is inner else f"{inner.base_model_prefix}.{path}"
    return [f"{root}.{i}" for i in range(len(layers))]
