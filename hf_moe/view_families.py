"""Which router class follows which rule: everything about transformers' families that views know."""

from .view_odd_families import PhimoeRule
from .view_rules import FamilyRule


__all__ = ["FAMILY_RULES"]

_SOFTMAX = FamilyRule(score="softmax", normalise="always")
_SOFTMAX_OF_CHOSEN = FamilyRule(score="softmax", choose_by="logits", normalise="softmax")
_DEEPSEEK_V3 = FamilyRule(
    score="sigmoid",
    bias="e_score_correction_bias",
    groups="top2",
    normalise="norm_topk_prob",
    epsilon=1e-20,
    scale="routed_scaling_factor",
    ordered=False,
)

# Families are told apart by the class name of their router: importing the classes would import every modeling file.
# A line is added only together with its model in tests/test_views.py, which proves that what is read from the router
# is what the experts receive, and that the rule gives what the router gives.
FAMILY_RULES: dict[str, FamilyRule] = {
    # -- softmax over all experts, the best, divided by their sum
    **dict.fromkeys(
        ("HunYuanMoEV1Gate", "MiniMaxTopKRouter", "MixtralTopKRouter", "Qwen3VLMoeTextTopKRouter",
         "Qwen3_5MoeTopKRouter"),
        _SOFTMAX,
    ),
    **dict.fromkeys(
        ("FlexOlmoTopKRouter", "MellumTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter",
         "Qwen3NextTopKRouter"),
        FamilyRule(score="softmax", normalise="norm_topk_prob"),
    ),
    "JambaTopKRouter": FamilyRule(score="softmax"),
    "Ernie4_5_MoeTopKRouter": FamilyRule(
        score="softmax", bias="moe_statics.e_score_correction_bias", normalise="always", floor="norm_min"
    ),
    # -- softmax with groups
    "DeepseekV2TopkRouter": FamilyRule(
        score="softmax", groups="max", group_fill=0.0, scale="routed_scaling_factor", ordered=False
    ),
    "Mistral4TopkRouter": FamilyRule(
        score="softmax", groups="top2", group_fill=0.0, normalise="norm_topk_prob", epsilon=1e-20,
        scale="routed_scaling_factor", ordered=False, float32_scores=False,
    ),
    # -- softmax of the chosen logits
    **dict.fromkeys(
        ("AriaTextTopKRouter", "GptOssTopKRouter", "GraniteMoeHybridTopKRouter", "GraniteMoeSWATopKRouter",
         "GraniteMoeSharedTopKRouter", "GraniteMoeTopKRouter"),
        _SOFTMAX_OF_CHOSEN,
    ),
    # -- sigmoid
    **dict.fromkeys(
        ("BailingHybridTopkRouter", "DeepseekV32TopkRouter", "DeepseekV3TopkRouter", "Dots1TopkRouter",
         "ExaoneMoeTopkRouter", "Glm4MoeLiteTopkRouter", "Glm4MoeTopkRouter", "GlmMoeDsaTopkRouter",
         "MiMoV2FlashTopkRouter", "NemotronHTopkRouter", "SolarOpenTopkRouter"),
        _DEEPSEEK_V3,
    ),
    "AfmoeTokenChoiceRouter": FamilyRule(
        score="sigmoid", bias="argument", normalise="always", epsilon=1e-20, scale="route_scale"
    ),
    "HYV3TopKRouter": FamilyRule(
        score="sigmoid", bias="argument", normalise="always", epsilon=1e-20, scale="router_scaling_factor",
        ordered=False,
    ),
    "Lfm2MoeTopKRouter": FamilyRule(
        score="sigmoid", bias="argument", normalise="norm_topk_prob", epsilon=1e-6, scale="routed_scaling_factor",
        float32_scores=False,
    ),
    # -- odd ones
    "PhimoeTopKRouter": PhimoeRule(),
    "MiniMaxM2TopKRouter": FamilyRule(score="sigmoid", bias="argument", normalise="always", ordered=False),
}  # fmt: skip
