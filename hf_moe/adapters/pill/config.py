"""What a PILL adapter consists of and which of its parts train."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_moe.adapters.core import MoeAdapterConfig


__all__ = ["PillConfig"]

STAGES = ("align", "instruct")
SHARED = "shared"


@dataclass
class PillConfig(MoeAdapterConfig):
    """Configuration of a PILL adapter: it lets a frozen causal language model read tokens of other modalities.

    In each layer, with x_n the output of the norm before attention and h_n that of the norm before the feed-forward,
    attention reads x_n + A_attn(x_n), the feed-forward reads h_n + A_m(h_n) with the adapter A_m of the token's
    modality, and the values of tokens of gated modalities are scaled per head by tanh(W_g x). All start as zeros, so
    text stays what it was bit for bit, while a closed gate lets tokens of other modalities take attention, but bring
    nothing. See "PILL: Plug Into LLM with Adapter Expert and Attention Gate" (arXiv 2311.02126); the formulas are
    those of its authors' code.

    A token's modality follows from `input_ids` and `modality_token_ids`, or is given with each call as
    `modality_mask` `(B, S)`, for calls with `inputs_embeds`; `generate` takes it through
    [`~hf_moe.adapters.core.condition`]. A step with a single token, as in generation with a cache, is text.

    Args:
        r (`int`, defaults to 32): Width of all bottlenecks.
        modalities (`list[str]`, defaults to `["text", "image"]`): Names; a modality's number in a `modality_mask` is
            its position. The first one is what tokens are unless something else is said.
        modality_token_ids (`dict[str, int | list[int]]`, *optional*): Placeholder tokens of the other modalities,
            such as `{"image": 32000}`. Taken from the config of vision-language models (`image_token_id`) when left
            out; `{}` for none.
        attention_gate (`bool`, defaults to `True`): Whether there are gates on the values: one per key-value head.
        gate_modalities (`list[str]`, *optional*): Modalities with gates; all but the first by default.
        adapt_attention (`bool`, defaults to `True`): Whether there is an adapter before attention.
        modality_experts (`bool`, defaults to `True`): One adapter before the feed-forward for each modality; `False`
            gives all modalities the same one (for comparisons).
        last_layer_invert (`bool`, defaults to `False`): In the stage "align", swap the two adapters of the model's
            last layer. No label depends on the last layer at an image position unless it is the last one before text,
            so the image adapter there hardly learns otherwise. Only for two modalities.
        stage (`str`, defaults to `"instruct"`): In `"align"` only the adapters of the other modalities train, and
            values pass the gates unscaled; in `"instruct"` everything trains. `model.set_stage(adapter, stage)`
            switches, [`~hf_moe.trainers.PillStageCallback`] does it while training.
        attention_norm (`str`, *optional*): Name of the norm before attention, for architectures that are not known.
        feedforward_norm (`str`, *optional*): Name of the norm before the feed-forward, likewise.
        value_projection (`str`, *optional*): Name of the linear layer that makes the values, likewise.

    Raises:
        ValueError: A field has a value it cannot have, or two fields contradict each other.
        TypeError: `modality_token_ids` is no mapping to numbers.

    Example:
        ```python
        config = hf_moe.PillConfig(modality_token_ids={"image": image_id}, stage="align", task_type="CAUSAL_LM")
        model = peft.get_peft_model(language_model, config)
        ```
    """

    type_name = "HFMOE_PILL"

    r: int = 32
    modalities: list[str] = field(default_factory=lambda: ["text", "image"])
    modality_token_ids: dict[str, list[int]] | None = None
    attention_gate: bool = True
    gate_modalities: list[str] | None = None
    adapt_attention: bool = True
    modality_experts: bool = True
    last_layer_invert: bool = False
    stage: str = "instruct"
    attention_norm: str | None = None
    feedforward_norm: str | None = None
    value_projection: str | None = None

    def validate(self) -> None:
        """Checks the fields, and brings them into the form that JSON keeps."""
        self.require("r", isinstance(self.r, int) and self.r >= 1, "a whole number from 1 on")
        self.require("stage", self.stage in STAGES, "'align' or 'instruct'")
        self._check_modalities()
        self._check_token_ids()
        if self.gate_modalities is not None:
            self.gate_modalities = list(self.gate_modalities)
            unknown = [name for name in self.gate_modalities if name not in self.modalities]
            if unknown or self.modalities[0] in self.gate_modalities:
                raise ValueError(
                    f"`gate_modalities` must be some of {self.modalities[1:]}, got {self.gate_modalities!r}: values "
                    f"of {self.modalities[0]!r} tokens pass as they are."
                )
        if self.last_layer_invert and (len(self.modalities) != 2 or not self.modality_experts):
            raise ValueError(
                "`last_layer_invert=True` swaps two adapters, so it needs two `modalities` and "
                f"`modality_experts=True`; got {self.modalities!r} and {self.modality_experts}."
            )

    def _check_modalities(self) -> None:
        names: Any = self.modalities
        usable = (
            isinstance(names, (list, tuple))
            and len(names) >= 2
            and len(set(names)) == len(names)
            and all(isinstance(name, str) and name.isidentifier() and name != SHARED for name in names)
        )
        self.require("modalities", usable, f"two or more different names (letters, digits, '_'; not {SHARED!r})")
        self.modalities = list(names)

    def _check_token_ids(self) -> None:
        given: Any = self.modality_token_ids
        if given is None:
            return
        if not isinstance(given, Mapping):
            raise TypeError(f"`modality_token_ids` must map names of modalities to token ids, got {given!r}.")
        clean: dict[str, list[int]] = {}
        for name, ids in given.items():
            if name not in self.modalities[1:]:
                raise ValueError(
                    f"`modality_token_ids` names the modality {name!r}; those with tokens of their own are "
                    f"{self.modalities[1:]}. Add it to `modalities`."
                )
            ids = list(ids) if isinstance(ids, (list, tuple, set)) else [ids]
            if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in ids):
                raise TypeError(f"`modality_token_ids[{name!r}]` must be token ids (from 0 on), got {given[name]!r}.")
            clean[name] = ids
        every = [number for ids in clean.values() for number in ids]
        if len(set(every)) < len(every):
            raise ValueError(f"`modality_token_ids` has a token id twice: {clean!r}.")
        self.modality_token_ids = clean

    @property
    def gated(self) -> list[int]:
        """Numbers of the modalities whose values are gated."""
        if not self.attention_gate:
            return []
        names = self.modalities[1:] if self.gate_modalities is None else self.gate_modalities
        return [self.modalities.index(name) for name in names]

    def frozen_containers(self) -> tuple[str, ...]:
        """While aligning, only the adapters of the other modalities train."""
        return ("attn", "text", "gate") if self.stage == "align" else ()
