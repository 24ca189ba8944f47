"""`moe_t5`: T5 (1.0 and 1.1) with Mixture-of-Experts feed-forwards in encoder and decoder."""

import copy
import importlib

from huggingface_hub.dataclasses import strict
from transformers.models.t5.configuration_t5 import T5Config

from hf_moe.layer_config import layer_config
from hf_moe.lazy import lazy_exports
from hf_moe.models.configuration import MoeConfigMixin, parse_moe_layers
from hf_moe.registration import register_config


__all__ = ["MoeT5Config"]


@strict
class MoeT5Config(MoeConfigMixin, T5Config):
    r"""Configuration of [`MoeT5Model`]: every field of `T5Config` and of [`MoeConfigMixin`].

    Experts have the form of the dense feed-forward, without biases: two matrices for `feed_forward_proj="relu"`, gated
    for `"gated-gelu"`.

    Args:
        num_experts (`int` or `list[int]`, defaults to 8): A list has the encoder's MoE layers first, then the
            decoder's.
        moe_layers (`str` or `list[int]`, defaults to `"all"`): MoE layers of the encoder, as in [`parse_moe_layers`];
            `"none"` leaves it dense.
        decoder_moe_layers (`str` or `list[int]`, *optional*): The same of the decoder; as `moe_layers` by default,
            which must then fit the decoder's depth.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new router weights. Experts start as T5's
            own feed-forwards do.

    Raises:
        ValueError: neither stack has a MoE layer.

    Example:

    ```python
    >>> from hf_moe import MoeT5Config, MoeT5ForConditionalGeneration
    >>> config = MoeT5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, num_experts=4)
    >>> model = MoeT5ForConditionalGeneration(config)
    ```
    """

    model_type = "moe_t5"
    attribute_map = {**T5Config.attribute_map, "num_local_experts": "num_experts"}
    keys_to_ignore_at_inference = [
        *MoeConfigMixin.keys_to_ignore_at_inference,
        "encoder_aux_loss",
        "decoder_aux_loss",
        "encoder_last_hidden_state",
        "encoder_router_logits",
        "decoder_router_logits",
        "encoder_router_indices",
        "decoder_router_indices",
    ]

    decoder_moe_layers: str | list[int] | None = None
    initializer_range: float = 0.02

    @property
    def default_expert_type(self) -> str:
        """T5's feed-forwards have no biases."""
        return "swiglu" if self.is_gated_act else "mlp"

    @property
    def expert_activation(self) -> str:
        """What `feed_forward_proj` means."""
        return self.dense_act_fn

    @property
    def intermediate_width(self) -> int:
        """T5 calls it `d_ff`."""
        return self.d_ff

    @property
    def moe_layer_indices(self) -> list[int]:
        """Indices of the encoder's MoE layers, sorted. (The decoder has a config of its own, of which they are the
        decoder's.)"""
        return _parse(self.moe_layers, self.num_layers, "moe_layers")

    @property
    def decoder_moe_layer_indices(self) -> list[int]:
        """Indices of the decoder's MoE layers, sorted."""
        chosen = self.moe_layers if self.decoder_moe_layers is None else self.decoder_moe_layers
        return _parse(chosen, self.num_decoder_layers or self.num_layers, "decoder_moe_layers")

    def stack_config(self, is_decoder: bool) -> "MoeT5Config":
        """A copy as the encoder or the decoder reads it: its own `num_layers` and `moe_layers`."""
        config = copy.deepcopy(self)
        config.is_decoder = is_decoder
        if isinstance(self.num_experts, (list, tuple)):
            of_encoder = len(self.moe_layer_indices)
            config.num_experts = list(self.num_experts[of_encoder:] if is_decoder else self.num_experts[:of_encoder])
        if is_decoder:
            config.moe_layers = self.decoder_moe_layer_indices
            config.num_layers = self.num_decoder_layers or self.num_layers
        else:
            config.use_cache = False
        config.decoder_moe_layers = "none"  # the other stack is not its business
        return config

    @property
    def num_moe_layers(self) -> int:
        """Of both stacks; of one, in a stack's own config."""
        return len(self.moe_layer_indices) + len(self.decoder_moe_layer_indices)

    def _layer_of_each_size(self) -> list:
        stacks = [self] if self.is_decoder else [self.stack_config(False), self.stack_config(True)]
        return [
            layer_config(stack, layer)
            for stack in stacks
            for layer in dict(zip(stack.experts_per_layer, stack.moe_layer_indices, strict=True)).values()
        ]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "MoeT5Config":
        """As in transformers; asked for the decoder's, it says how many layers that has. `generate` makes its caches
        from it."""
        return self.stack_config(is_decoder=True) if decoder and not encoder and not self.is_decoder else self

    def validate_moe_layers(self) -> None:
        """Each stack's choice, and that there is a MoE layer at all."""
        if self.is_decoder:  # a stack's own config
            return
        if not self.moe_layer_indices and not self.decoder_moe_layer_indices:
            raise ValueError(
                f"`moe_layers={self.moe_layers!r}` and `decoder_moe_layers={self.decoder_moe_layers!r}` leave both "
                "stacks dense. Choose a layer of one of them, or use a T5 of transformers."
            )

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """Expert-parallel plan of both stacks."""
        one_stack = super().base_model_ep_plan
        blocks = [f"{stack}.block.*.layer.*.mlp" for stack in ("encoder", "decoder")]
        return {name.replace(self.moe_block_path, path): style for path in blocks for name, style in one_stack.items()}


def _parse(moe_layers: str | list[int], num_layers: int, name: str) -> list[int]:
    return [] if moe_layers in ("none", []) else parse_moe_layers(moe_layers, num_layers, name)


def _build() -> dict[str, type]:
    modeling = importlib.import_module(f"{__name__}.modeling_t5")
    return {
        "AutoModel": modeling.MoeT5Model,
        "AutoModelForSeq2SeqLM": modeling.MoeT5ForConditionalGeneration,
        "AutoModelForTextEncoding": modeling.MoeT5EncoderModel,
    }


register_config(MoeT5Config, _build)

_CLASSES = ("PreTrainedModel", "Model", "ForConditionalGeneration", "EncoderModel")
__getattr__, __dir__, _ = lazy_exports(__name__, {f"MoeT5{name}": ".modeling_t5" for name in _CLASSES})
