"""Configuration of `moe_llava`: everything about experts is kept once, in `text_config`."""

from dataclasses import field, fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.llava.configuration_llava import LlavaConfig

from hf_moe.models.configuration import MoeConfigMixin, parse_moe_layers
from hf_moe.registration import load_modeling


__all__ = ["PLACEMENTS", "MoeLlavaConfig", "TextFieldsMixin", "moe_text_config", "paper_fields"]

#: The paper's names for choices of layers, besides "first_half" and "second_half".
PLACEMENTS = {"sparse": "every:2:0", "dense": "all"}
# Dense language models and the backbone each becomes.
BACKBONES = {
    "llama": "moe_llama",
    "mistral": "moe_llama",
    "phi": "moe_phi",
    "qwen2": "moe_qwen2",
    "qwen3": "moe_qwen3",
    "stablelm": "moe_stablelm",
}
# Llama's, and room for the image token.
IMAGE_VOCABULARY = 32064
# What only the dense config says, or a MoE config says otherwise.
NOT_CARRIED = ("architectures", "auto_map", "model_type", "transformers_version", "_name_or_path")
# Fields that live in `text_config`, and what is derived from them there.
TEXT_FIELDS = frozenset(f.name for f in fields(MoeConfigMixin)) - {"auto_map"}
DERIVED = frozenset(
    "experts_per_layer has_router_penalty moe_layer_indices num_local_experts num_routing_targets "
    "num_zero_computation_experts".split()
)


def paper_fields(num_hidden_layers: int, **changes: Any) -> dict[str, Any]:
    """The MoE fields of the paper's scripts, with those of `changes` in their place.

    4 experts of which each token takes 2, every second layer from the first on, capacity factor 1.5 in training. The
    balance loss counts first choices before any is dropped, and weights that capacity leaves are renormalised, as in
    the released code. It adds 0.01 times the *sum* over layers, here `router_aux_loss_coef` = 0.01 L times the mean
    over the L MoE layers.

    Args:
        num_hidden_layers (`int`): Layers of the language model.
        **changes: Fields of [`~hf_moe.models.configuration.MoeConfigMixin`]; `moe_layers` may be `"sparse"` or
            `"dense"` too.

    Returns:
        `dict`: Fields of the text config.
    """
    layers = changes.pop("moe_layers", "sparse")
    layers = PLACEMENTS.get(layers, layers) if isinstance(layers, str) else layers
    chosen = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_layers": layers,
        "expert_capacity_factor": 1.5,
        "router_aux_loss_coef": 0.01 * len(parse_moe_layers(layers, num_hidden_layers)),
    }
    if "router_type" not in changes:
        own = {"balance_first_choice": True, "norm_survivors": True}
        chosen["router_config"] = {**own, **changes.pop("router_config", {})}
    return {**chosen, **changes}


def moe_text_config(text_config: Any, **moe_fields: Any) -> PreTrainedConfig:
    """The config of the MoE language model for that of a dense or MoE one.

    Args:
        text_config (`PreTrainedConfig` or `dict`): Of a type that is a key or a value of `BACKBONES`, or any other MoE
            decoder of this package.
        **moe_fields: Fields of [`~hf_moe.models.configuration.MoeConfigMixin`]. For a dense model the others are the
            paper's ([`paper_fields`]), for a MoE they stay as they are.

    Returns:
        `PreTrainedConfig`: A new config, or `text_config` itself if nothing is to change.

    Raises:
        ValueError: the type is no decoder with a backbone here.
    """
    as_dict = dict(text_config) if isinstance(text_config, dict) else text_config.to_dict()
    model_type = as_dict.get("model_type", "moe_llama")
    if model_type in BACKBONES:
        carried = {name: value for name, value in as_dict.items() if name not in NOT_CARRIED}
        if model_type == "mistral" and carried.pop("sliding_window", None) is not None:
            raise ValueError(
                "`text_config` has a sliding window, which `moe_llama` has not: set `sliding_window=None`."
            )
        config_class: Any = type(AutoConfig.for_model(BACKBONES[model_type]))
        depth = carried.get("num_hidden_layers", config_class.num_hidden_layers)
        return config_class(**carried, **paper_fields(depth, **moe_fields))
    if isinstance(text_config, PreTrainedConfig) and not moe_fields:
        return text_config
    if isinstance(moe_fields.get("moe_layers"), str):
        moe_fields["moe_layers"] = PLACEMENTS.get(moe_fields["moe_layers"], moe_fields["moe_layers"])
    as_dict.pop("model_type", None)
    return AutoConfig.for_model(model_type, **{**as_dict, **moe_fields})


