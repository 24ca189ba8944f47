"""What the `read_me` classes return.

Shapes: B batch, S sequence, N experts.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


__all__ = ["ReadMeCausalLMOutput", "ReadMeModelOutput"]


@dataclass
class ReadMeModelOutput(BaseModelOutputWithPast):
    """Base-model output; `router_logits` `(B, S, N)` where asked for: one decision, the same for all layers."""

    router_logits: torch.Tensor | None = None


@dataclass
class ReadMeCausalLMOutput(CausalLMOutputWithPast):
    """Language-model output; `router_logits` as in [`ReadMeModelOutput`]."""

    router_logits: torch.Tensor | None = None
