"""Sizes of a Read-ME model, which differ from layer to layer."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from hf_moe.registration import load_modeling


__all__ = ["ReadMeConfig"]


@strict
class ReadMeConfig(LlamaConfig):
    r"""Configuration of [`ReadMeModel`]: a Llama whose feed-forwards keep part of their channels, the part that one
    router, the same for all layers, chooses for each token (Read-ME, 2410.19123).

    Expert j of layer l is the subset M_j of the dense feed-forward's channels. What all experts of a layer keep,
    R = intersection of M_j, is stored once and called `shared`; `experts` hold M_j without R. R differs per layer, so
    sizes are lists. Defaults are those of a 7B Llama cut in halves, R not taken out.

    Args:
        num_experts (`int`, *optional*, defaults to 7): Experts, N; one per domain.
        num_experts_per_tok (`int`, *optional*, defaults to 1): Always 1.
        intermediate_size (`int`, *optional*, defaults to 11008): Channels of the dense feed-forward.
        expert_sizes (`list[int]` or `int`, *optional*): Channels an expert has besides the shared ones, per layer;
            half of `intermediate_size` by default. 0 where the layer has no choice to make.
        shared_sizes (`list[int]` or `int`, *optional*, defaults to 0): |R| per layer.
        router_hidden_size (`int`, *optional*, defaults to 512): Width of the router.
        router_num_heads (`int`, *optional*, defaults to 4): Its attention heads.
        router_layers (`int`, *optional*, defaults to 1): Its decoder blocks.
        output_router_logits (`bool`, *optional*, defaults to `False`): Return `router_logits` `(B, S, N)`.
        upcycling (`dict`, *optional*): Provenance written by [`~hf_moe.upcycling.convert_to_readme`].

    Raises:
        ValueError: sizes that do not fit together, `mlp_bias`, `num_experts_per_tok` above 1.

    Example:

    ```python
    >>> from hf_moe import ReadMeConfig, ReadMeForCausalLM
    >>> config = ReadMeConfig(
    ...     hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_experts=3,
    ...     expert_sizes=[48, 40], shared_sizes=[16, 24], router_hidden_size=32,
    ... )
    >>> model = ReadMeForCausalLM(config)
    ```
    """

    model_type = "read_me"
    attribute_map = {"num_local_experts": "num_experts"}
    keys_to_ignore_at_inference = ["past_key_values", "router_logits"]
    # The dense plans name feed-forward matrices that are not there.
    base_model_tp_plan = None
    base_model_pp_plan = None

    num_experts: int = 7
    num_experts_per_tok: int = 1
    expert_sizes: list[int] | int | None = None
    shared_sizes: list[int] | int = 0
    router_hidden_size: int = 512
    router_num_heads: int = 4
    router_layers: int = 1
    output_router_logits: bool = False
    upcycling: dict[str, Any] | None = None
    # TRL reads `config.auto_map` of every model it loads by path; the Hub shim fills it.
    auto_map: dict[str, str] = field(default_factory=dict)

    # What a router and a bank of experts read from any config of this package.
    expert_type = "swiglu"
    expert_capacity_factor = None

    def __post_init__(self, **kwargs):
        load_modeling(type(self))
        if self.expert_sizes is None:
            self.expert_sizes = self.intermediate_size // 2
        for name in ("expert_sizes", "shared_sizes"):
            value = getattr(self, name)
            if isinstance(value, int):
                setattr(self, name, [value] * self.num_hidden_layers)
        super().__post_init__(**kwargs)
        # `@strict` checks again, but wraps what it catches in an error that is no ValueError.
        self.validate_architecture()

    def __setstate__(self, state: dict) -> None:
        # A config unpickled in a fresh process never runs `__post_init__`.
        self.__dict__.update(state)
        load_modeling(type(self))

    @property
    def expert_activation(self) -> str:
        """Name of the activation function of the experts."""
        return self.hidden_act

    @property
    def num_routing_targets(self) -> int:
        """N."""
        return self.num_experts

    def validate_architecture(self):
        """Cross-field rules, checked when the config is constructed and saved.

        Raises:
            ValueError: names the field, its value, what is allowed.
        """
        super().validate_architecture()
        if self.num_experts < 1:
            raise ValueError(f"`num_experts` must be at least 1, got {self.num_experts}.")
        if self.num_experts_per_tok != 1:
            raise ValueError(
                f"`num_experts_per_tok` must be 1, got {self.num_experts_per_tok}: the router chooses one expert per "
                "token, with weight 1."
            )
        if self.mlp_bias:
            raise ValueError("`mlp_bias=True` is not supported by `read_me`: its feed-forwards have no biases.")
        names = ("expert_sizes", "shared_sizes")
        sizes: Any
        for name in names:
            sizes = getattr(self, name)
            if len(sizes) != self.num_hidden_layers or any(size < 0 for size in sizes):
                raise ValueError(
                    f"`{name}` must have one number from 0 on for each of the {self.num_hidden_layers} layers, got "
                    f"{sizes}."
                )
        for layer, sizes in enumerate(zip(*(getattr(self, name) for name in names), strict=True)):
            expert, shared = sizes
            if not 1 <= expert + shared <= self.intermediate_size:
                raise ValueError(
                    f"`expert_sizes` + `shared_sizes` of layer {layer} must be between 1 and `intermediate_size` "
                    f"({self.intermediate_size}), got {expert} + {shared}."
                )
        if self.router_layers < 1:
            raise ValueError(f"`router_layers` must be at least 1, got {self.router_layers}.")
        if self.router_num_heads < 1 or self.router_hidden_size % (2 * self.router_num_heads):
            raise ValueError(
                f"`router_hidden_size` ({self.router_hidden_size}) must be a multiple of twice `router_num_heads` "
                f"({self.router_num_heads}): rotary positions turn pairs of channels."
            )