def is_moe_decoder(text_config: Any) -> bool:
    """Whether a config is that of a MoE decoder of this package in Llama's layout, the one that LLaVA's heads know."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    from hf_moe.models.modeling import MoeModelMixin

    kind: Any = type(text_config)
    is_moe = isinstance(text_config, MoeConfigMixin) and text_config.moe_block_path == "layers.*.mlp"
    if not is_moe or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    model_class: Any = MODEL_MAPPING[kind]
    return issubclass(model_class, MoeModelMixin)


class TextFieldsMixin:
    """A composite config whose fields about experts live in `text_config`, and are read and set here too."""

    def __setstate__(self, state: dict) -> None:
        # A config unpickled in a fresh process never runs `__post_init__`.
        self.__dict__.update(state)
        load_modeling(type(self))

    def __getattr__(self, name: str) -> Any:
        # Asked only for what the composite has not.
        text_config = self.__dict__.get("text_config")
        if name in TEXT_FIELDS | DERIVED and text_config is not None:
            return getattr(text_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        text_config = self.__dict__.get("text_config")
        if name in TEXT_FIELDS and text_config is not None:
            setattr(text_config, name, value)
        else:
            super().__setattr__(name, value)


@strict
class MoeLlavaConfig(TextFieldsMixin, LlavaConfig):
    r"""Configuration of [`MoeLlavaModel`]: every field of `LlavaConfig`, and those of
    [`~hf_moe.models.configuration.MoeConfigMixin`], which are handed on to `text_config` and can be read and set here.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*): Of a MoE decoder (`moe_llama`, `moe_qwen2`,
            `moe_qwen3`, `moe_stablelm`, `moe_phi`, ...), or of the dense one, which becomes it with the paper's
            settings: 4 experts, 2 per token, every second layer, capacity factor 1.5, balance loss 0.01 per layer.
        vision_config (`PreTrainedConfig` or `dict`, *optional*): Of any tower that transformers' LLaVA accepts.
        moe_layers (`str` or `list[int]`, *optional*): The paper's `moe_mode`: `"first_half"`, `"second_half"`,
            `"sparse"` (0, 2, 4, ...), `"dense"` (all), or anything
            [`~hf_moe.models.configuration.parse_moe_layers`] reads.
        lm_head_bias (`bool`, *optional*, defaults to `False`): Whether the language-model head has a bias.

    Note: The reference keeps a capacity at evaluation too, also while it generates, where an answer then depends
    on its batch. Here nothing is dropped at evaluation; `router_config={"eval_capacity_factor": 2.0}` is the
    reference. Note: The reference draws the second expert with Gumbel noise, at evaluation too, which the paper does
    not say; `router_config={"noise": "gumbel_second"}` does so in training.

    Raises:
        ValueError: the image token is not in the vocabulary, or a text type without a MoE backbone.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig, StableLmConfig
    >>> from hf_moe import MoeLlavaConfig, MoeLlavaForConditionalGeneration
    >>> vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    ...                           image_size=16, patch_size=8)
    >>> text = StableLmConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                       num_attention_heads=4, num_key_value_heads=4)
    >>> config = MoeLlavaConfig(vision_config=vision, text_config=text, image_token_index=99, num_experts=4)
    >>> model = MoeLlavaForConditionalGeneration(config)
    ```
    """

    model_type = "moe_llava"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "aux_loss",
        "router_logits",
        "router_indices",
        "image_hidden_states",
    ]
    sub_configs_defaults = {
        "vision_config": LlavaConfig.sub_configs_defaults["vision_config"],
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="moe_llama",
            init_kwargs={"vocab_size": IMAGE_VOCABULARY, **paper_fields(32)},
        ),
    }

    lm_head_bias: bool = False
    # TRL reads `config.auto_map` of every model it loads by path; the Hub shim fills it.
    auto_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        load_modeling(type(self))
        moe_fields = {name: kwargs.pop(name) for name in TEXT_FIELDS & kwargs.keys()}
        if self.text_config is not None or moe_fields:
            default = {"model_type": "llama", "vocab_size": IMAGE_VOCABULARY}
            self.text_config = moe_text_config(self.text_config or default, **moe_fields)
        super().__post_init__(**kwargs)
        # `@strict` checks again, but wraps what it catches in an error that is no ValueError.
        self.validate_architecture()

    def validate_architecture(self):
        """Checked when the config is constructed and saved.

        Raises:
            ValueError: see [`MoeLlavaConfig`].
        """
        text: Any = self.text_config
        if not is_moe_decoder(text):
            raise ValueError(
                f"`text_config` is of type {text.model_type!r}, which is no MoE decoder of hf_moe. Use one of "
                f"{sorted(set(BACKBONES.values()))}, or a dense type that becomes one: {sorted(BACKBONES)}."
            )
        text.validate_architecture()
        if not 0 <= self.image_token_index < text.vocab_size:
            raise ValueError(
                f"`image_token_index` ({self.image_token_index}) is not in the vocabulary of the language model "
                f"(`text_config.vocab_size` = {text.vocab_size}). Add the image token to the tokenizer, resize the "
                "embeddings, and give its id."
            )
