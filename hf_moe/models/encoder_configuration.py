"""What the configs of encoder backbones have in common, on top of [`MoeConfigMixin`]."""

from .configuration import MoeConfigMixin


__all__ = ["MoeEncoderConfigMixin"]


class MoeEncoderConfigMixin(MoeConfigMixin):
    """[`MoeConfigMixin`] for BERT and its relatives: two-matrix experts with biases, and no decoder.

    Note: `chunk_size_feed_forward` cuts the dense layers' feed-forwards alone; a router sees all tokens at once.

    Raises:
        ValueError: `is_decoder` or `add_cross_attention`.
    """

    moe_block_path = "encoder.layer.*.mlp"

    @property
    def default_expert_type(self) -> str:
        """Two matrices with biases."""
        return "mlp_bias"

    def validate_architecture(self):
        """[`MoeConfigMixin`]'s rules, and those of an encoder."""
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` must be False, got {getattr(self, name)}: `{self.model_type}` is an encoder. Use a "
                    "decoder such as `moe_gpt2` or `moe_llama`."
                )
        super().validate_architecture()
