"""The router pipeline: logits -> scores -> choice -> index -> weights -> post-processors -> padding mask.

Shapes: T tokens, D hidden, N experts (all, zero-computation ones included), K per token.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .capacity import CAPACITY_POLICIES, apply_capacity, pack_slots
from .output import RouterOutput, RoutingContext
from .permutation import PermutationLocalSearch, parse_permutation_search
from .schedules import parse_schedules


__all__ = ["BaseRouter", "LinearRouter"]

# Renormalisation divides by a sum that sigmoid scores can bring close to 0.
EPSILON = 1e-20
NOISES = (None, "gaussian", "jitter", "gumbel", "gumbel_second")


class BaseRouter(nn.Module):
    """Sends each token to `K` of `N` experts. A new router overrides the steps it changes, nothing else.

    The steps, in the order `forward` runs them: `compute_logits`, `scores`, `choice_scores` (no gradient),
    `select`, `weigh`, capacity, padding mask. Weights are gathered from the *unbiased* scores, so that selection
    biases and noise never enter the output. Everything is float32 until the weights are cast at the end.

    Args:
        config: A model config with `hidden_size`, `num_routing_targets`, `num_experts_per_tok`.
        layer_idx (`int`): Index of the decoder layer.
        temperature (`float`, defaults to 1.0): Divides the logits; kept in a 0-dim buffer that a schedule may write.
        norm_topk_prob (`bool`, defaults to `True`): Renormalise the chosen weights to sum 1.
        routed_scaling_factor (`float`, defaults to 1.0): Multiplies the weights.
        capacity_policy (`str`, defaults to `"order"`): See [`apply_capacity`].
        min_capacity (`int`, defaults to 0): Assignments every expert takes whatever the capacity factor says; 4 in
            DeepSpeed-MoE ([2201.05596](https://huggingface.co/papers/2201.05596)).
        norm_survivors (`bool`, defaults to `False`): Renormalise again what capacity leaves of a token (GShard).
        balance_first_choice (`bool`, defaults to `False`): The balance loss counts first choices only (GShard).
        eval_capacity_factor (`float`, *optional*): Capacity at evaluation, in place of `expert_capacity_factor`; by
            default nothing is dropped there, because a token's output would depend on its batch.
        schedules (`dict`, *optional*): Schedules of this router's buffers by name; see `RouterScheduleCallback`.
        permutation_search (`dict`, *optional*): Fields of [`~hf_moe.routing.permutation.PermutationOptions`]: learn
            which expert listens to which output of this gate first (COMET, 2306.02824).
    """

    router_type: str = ""
    #: True where the router reads `RoutingContext.prev_state` and returns a state: the layers then hand it on.
    carries_state: bool = False
    #: True where a token's route depends on other tokens of the batch, later ones included.
    non_causal: bool = False
    #: True where the router reads `RoutingContext.input_ids`, and so refuses `inputs_embeds`.
    needs_input_ids: bool = False
    #: True where tokens may leave slots empty by choice: the experts are then handed as many as the batch needs.
    variable_slots: bool = False
    #: True where the gate is a sum of `num_experts_per_tok` trees, each of which may have its own permutation.
    has_trees: bool = False

    temperature: torch.Tensor

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        temperature: float = 1.0,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        capacity_policy: str = "order",
        min_capacity: int = 0,
        norm_survivors: bool = False,
        balance_first_choice: bool = False,
        eval_capacity_factor: float | None = None,
        schedules: dict | None = None,
        permutation_search: dict | None = None,
    ):
        super().__init__()
        self.layer_idx = layer_idx
        self.hidden_size = config.hidden_size
        self.num_experts = config.num_routing_targets
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.capacity_factor = config.expert_capacity_factor
        self.capacity_policy = capacity_policy
        self.min_capacity = min_capacity
        self.norm_survivors = norm_survivors
        self.balance_first_choice = balance_first_choice
        self.eval_capacity_factor = eval_capacity_factor
        self.initializer_range = config.initializer_range
        self.initial_temperature = float(temperature)
        self.register_buffer("temperature", torch.tensor(self.initial_temperature))
        self.permutation: PermutationLocalSearch | None = None
        if permutation_search is not None:
            search = parse_permutation_search(permutation_search)
            number = config.num_experts_per_tok if search.per_tree else 1
            self.permutation = PermutationLocalSearch(self.num_experts, search, number)
            self.variable_slots = True  # N of them while it searches

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        """Refuses option values that cannot work; runs when the model config is constructed.

        Raises:
            ValueError: names the option, its value and what is allowed.
        """
        temperature = options.get("temperature", 1.0)
        if not temperature > 0:
            raise ValueError(f"`router_config['temperature']` must be above 0, got {temperature}.")
        policy = options.get("capacity_policy", "order")
        if policy not in CAPACITY_POLICIES:
            raise ValueError(
                f"`router_config['capacity_policy']` must be one of {list(CAPACITY_POLICIES)}, got {policy!r}."
            )
        if options.get("min_capacity", 0) < 0:
            raise ValueError(f"`router_config['min_capacity']` must be at least 0, got {options['min_capacity']}.")
        factor = options.get("eval_capacity_factor")
        if factor is not None and not (factor > 0 and config.expert_capacity_factor is not None):
            raise ValueError(
                f"`router_config['eval_capacity_factor']` must be above 0 and needs `expert_capacity_factor`, got "
                f"{factor} with `expert_capacity_factor={config.expert_capacity_factor}`."
            )
        parse_schedules(options.get("schedules") or {})
        if options.get("permutation_search") is not None:
            cls._validate_permutation_search(config, **options)

    @classmethod
    def _validate_permutation_search(cls, config: Any, **options) -> None:
        search = parse_permutation_search(options["permutation_search"])
        if search.per_tree and not cls.has_trees:
            raise ValueError(
                f"`router_config['permutation_search']` has `per_tree=True`, but `router_type={cls.router_type!r}` "
                "has no trees. Leave it out: one permutation for the whole gate works with every router."
            )
        bound_to_experts = {
            "`router_config['selection_bias']`": options.get("selection_bias"),
            "`router_bias_update_speed`": getattr(config, "router_bias_update_speed", 0.0) > 0,
            "`router_config['num_expert_groups']`": options.get("num_expert_groups", 1) > 1,
            "zero-computation experts": getattr(config, "num_zero_computation_experts", 0) > 0,
        }
        for name, present in bound_to_experts.items():
            if present:
                raise ValueError(
                    f"`router_config['permutation_search']` cannot be combined with {name}, which belong to experts "
                    "while the search still moves them. Remove one of the two."
                )

    @property
    def num_slots(self) -> int:
        """Columns of `top_k_index` and `top_k_weights` (N while a permutation search runs)."""
        return self.top_k

    # -- steps ---------------------------------------------------------------------------------------------------
    def compute_logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Raw scores of every expert, float32.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): Router input.
            context ([`RoutingContext`]): What else is known.

        Returns:
            `torch.Tensor` of shape `(T, N)`.
        """
        raise TypeError(f"{type(self).__name__} must define `compute_logits`.")

    def scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Logits -> non-negative scores, both `(T, N)`. Softmax unless a subclass says otherwise."""
        return torch.softmax(router_logits / self.temperature.float(), dim=-1)

    def choice_scores(self, scores: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """What the choice is made on, `(T, N)`: biases, noise and group limits enter here and nowhere else."""
        return scores

    def select(self, choice_scores: torch.Tensor) -> torch.Tensor:
        """The `K` best experts of each token, `(T, K)`."""
        return torch.topk(choice_scores, self.top_k, dim=-1).indices

    def weigh(self, scores: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        """Mixing weights `(T, K)`: g_i = s_i, divided by the sum over the chosen where `norm_topk_prob`."""
        weights = scores.gather(-1, top_k_index)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
        return weights * self.routed_scaling_factor

    def next_state(self, router_logits: torch.Tensor) -> torch.Tensor | None:
        """What the next MoE layer's router receives as `prev_state`."""
        return None

    def capacity(self, num_assignments: torch.Tensor | int) -> torch.Tensor:
        """Assignments each expert takes of `num_assignments` (K x tokens): C = factor * assignments / N, `(N,)`."""
        share = torch.full((self.num_experts,), 1.0 / self.num_experts, device=self.temperature.device)
        return self.capacity_factor * num_assignments * share

    # -- pipeline ------------------------------------------------------------------------------------------------
    def forward(self, hidden_states: torch.Tensor, context: RoutingContext | None = None) -> RouterOutput:
        """Routes `T` tokens.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)` or `(B, S, D)`): Router input.
            context ([`RoutingContext`], *optional*): Token mask, ids, state of the previous router.

        Returns:
            [`RouterOutput`]
        """
        context = context if context is not None else RoutingContext()
        hidden_states = hidden_states.reshape(-1, self.hidden_size)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            router_logits = self.compute_logits(hidden_states, context)  # (T, N)
            state, soft = self.next_state(router_logits), self.soft_permutation()
            router_logits = self.relabel(router_logits, soft)
            scores = self.scores(router_logits)  # (T, N)
            with torch.no_grad():
                index = self.select(self.choice_scores(scores.detach(), router_logits.detach()))  # (T, K)
            weights = self.weigh(scores, index)  # (T, K)
            penalty = self.penalty(router_logits) if self.training else None
            router_logits, index, weights, penalty = self.mix(router_logits, index, weights, penalty, soft)
            index, weights = self.post_process(index, weights, context)
        return RouterOutput(router_logits, weights.to(hidden_states.dtype), index, state, penalty)

    def soft_permutation(self) -> torch.Tensor | None:
        """P while a permutation search runs (in training), else `None`."""
        if self.permutation is None or not (self.training and self.permutation.searching):
            return None
        return self.permutation.soft()

    def relabel(self, router_logits: torch.Tensor, soft: torch.Tensor | None) -> torch.Tensor:
        """Logits `(T, N)` in the order of the experts, where a permutation has been found."""
        if self.permutation is None or soft is not None:
            return router_logits
        return self.permutation.permute(router_logits.unsqueeze(-2), None).squeeze(-2)

    def mix(
        self,
        router_logits: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        penalty: torch.Tensor | None,
        soft: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The decision `(T, K)` after the soft permutation `soft`, `(T, N)`, if a search runs; losses read the logits
        mixed alike."""
        if soft is None or self.permutation is None:
            return router_logits, index, weights, penalty
        index, weights = self.permutation.permute_slots(index, weights, soft)
        router_logits = router_logits @ soft[0]
        if self.permutation.options.entropy_coef > 0:
            entropy = self.permutation.penalty(soft).expand(router_logits.shape[0])
            penalty = entropy if penalty is None else penalty + entropy
        return router_logits, index, weights, penalty

    def post_process(
        self, index: torch.Tensor, weights: torch.Tensor, context: RoutingContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Padding mask, then capacity (in training, unless `eval_capacity_factor`: dropping tokens at evaluation makes
        a token's output depend on its batch). Both leave empty slots."""
        token_mask = context.token_mask
        if token_mask is not None:
            real = token_mask.reshape(-1, 1)
            weights = weights.masked_fill(~real, 0.0)
            index = index.masked_fill(~real, self.num_experts)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if self.capacity_factor is not None and factor is not None:
            capacity = self.capacity((index < self.num_experts).sum())  # K x tokens, where K is fixed
            if not self.training:
                capacity = capacity * (factor / self.capacity_factor)
            capacity = capacity.clamp(min=self.min_capacity)
            index, weights = apply_capacity(index, weights, capacity, self.capacity_policy)
            if self.norm_survivors:
                weights = self.routed_scaling_factor * weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
            return index, weights
        if self.choice_differs_from_scores:
            return pack_slots(index, weights, index < self.num_experts, self.num_experts)
        return index, weights

    @property
    def choice_differs_from_scores(self) -> bool:
        """Whether the order of the choice can differ from the order of the weights: slots are then sorted again."""
        return False

    # -- what losses ask -----------------------------------------------------------------------------------------
    def probabilities(self, router_logits: torch.Tensor) -> torch.Tensor:
        """The distribution p of the balance loss, rows summing to 1, before any bias, `(T, N)`."""
        scores = self.scores(router_logits)
        return scores / (scores.sum(dim=-1, keepdim=True) + EPSILON)

    @classmethod
    def has_penalty(cls, **options) -> bool:
        """Whether a router with these options adds a term of its own to the loss, `RouterOutput.penalty`."""
        search = options.get("permutation_search")
        return search is not None and parse_permutation_search(search).entropy_coef > 0

    def penalty(self, router_logits: torch.Tensor) -> torch.Tensor | None:
        """What each token adds to the training loss, `(T,)`, coefficient included; `None` for nothing."""
        return None

    @property
    def balance_weights(self) -> torch.Tensor | None:
        """Weight of each expert in the balance loss, `(N,)`; `None` means all equal."""
        return None

    # -- initialisation ------------------------------------------------------------------------------------------
    def reset_parameters(self) -> None:
        """Initial values, through `transformers.initialization` so that loaded values are kept."""
        init.constant_(self.temperature, self.initial_temperature)
        if self.permutation is not None:
            self.permutation.reset_parameters()

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"


class LinearRouter(BaseRouter):
    """Base of routers whose logits are one matrix product, h W^T, in float32.

    Args:
        selection_bias (`bool`, defaults to `False`): Add the buffer `e_score_correction_bias` (N,) to the choice
            scores (loss-free balancing, DeepSeek-V3 2412.19437 Eq. 16); `router_bias_update_speed` trains it.
        num_expert_groups (`int`, defaults to 1): Experts are split in this many groups of equal size.
        top_k_groups (`int`, *optional*): Only the groups with the best sum of two best choice scores stay eligible.
        noise (`str`, *optional*): In training, `"gaussian"` adds N(0, noise_std) to the logits of the choice,
            `"jitter"` multiplies the router's input by U(1 - noise_std, 1 + noise_std) (Switch 2101.03961),
            `"gumbel"` draws the experts by their probability (DeepSpeed's RSample), and `"gumbel_second"` all but the
            first (DeepSpeed's top-2).
        noise_std (`float`, defaults to 0.01): A 0-dim buffer that a schedule may write.
    """

    noise_std: torch.Tensor
    e_score_correction_bias: torch.Tensor | None

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        selection_bias: bool = False,
        num_expert_groups: int = 1,
        top_k_groups: int | None = None,
        noise: str | None = None,
        noise_std: float = 0.01,
        **kwargs,
    ):
        super().__init__(config, layer_idx, **kwargs)
        self.num_expert_groups = num_expert_groups
        self.top_k_groups = top_k_groups if top_k_groups is not None else num_expert_groups
        self.noise = noise
        self.initial_noise_std = float(noise_std)
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))
        if noise in ("gaussian", "jitter"):
            self.register_buffer("noise_std", torch.tensor(self.initial_noise_std))
        needs_bias = selection_bias or getattr(config, "router_bias_update_speed", 0.0) > 0
        bias = torch.zeros(self.num_experts) if needs_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.reset_parameters()

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        noise = options.get("noise")
        if noise not in NOISES:
            raise ValueError(f"`router_config['noise']` must be one of {list(NOISES)}, got {noise!r}.")
        if noise == "gumbel_second" and config.num_experts_per_tok < 2:
            raise ValueError(
                "`router_config['noise']='gumbel_second'` draws the second expert, but `num_experts_per_tok` is "
                f"{config.num_experts_per_tok}. Use 'gumbel', or two experts."
            )
        std = options.get("noise_std", 0.01)
        if std < 0 or (noise == "jitter" and std >= 1):
            raise ValueError(f"`router_config['noise_std']` must be at least 0, and below 1 for jitter, got {std}.")
        groups, experts = options.get("num_expert_groups", 1), config.num_routing_targets
        if groups < 1 or experts % groups:
            raise ValueError(
                f"`router_config['num_expert_groups']` must divide the number of experts ({experts}), got {groups}."
            )
        kept = options.get("top_k_groups", groups)
        kept = groups if kept is None else kept
        if not 1 <= kept <= groups or kept * (experts // groups) < config.num_experts_per_tok:
            raise ValueError(
                f"`router_config['top_k_groups']` must be between 1 and `num_expert_groups` ({groups}) and leave at "
                f"least `num_experts_per_tok` ({config.num_experts_per_tok}) experts, got {kept}."
            )

    def compute_logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        hidden_states = hidden_states.float()
        if self.noise == "jitter" and self.training:
            half_width = self.noise_std.float()
            hidden_states = hidden_states * (1 + half_width * (2 * torch.rand_like(hidden_states) - 1))
        return F.linear(hidden_states, self.weight.float())  # (T, N)

    def choice_scores(self, scores: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        if self.noise == "gaussian" and self.training:
            scores = self.scores(router_logits + self.noise_std.float() * torch.randn_like(router_logits))
        elif self.noise in ("gumbel", "gumbel_second") and self.training:
            first = scores.argmax(dim=-1, keepdim=True)
            # argmax(l / t + g) is a draw from softmax(l / t); -log of an exponential variable is a Gumbel one.
            gumbel = -torch.empty_like(router_logits).exponential_().log()
            scores = self.scores(router_logits + self.temperature.float() * gumbel)
            if self.noise == "gumbel_second":
                scores = scores.scatter(-1, first, torch.inf)
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias.float()
        if self.top_k_groups < self.num_expert_groups:
            grouped = scores.unflatten(-1, (self.num_expert_groups, -1))  # (T, groups, N / groups)
            group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)  # (T, groups)
            kept = group_score.topk(self.top_k_groups, dim=-1).indices
            eligible = torch.zeros_like(group_score, dtype=torch.bool).scatter(-1, kept, True)
            scores = grouped.masked_fill(~eligible.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores

    @property
    def choice_differs_from_scores(self) -> bool:
        return self.e_score_correction_bias is not None or (self.noise not in (None, "jitter") and self.training)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.normal_(self.weight, mean=0.0, std=self.initializer_range)
        if self.noise in ("gaussian", "jitter"):
            init.constant_(self.noise_std, self.initial_noise_std)
        if self.e_score_correction_bias is not None:
            init.zeros_(self.e_score_correction_bias)
