"""The last matrix of a language model, apart from the model: logits of some positions, not of all.

Shapes: M positions, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


__all__ = ["LanguageHead"]


class LanguageHead:
    """What a model does with its last hidden states: the matrix, and the factor or the bound that some families have.

    Args:
        model (`PreTrainedModel`): A language model, also one that reads images.

    Raises:
        ValueError: the model has no output embeddings.
    """

    def __init__(self, model: Any):
        self.model = model
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings, so there are no predictions to distil: pass a "
                "language model."
            )
        config = model.config.get_text_config()
        factor = next(
            (v for n in ("logit_scale", "output_multiplier", "lm_head_multiplier") if (v := getattr(config, n, None))),
            None,
        )
        scaling = getattr(config, "logits_scaling", None)
        if factor is None and scaling is not None:  # Granite divides
            factor = scaling if config.model_type == "hyperclovax" else 1 / scaling
        self.factor = 1.0 if factor is None else factor
        self.bound = getattr(config, "final_logit_softcapping", None)

    @property
    def layer(self) -> nn.Module:
        """Looked up at every call: PEFT and FSDP replace it."""
        return self.model.get_output_embeddings()

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.layer.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.layer.weight.device

    def __call__(self, hidden_states: torch.Tensor, vocab_size: int | None = None) -> torch.Tensor:
        """Logits in float32.

        Args:
            hidden_states (`torch.Tensor` of shape `(M, D)`): After the last norm.
            vocab_size (`int`, *optional*): Only the first so many tokens.

        Returns:
            `torch.Tensor` of shape `(M, V)`.
        """
        layer: Any = self.layer
        if vocab_size is None or vocab_size == self.vocab_size or type(layer) is not nn.Linear:
            logits = layer(hidden_states)[:, :vocab_size]
        else:
            bias = None if layer.bias is None else layer.bias[:vocab_size]
            logits = F.linear(hidden_states, layer.weight[:vocab_size], bias)
        logits = logits.float() * self.factor
        return logits if self.bound is None else self.bound * torch.tanh(logits / self.bound)
