"""From what an encoder gives to rows of the language model.

Shapes: M media items (images, videos, segments of sound), P rows of the encoder, E its width, Q queries, D hidden.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.whisper.modeling_whisper import WhisperDecoder


__all__ = ["DecoderQueryConnector", "MlpConnector", "QFormerConnector", "QueryConnector", "build_connector"]


class MlpConnector(nn.Module):
    """Linear, GELU, linear, on each row.

    Args:
        encoder_size (`int`): E.
        hidden_size (`int`): D.
    """

    def __init__(self, encoder_size: int, hidden_size: int):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(encoder_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(M, P, E)` to `(M, P, D)`; `mask` is not used."""
        return self.projector(features)


class QueryConnector(nn.Module):
    """Learned query vectors that ask the encoder's rows; what they become is projected.

    Note: The released code starts the queries at zero. Here they are drawn from N(0, 0.02^2), so that they differ from
    the start; zeros of a checkpoint stay as they are.
    """

    #: Standard deviation of the queries' first values.
    std = 0.02

    def __init__(self, num_query_tokens: int, query_size: int, hidden_size: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_query_tokens, query_size))
        self.projector = nn.Linear(query_size, hidden_size)

    def expanded_queries(self, features: torch.Tensor) -> torch.Tensor:
        """`(M, Q, ...)` for M items."""
        return self.queries.to(features.dtype).expand(len(features), -1, -1)


class DecoderQueryConnector(QueryConnector):
    """A Whisper decoder that reads the queries in place of words.

    Its self-attention is causal: the order of the queries matters.

    Args:
        encoder_config (`WhisperConfig`): Of the encoder.
        hidden_size (`int`): D.
        num_query_tokens (`int`): Q.
        changes (`dict`, *optional*): Fields of the decoder's config that differ.
    """

    def __init__(self, encoder_config: Any, hidden_size: int, num_query_tokens: int, changes: dict | None = None):
        super().__init__(num_query_tokens, encoder_config.d_model, hidden_size)
        config = copy.deepcopy(encoder_config)
        for name, value in {"vocab_size": 1, "pad_token_id": 0, **(changes or {})}.items():
            setattr(config, name, value)
        self.decoder: Any = WhisperDecoder._from_config(config)
        # It reads embeddings alone; a table nobody looks up would have no gradient.
        self.decoder.embed_tokens = None

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(M, P, E)` to `(M, Q, D)`; Whisper reads padding too, so `mask` is not used."""
        queries = self.expanded_queries(features)
        outputs = self.decoder(inputs_embeds=queries, encoder_hidden_states=features, use_cache=False)
        return self.projector(outputs.last_hidden_state)


class QFormerConnector(QueryConnector):
    """BLIP-2's Q-Former.

    Args:
        encoder_size (`int`): E.
        hidden_size (`int`): D.
        num_query_tokens (`int`): Q.
        changes (`dict`, *optional*): Fields of its config that differ from `Blip2QFormerConfig()`.
        attention (`str`, *optional*): Its attention implementation.
    """

    def __init__(
        self,
        encoder_size: int,
        hidden_size: int,
        num_query_tokens: int,
        changes: dict | None = None,
        attention: str | None = None,
    ):
        fields = {**(changes or {}), "encoder_hidden_size": encoder_size}
        config = Blip2QFormerConfig(**fields)
        super().__init__(num_query_tokens, config.hidden_size, hidden_size)
        self.former = Blip2QFormerModel._from_config(config, attn_implementation=attention)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(M, P, E)` to `(M, Q, D)`; `mask` `(M, P)` is 1 where a row is no padding."""
        outputs = self.former(
            query_embeds=self.expanded_queries(features), encoder_hidden_states=features, encoder_attention_mask=mask
        )
        return self.projector(outputs.last_hidden_state)


def build_connector(config: Any, modality: str) -> nn.Module:
    """The connector of a modality.

    Args:
        config ([`UniMoeConfig`]): Of the model.
        modality (`str`): `"image"`, `"speech"` or `"audio"`.

    Returns:
        `nn.Module`: `(features (M, P, E), mask (M, P) or None) -> (M, P or Q, D)`.
    """
    settings, encoder = config.connector(modality), config.encoder_config(modality)
    hidden_size, queries = config.text_config.hidden_size, settings["num_query_tokens"]
    if settings["kind"] == "mlp":
        return MlpConnector(encoder.hidden_size, hidden_size)
    if settings["kind"] == "decoder_query":
        return DecoderQueryConnector(encoder, hidden_size, queries, settings.get("config"))
    attention = config._attn_implementation if config._attn_implementation in ("eager", "sdpa") else None
    return QFormerConnector(encoder.hidden_size, hidden_size, queries, settings.get("config"), attention)
