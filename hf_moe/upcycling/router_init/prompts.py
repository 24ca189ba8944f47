"""Router rows from example prompts per expert, as mergekit's MoE merges do."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_moe.modes import eval_mode
from hf_moe.upcycling.statistics import capture_inputs, encode

from .base import RouterInit


__all__ = ["Prompts", "prompt_row"]

logger = logging.get_logger(__name__)

MODES = ("hidden", "hidden_avg", "cheap_embed")
TAPS = ("router_input", "layer_input")
# Above this the rows are close to dependent and top-k hardly tells the experts apart (mergekit's threshold).
CONDITION_LIMIT = 5.0


def prompt_row(positive: torch.Tensor, negative: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the positive prompts' vectors minus mean of the negative ones', scaled to length 1.

    Args:
        positive (`torch.Tensor` of shape `(P, D)`): One vector per positive prompt.
        negative (`torch.Tensor` of shape `(Q, D)`, *optional*): One per negative prompt.

    Returns:
        `torch.Tensor` of shape `(D,)`.
    """
    row = positive.mean(dim=0)
    if negative is not None and len(negative):
        row = row - negative.mean(dim=0)
    return F.normalize(row, dim=-1)


@dataclass(frozen=True)
class Prompts(RouterInit):
    """The row of expert e is [`prompt_row`] of the hidden vectors its prompts give in the dense model.

    Args:
        prompts (`dict`): Expert index to a list of positive prompts, or to
            `{"positive": [...], "negative": [...]}`. A prompt is a text or a list of token ids.
        mode (`str`, defaults to `"hidden"`): `"hidden"` the last token's vector, `"hidden_avg"` the mean over the
            tokens, `"cheap_embed"` the mean input embedding, the same for all layers.
        tap (`str`, defaults to `"router_input"`): `"router_input"` what the router will see, or `"layer_input"` the
            input of the decoder layer, which is what mergekit takes.

    Example:

    ```python
    >>> router = Prompts({0: ["def main():"], 1: {"positive": ["Dear Sir or Madam,"], "negative": ["import os"]}})
    >>> moe, report = upcycle(dense, num_experts=2, top_k=1, router=router, tokenizer=tokenizer)
    ```
    """

    prompts: Mapping[int, Any]
    mode: str = "hidden"
    tap: str = "router_input"
    rows: dict[int, torch.Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {list(MODES)}, got {self.mode!r}.")
        if self.tap not in TAPS:
            raise ValueError(f"`tap` must be one of {list(TAPS)}, got {self.tap!r}.")
        for expert, entry in self.prompts.items():
            if isinstance(entry, Mapping) and not set(entry) <= {"positive", "negative"}:
                raise ValueError(f"`prompts[{expert}]` may have 'positive' and 'negative', got {sorted(entry)}.")
            if not _sides(entry)[0]:
                raise ValueError(f"`prompts[{expert}]` has no positive prompt.")

    @property
    def reads_text(self):
        sides = [text for entry in self.prompts.values() for side in _sides(entry) for text in side]
        return self.rows is None and any(isinstance(text, str) for text in sides)

    def validate(self, num_experts, top_k):
        if sorted(self.prompts) != list(range(num_experts)):
            raise ValueError(
                f"`prompts` must have one entry for each expert 0 to {num_experts - 1}, got {sorted(self.prompts)}."
            )

    def prepare(self, model, sites, tokenizer=None):
        vectors = {
            expert: [[self._vectors(model, sites, text, tokenizer) for text in side] for side in _sides(entry)]
            for expert, entry in tqdm(sorted(self.prompts.items()), desc="Reading prompts")
        }
        rows = {}
        for site in sites:
            layer = site.layer_idx
            parts = []
            for positive, negative in vectors.values():
                away = torch.stack([v[layer] for v in negative]) if negative else None
                parts.append(prompt_row(torch.stack([v[layer] for v in positive]), away))
            rows[layer] = torch.stack(parts)
        self._warn_if_degenerate(rows)
        return replace(self, rows=rows)

    @torch.no_grad()
    def _vectors(self, model, sites, text, tokenizer) -> dict[int, torch.Tensor]:
        ids = encode(text, tokenizer, "prompts").to(model.device)
        if self.mode == "cheap_embed":
            vector = model.get_input_embeddings()(ids)[0].float().mean(dim=0).cpu()
            return {site.layer_idx: vector for site in sites}
        found = {}

        def keep(layer, hidden_states):
            states = hidden_states.detach()[0].float()  # (S, D)
            found[layer] = (states[-1] if self.mode == "hidden" else states.mean(dim=0)).cpu()

        modules = {s.layer_idx: s.entry if self.tap == "router_input" else _layer(model, s) for s in sites}
        with eval_mode(model), capture_inputs(modules, keep):
            model(input_ids=ids)
        return found

    def _warn_if_degenerate(self, rows: dict[int, torch.Tensor]) -> None:
        conditions = {layer: float(torch.linalg.cond(matrix)) for layer, matrix in rows.items()}
        worst = max(conditions, key=lambda layer: conditions[layer])
        if conditions[worst] > CONDITION_LIMIT:
            logger.warning(
                "The prompts of different experts look alike to the router (condition number "
                f"{conditions[worst]:.3g} in layer {worst}, best below {CONDITION_LIMIT:g}): add negative "
                "prompts or more distinct ones."
            )

    def build(self, num_experts, hidden_size, stats=None, generator=None, layer_idx=0):
        if self.rows is None:
            raise ValueError("`Prompts` must see the dense model first: call `prepare(model, sites, tokenizer)`.")
        return self.rows[layer_idx]

    def describe(self):
        return {"name": "Prompts", "mode": self.mode, "tap": self.tap, "prompts": {
            str(expert): [[text if isinstance(text, str) else "ids" for text in side] for side in _sides(entry)]
            for expert, entry in self.prompts.items()
        }}  # fmt: skip


def _sides(entry: Any) -> tuple[list, list]:
    if isinstance(entry, Mapping):
        return list(entry.get("positive", ())), list(entry.get("negative", ()))
    return [entry] if isinstance(entry, str) else list(entry), []


def _layer(model, site):
    return model.get_submodule(site.layer_name)
