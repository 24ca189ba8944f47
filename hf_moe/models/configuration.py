"""The MoE fields that every backbone config gains, and what is derived from them."""

from dataclasses import dataclass, field
from typing import Any

from hf_moe.layer_config import layer_config
from hf_moe.registration import load_modeling


__all__ = ["MoeConfigMixin", "parse_moe_layers"]

RESIDUAL_COMBINES = ("softmax", "sum")


def parse_moe_layers(moe_layers: str | list[int], num_hidden_layers: int, name: str = "moe_layers") -> list[int]:
    """Which decoder layers are MoE layers.

    Args:
        moe_layers (`str` or `list[int]`): `"all"`, `"every:m"` (layers m - 1, 2m - 1, ...), `"every:m:i"` (layers
            i, i + m, ...), `"first_half"`, `"second_half"`, or indices.
        num_hidden_layers (`int`): Number of decoder layers.
        name (`str`, defaults to `"moe_layers"`): What messages call the first argument.

    Returns:
        `list[int]`: Sorted indices.

    Raises:
        ValueError: not one of these forms, an index out of range or twice, or no layer at all.
    """
    everything = list(range(num_hidden_layers))
    if isinstance(moe_layers, str):
        kind, _, step = moe_layers.partition(":")
        if moe_layers == "all":
            chosen = everything
        elif moe_layers == "first_half":
            chosen = everything[: num_hidden_layers // 2]
        elif moe_layers == "second_half":
            chosen = everything[num_hidden_layers // 2 :]
        elif kind == "every" and (steps := _steps(step)) is not None:
            chosen = everything[steps]
        else:
            raise ValueError(
                f"`{name}` must be 'all', 'every:<step>', 'first_half', 'second_half' or a list of layer indices, "
                f"got {moe_layers!r}."
            )
    else:
        outside = [i for i in moe_layers if not 0 <= i < num_hidden_layers]
        if outside:
            raise ValueError(
                f"`{name}` has {outside}, but the model has {num_hidden_layers} layers: use indices from 0 to "
                f"{num_hidden_layers - 1}."
            )
        if len(set(moe_layers)) != len(moe_layers):
            raise ValueError(f"`{name}` names a layer twice: {list(moe_layers)}.")
        chosen = sorted(moe_layers)
    if not chosen:
        raise ValueError(f"`{name}={moe_layers!r}` selects none of the {num_hidden_layers} layers.")
    return chosen


def _steps(text: str) -> slice | None:
    step, _, first = text.partition(":")
    if not (step.isdigit() and int(step) > 0) or not (first.isdigit() or (not first and not text.endswith(":"))):
        return None
    return slice(int(first) if first else int(step) - 1, None, int(step))


@dataclass(kw_only=True)
class MoeConfigMixin:
    """Fields that turn a dense config into a MoE config. Put it before the dense config class:
    `class MoeLlamaConfig(MoeConfigMixin, LlamaConfig)`.

    Args:
        num_experts (`int` or `list[int]`, defaults to 8): Feed-forward experts per MoE layer, N; a list has the number
            of each MoE layer, first to last (the pyramid of PR-MoE).
        num_experts_per_tok (`int`, defaults to 2): Experts each token is sent to, K.
        moe_layers (`str` or `list[int]`, defaults to `"all"`): See [`parse_moe_layers`].
        moe_intermediate_size (`int`, *optional*): Width I of one expert; the dense feed-forward's by default.
        router_type (`str`, defaults to `"softmax_topk"`): See `hf_moe.list_routers()`.
        router_config (`dict`, *optional*): Keyword arguments of that router.
        expert_type (`str`, *optional*): See `hf_moe.list_experts()`; the backbone's own form by default.
        expert_config (`dict`, *optional*): Options of that bank.
        num_shared_experts (`int`, defaults to 0): Experts every token passes through.
        shared_expert_intermediate_size (`int`, *optional*): Width of one; `moe_intermediate_size` by default.
        shared_expert_gate (`bool`, defaults to `False`): Weigh them with a sigmoid gate (Qwen2-MoE).
        residual_expert (`bool`, defaults to `False`): A dense branch beside the experts (PR-MoE).
        residual_combine (`str`, defaults to `"softmax"`): `"softmax"` weighs experts and dense branch token by token
            with a learned softmax, as the released code; `"sum"` adds them, as the paper's text.
        num_zero_experts, num_copy_experts, num_constant_experts (`int`, default 0): Zero-computation experts (MoE++).
        expert_capacity_factor (`float`, *optional*): Capacity in training; `None` drops nothing.
        router_tau (`float`, defaults to 1.0): Weight of zero-computation experts in balance loss and capacity.
        router_aux_loss_coef (`float`, defaults to 0.01): Weight of the load-balance loss.
        router_z_loss_coef (`float`, defaults to 0.0): Weight of the router z-loss.
        balance_mode (`str`, defaults to `"micro"`): Where expert frequencies are taken from: `"micro"` this
            micro-batch, `"rank"`, `"running"`, `"lagged"`, `"blend"` (2501.11873; see [`LoadBalancer`]).
        balance_local_fraction (`float`, defaults to 0.0): Share of an extra micro-batch term.
        router_bias_update_speed (`float`, defaults to 0.0): Step of the loss-free selection bias (DeepSeek-V3).
        output_router_logits (`bool`, defaults to `False`): Return `router_logits`, `router_indices` and `aux_loss`.
            The balance loss itself is applied in training whatever this says.
        upcycling (`dict`, *optional*): Provenance written by [`upcycle`].
    """

    num_experts: int | list[int] = 8
    num_experts_per_tok: int = 2
    moe_layers: str | list[int] = "all"
    moe_intermediate_size: int | None = None
    router_type: str = "softmax_topk"
    router_config: dict[str, Any] = field(default_factory=dict)
    expert_type: str | None = None
    expert_config: dict[str, Any] = field(default_factory=dict)
    num_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    residual_expert: bool = False
    residual_combine: str = "softmax"
    num_zero_experts: int = 0
    num_copy_experts: int = 0
    num_constant_experts: int = 0
    expert_capacity_factor: float | int | None = None
    router_tau: float | int = 1.0
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.0
    balance_mode: str = "micro"
    balance_local_fraction: float | int = 0.0
    router_bias_update_speed: float | int = 0.0
    output_router_logits: bool = False
    upcycling: dict[str, Any] | None = None
    # TRL reads `config.auto_map` of every model it loads by path; the Hub shim fills it.
    auto_map: dict[str, str] = field(default_factory=dict)

    #: Trainer takes all other outputs for predictions.
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "router_logits", "router_indices"]
    #: Where a decoder layer keeps its block, with `*` for the layer; parallel plans are written with it.
    moe_block_path = "layers.*.mlp"

    def __post_init__(self, **kwargs):
        load_modeling(type(self))
        super().__post_init__(**kwargs)
        if self.is_heterogeneous:
            raise ValueError(
                f"`per_layer_config` is not supported by `{self.model_type}`: all its MoE layers are alike. Choose "
                "which layers they are with `moe_layers`."
            )
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_width
        if self.shared_expert_intermediate_size is None:
            self.shared_expert_intermediate_size = self.moe_intermediate_size
        if self.expert_type is None:
            self.expert_type = self.default_expert_type
        # `@strict` checks again, but wraps what it catches in an error that is no ValueError.
        self.validate_architecture()

    def __setstate__(self, state: dict) -> None:
        # A config unpickled in a fresh process never runs `__post_init__`.
        self.__dict__.update(state)
        load_modeling(type(self))

    def to_diff_dict(self) -> dict[str, Any]:
        """As in transformers, but derived fields are always written: what they default to depends on other fields,
        so equality with the defaults of a default config says nothing."""
        written = super().to_diff_dict()
        for name in ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_type"):
            written[name] = getattr(self, name)
        return written

    # -- what a backbone may say differently ---------------------------------------------------------------------
    @property
    def default_expert_type(self) -> str:
        """Expert bank of the same form as the backbone's dense feed-forward."""
        return "swiglu_bias" if getattr(self, "mlp_bias", False) else "swiglu"

    @property
    def expert_activation(self) -> str:
        """Name of the activation function of the experts."""
        return self.hidden_act

    @property
    def intermediate_width(self) -> int:
        """Width of the backbone's dense feed-forward."""
        return self.intermediate_size

    # -- derived -------------------------------------------------------------------------------------------------
    @property
    def num_zero_computation_experts(self) -> int:
        """Zero, copy and constant experts together."""
        return self.num_zero_experts + self.num_copy_experts + self.num_constant_experts

    @property
    def experts_per_layer(self) -> list[int]:
        """Feed-forward experts of each MoE layer, first to last."""
        counts = self.num_experts
        return list(counts) if isinstance(counts, (list, tuple)) else [counts] * self.num_moe_layers

    @property
    def num_routing_targets(self) -> int:
        """Everything a router can choose: feed-forward and zero-computation experts; of the widest layer, where the
        layers differ."""
        counts = self.num_experts
        widest = max(counts) if isinstance(counts, (list, tuple)) else counts
        return widest + self.num_zero_computation_experts

    @property
    def moe_layer_indices(self) -> list[int]:
        """Indices of the MoE layers, sorted."""
        return parse_moe_layers(self.moe_layers, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        """How many there are."""
        return len(self.moe_layer_indices)

    @property
    def has_router_penalty(self) -> bool:
        """Whether the routers add a loss of their own in training (`RouterOutput.penalty`)."""
        from hf_moe.routing.registry import router_class

        return router_class(self.router_type).has_penalty(**self.router_config)

    # -- parallel plans, read by `from_pretrained(..., distributed_config=...)` -------------------------------------
    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """Tensor-parallel plan: the dense model's, with the blocks this config has in place of its feed-forwards.

        Experts with biases stay whole: transformers has no style that shards them (`ep_size` splits them by expert).
        """
        dense_plan = super().base_model_tp_plan
        if not dense_plan:
            return None
        path, plan = self.moe_block_path, dict(dense_plan)
        if len(self.moe_layer_indices) == self.num_hidden_layers:
            plan = {name: style for name, style in plan.items() if not name.startswith(f"{path}.")}
        bank = self._expert_bank
        if not bank.biased:
            up = {"gate_up_proj": "packed_colwise"} if bank.gated else {"up_proj": "colwise"}
            for name, style in {**up, "down_proj": "rowwise"}.items():
                plan[f"{path}.experts.{name}"] = style
            plan[f"{path}.experts"] = "moe_tp_experts"
        branches = {"shared_experts": self.num_shared_experts, "residual_expert": self.residual_expert}
        for branch in (name for name, present in branches.items() if present):
            for name in ("gate_proj", "up_proj") if bank.gated else ("up_proj",):
                plan[f"{path}.{branch}.{name}"] = "colwise"
            plan[f"{path}.{branch}.down_proj"] = "rowwise"
        return plan

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """Expert-parallel plan: each rank keeps some of the experts, whole."""
        names = ["gate_up_proj" if self._expert_bank.gated else "up_proj", "down_proj"]
        if self._expert_bank.biased:
            names += [f"{name}_bias" for name in names]
        plan = {f"{self.moe_block_path}.experts.{name}": "grouped_gemm" for name in names}
        return {**plan, f"{self.moe_block_path}.experts": "ep_dispatch_experts"}

    @property
    def _expert_bank(self) -> type:
        from hf_moe.experts.registry import experts_class

        return experts_class(self.expert_type)

    def validate_moe_layers(self) -> None:
        """Refuses a choice of layers that cannot be.

        Raises:
            ValueError: see [`parse_moe_layers`].
        """
        parse_moe_layers(self.moe_layers, self.num_hidden_layers)

    def validate_architecture(self):
        """Cross-field rules, checked when the config is constructed and saved.

        Raises:
            ValueError: names the field, its value, what is allowed.
        """
        if hasattr(super(), "validate_architecture"):
            super().validate_architecture()
        from hf_moe.experts.registry import experts_class
        from hf_moe.routing.load_balancer import validate_balance_options
        from hf_moe.routing.registry import validate_router

        self.validate_moe_layers()
        counts = self._validate_num_experts(self.num_moe_layers)
        for name in ("num_shared_experts", "num_zero_experts", "num_copy_experts", "num_constant_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        targets = min(counts) + self.num_zero_computation_experts
        if not 1 <= self.num_experts_per_tok <= targets:
            raise ValueError(
                f"`num_experts_per_tok` must be between 1 and the number of experts ({targets}), got "
                f"{self.num_experts_per_tok}."
            )
        for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.residual_combine not in RESIDUAL_COMBINES:
            raise ValueError(
                f"`residual_combine` must be one of {list(RESIDUAL_COMBINES)}, got {self.residual_combine!r}."
            )
        if self.expert_capacity_factor is not None and not self.expert_capacity_factor > 0:
            raise ValueError(
                "`expert_capacity_factor` must be above 0, or None to drop nothing, got "
                f"{self.expert_capacity_factor}."
            )
        if not 0 < self.router_tau < float("inf"):
            raise ValueError(f"`router_tau` must be above 0 and finite, got {self.router_tau}.")
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be at least 0 and finite, got {getattr(self, name)}.")
        validate_balance_options(self.balance_mode, self.balance_local_fraction, self.router_bias_update_speed)
        if self.expert_type is not None:
            experts_class(self.expert_type).validate_options(self.expert_config)
        if not isinstance(self.num_experts, (list, tuple)):
            validate_router(self)
        else:
            for config in self._layer_of_each_size():
                validate_router(config)

    def _layer_of_each_size(self) -> list[Any]:
        layers = dict(zip(self.experts_per_layer, self.moe_layer_indices, strict=True))
        return [layer_config(self, layer) for layer in layers.values()]

    def _validate_num_experts(self, num_moe_layers: int) -> list[int]:
        """The number of each MoE layer, or the one number of all."""
        counts = self.num_experts
        if isinstance(counts, (list, tuple)):
            if len(counts) != num_moe_layers:
                raise ValueError(
                    f"`num_experts` must be one number or a list with one for each of the {num_moe_layers} MoE layers "
                    f"(`moe_layers={self.moe_layers!r}`), got {len(counts)}: {list(counts)}."
                )
            if min(counts) < 1:
                raise ValueError(f"`num_experts` must be at least 1 in every MoE layer, got {list(counts)}.")
            return list(counts)
        if counts < 1:
            raise ValueError(f"`num_experts` must be at least 1, got {counts}.")
        return [counts]
