"""Upcycling: a trained dense model becomes a Mixture-of-Experts.

Four independent choices make a recipe: how experts are built (`builders/`), how routers start (`router_init/`), how
selected experts are weighed and scaled (`weight_rules.py`), and what the result is (`targets/`).
"""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Copy": ".builders.copy",
        "DenseFeedForward": ".feed_forward",
        "Diversify": ".builders.diversify",
        "Drop": ".builders.drop",
        "Exactness": ".exactness",
        "ExpertBuilder": ".builders.base",
        "ExpertUsage": ".expert_usage",
        "FromModels": ".builders.from_models",
        "GrowthReport": ".growth",
        "Hash": ".router_init.hashing",
        "ImportanceShared": ".builders.importance_shared",
        "KMeans": ".router_init.kmeans",
        "Masks": ".builders.masks",
        "MoePlusPlusTarget": ".targets.backbone",
        "Noise": ".builders.noise",
        "Normal": ".router_init.random",
        "Prompts": ".router_init.prompts",
        "Repeated": ".router_init.random",
        "RouterInit": ".router_init.base",
        "Split": ".builders.split",
        "Target": ".targets.base",
        "UpcycleReport": ".report",
        "VirtualGroups": ".builders.virtual_groups",
        "WeightRule": ".weight_rules",
        "Zeros": ".router_init.random",
        "aggregate_checkpoints": ".aggregate",
        "aggregate_experts": ".aggregate",
        "expand_experts": ".expand",
        "expand_optimizer_state": ".expand",
        "channel_sets": ".channel_sets",
        "combine_uni_moe": ".combine_uni_moe",
        "convert_to_readme": ".refactor",
        "expert_usage": ".expert_usage",
        "extract_feed_forward": ".feed_forward",
        "grow_model": ".growth",
        "list_targets": ".targets.choose",
        "locate_feed_forwards": ".feed_forward",
        "prune_experts": ".prune",
        "read_mergekit": ".mergekit",
        "extract_clip": ".clip",
        "stretch_positions": ".clip",
        "stretch_text_positions": ".clip",
        "upcycle_clip": ".clip",
        "upcycle": ".recipe",
        "upcycle_llava": ".llava",
        "upcycle_uni_moe": ".uni_moe",
        "upcycle_checkpoint": ".streaming",
        "upcycle_mote": ".ternary",
        "weight_rule_of": ".weight_rules",
    },
)
