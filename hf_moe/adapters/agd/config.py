"""Configuration of adapter guidance distillation."""

from dataclasses import dataclass
from typing import ClassVar

from hf_moe.adapters.core import MoeAdapterConfig


__all__ = ["CONDITIONS", "AgdConfig"]

CONDITIONS = ("scale", "timestep", "class", "prompt")


@dataclass
class AgdConfig(MoeAdapterConfig):
    """Adapters on the attention blocks of a frozen denoiser that reproduce classifier-free guidance in one pass.

    `target_modules` is known for diffusers' models: `attn2` at all sites of a UNet, `attn1` of a DiT, `attn` of SD3
    and Flux. [`REFERENCE_SITES`] holds regular expressions for the sites the authors' code reaches.

    Args:
        architecture (`str`, defaults to `"offset"`): `"offset"` adds one vector to all tokens of a block's output,
            `"cross_attention"` lets each token attend to the conditions.
        hidden_size (`int`, defaults to 256): Width h of the encoders; even. The authors take 256 for DiT, 320 for SD.
        condition_on (`tuple[str, ...]`, *optional*): `"scale"` and some of `"timestep"`, `"class"` and `"prompt"`.
            All that the base model has when left out.
        guidance_range (`tuple[float, float]`, *optional*): Scales the adapter was trained for; others warn.
            The trainer fills it in.
        scale_multiplier (`float`, defaults to 1.0): Factor s of the scale before its Fourier features. Those of w and
            w + d have the cosine exp(-2 (pi s d)^2): from s = 10 on, neighbouring scales look unrelated.
        num_heads (`int`, defaults to 1): Heads of the cross-attention.
        dropout (`float`, defaults to 0.0): In the offset's networks, or on the attention's weights.
        zero_init (`bool`, defaults to `True`): Start as the base model. `False` draws the last layer too.
        timestep_embedding (`str`, *optional*): `"base"` for the vector the base model computes itself, `"sinusoid"`
            for sines and cosines of the timestep. The former where the model has such a module.
        condition_modules (`dict[str, str]`, *optional*): Paths of the base's modules whose outputs are the embedding
            of `"timestep"` or `"class"`. Known for diffusers' models.
        condition_sizes (`dict[str, int]`, *optional*): Widths of the conditions. Known for diffusers' models and for
            embedding modules.
        block_size (`int`, *optional*): Width d of the blocks, where it cannot be read off them.

    Raises:
        ValueError: A field has a value it cannot have.

    Example:
        ```python
        model = get_peft_model(transformer, hf_moe.AgdConfig(hidden_size=32, guidance_range=(1.0, 6.0)))
        with agd_guidance(model, 4.0):
            model(latents, timestep, class_labels)
        ```

    Paper: https://huggingface.co/papers/2503.07274

    Note: The authors' offset multiplies scales by 1000, which makes an adapter useless between the scales it has seen;
    here it is 1. Their offset does not start at zero unless asked to; here both architectures do.
    """

    type_name: ClassVar[str] = "HFMOE_AGD"

    architecture: str = "offset"
    hidden_size: int = 256
    condition_on: tuple[str, ...] | None = None
    guidance_range: tuple[float, float] | None = None
    scale_multiplier: float = 1.0
    num_heads: int = 1
    dropout: float = 0.0
    zero_init: bool = True
    timestep_embedding: str | None = None
    condition_modules: dict[str, str] | None = None
    condition_sizes: dict[str, int] | None = None
    block_size: int | None = None

    def validate(self) -> None:
        """Raises for values that cannot work."""
        architectures = ("offset", "cross_attention")
        self.require("architecture", self.architecture in architectures, "'offset' or 'cross_attention'")
        self.require("hidden_size", self.hidden_size >= 2 and self.hidden_size % 2 == 0, "even and at least 2")
        divides = self.num_heads >= 1 and self.hidden_size % self.num_heads == 0
        self.require("num_heads", divides, f"a divisor of `hidden_size` ({self.hidden_size})")
        self.require("dropout", 0.0 <= self.dropout < 1.0, "at least 0 and below 1")
        self.require("scale_multiplier", self.scale_multiplier > 0, "positive")
        self.require("block_size", self.block_size is None or self.block_size >= 1, "at least 1")
        embeddings = (None, "base", "sinusoid")
        self.require("timestep_embedding", self.timestep_embedding in embeddings, "'base' or 'sinusoid'")
        if self.condition_on is not None:
            self.condition_on = tuple(self.condition_on)
            known = set(self.condition_on) <= set(CONDITIONS) and "scale" in self.condition_on
            self.require("condition_on", known, f"'scale' and any of {CONDITIONS[1:]}")
            self.condition_on = tuple(name for name in CONDITIONS if name in self.condition_on)
        if self.guidance_range is not None:
            scales = tuple(self.guidance_range)
            self.guidance_range = scales  # pyright: ignore[reportAttributeAccessIssue]  (checked in the next lines)
            ordered = len(scales) == 2 and scales[0] <= scales[1]
            self.require("guidance_range", ordered, "two scales, the lower one first")
        for name in ("condition_modules", "condition_sizes"):
            unknown = set(getattr(self, name) or {}) - set(CONDITIONS[1:])
            self.require(name, not unknown, f"a mapping from some of {CONDITIONS[1:]}")
