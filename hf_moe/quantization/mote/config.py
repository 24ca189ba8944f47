"""What a packed checkpoint says about its experts, in `config.json`."""

from transformers.utils.quantization_config import QuantizationConfigMixin

from .packing import PACKINGS


__all__ = ["MoteQuantizationConfig"]


class MoteQuantizationConfig(QuantizationConfigMixin):
    """Ternary experts in packed bytes ([MoTE](https://huggingface.co/papers/2506.14435)). Written by
    [`~hf_moe.export_ternary`]; nobody has to make one by hand.

    Args:
        packing (`str`, defaults to `"2bit"`): `"2bit"` (four weights in a byte) or `"base3"` (five).
        version (`int`, defaults to 1): Of the layout.

    Raises:
        ValueError: an unknown packing, or a layout newer than this package.
    """

    def __init__(self, packing: str = "2bit", version: int = 1, **kwargs):
        self.quant_method = "mote"
        self.packing = packing
        self.version = version
        if packing not in PACKINGS:
            raise ValueError(f"`packing` must be one of {list(PACKINGS)}, got {packing!r}.")
        if version != 1:
            raise ValueError(f"`version` of the packed experts must be 1, got {version}. Update hf-moe.")
