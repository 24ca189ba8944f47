"""Routers: which experts a token is sent to, and the losses and statistics of that decision."""

from hf_moe.lazy import lazy_exports


_EXPORTS = {
    ".activation": ["ActivationRouter"],
    ".balance": ["expert_frequency", "load_balance_loss", "router_z_loss"],
    ".base": ["BaseRouter", "LinearRouter"],
    ".callbacks": ["GlobalBalanceCallback", "RouterScheduleCallback", "apply_schedules"],
    ".capacity": ["apply_capacity", "pack_slots", "trim_slots"],
    ".dense_to_sparse": ["DenseToSparseRouter"],
    ".discovery": ["find_balancers", "find_routers"],
    ".expert_choice": ["ExpertChoiceRouter"],
    ".fixed_random": ["FixedRandomRouter"],
    ".gating_residual": ["GatingResidualRouter", "MoePlusPlusReleaseRouter"],
    ".hashing": ["HashRouter", "balanced_hash_table", "random_hash_table"],
    ".layer_routing": ["LayerRouting"],
    ".load_balancer": ["BalanceLosses", "LoadBalancer"],
    ".loss_scale": ["balance_loss_scale"],
    ".output": ["RouterOutput", "RoutingContext"],
    ".permutation": [
        "PermutationLocalSearch",
        "PermutationOptions",
        "advance_permutation_search",
        "harden_permutations",
        "sinkhorn",
    ],
    ".registry": ["build_router", "list_routers", "register_router", "router_class"],
    ".schedules": [
        "ConstantSchedule",
        "CosineSchedule",
        "DecaySchedule",
        "ExponentialSchedule",
        "LinearSchedule",
        "MultiStepSchedule",
        "QuarterCosineSchedule",
        "Schedule",
        "SequenceSchedule",
        "StepSchedule",
        "parse_schedules",
    ],
    ".selection_bias": ["update_selection_bias"],
    ".slimming": ["num_experts_per_tok", "set_num_experts_per_tok"],
    ".statistics": ["RouterStats", "RoutingSummary"],
    ".steps": ["BalanceSteps"],
    ".top_p": ["TopPRouter"],
    ".topk": ["SigmoidTopKRouter", "SoftmaxTopKRouter"],
    ".tree": ["CometRouter", "DSelectKRouter", "leaf_order", "smooth_step"],
    ".variable": ["VariableLinearRouter", "VariableRouter"],
}

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {name: module for module, names in _EXPORTS.items() for name in names}
)
