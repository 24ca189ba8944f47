"""Which router class follows which rule: everything about transformers' families that views know.

Families are told apart by the class name of their router: importing the classes would import every modeling file. A
line is added only together with its model in tests/common/tiny_families.py, through which tests prove that what is
read from the router is what the experts receive, and that the rule gives what the router gives.
"""

from .view_odd_families import (
    CohereRule,
    DenseScoresRule,
    DividedRule,
    InklingRule,
    LongcatRule,
    OneHotRule,
    PerExpertScaleRule,
    PhimoeRule,
    ZayaRule,
)
from .view_rules import FamilyRule


__all__ = ["BLOCKS_OF_ROUTERS", "FAMILY_RULES", "REFUSED_FAMILIES"]

_SOFTMAX = FamilyRule(score="softmax", normalise="always")
_SOFTMAX_OF_CHOSEN = FamilyRule(score="softmax", choose_by="logits", normalise="softmax", float32_scores=False)
_DEEPSEEK_V2 = FamilyRule(score="softmax", groups="max", group_fill=0.0, scale="routed_scaling_factor", ordered=False)
_DEEPSEEK_V3 = FamilyRule(
    score="sigmoid",
    bias="e_score_correction_bias",
    groups="top2",
    normalise="norm_topk_prob",
    epsilon=1e-20,
    scale="routed_scaling_factor",
    ordered=False,
)
_DEEPSEEK_V4 = FamilyRule(
    score="router.score_fn",
    bias="e_score_correction_bias",
    normalise="always",
    epsilon=1e-20,
    scale="routed_scaling_factor",
    ordered=False,
    float32_scores=False,
)
_MISTRAL_4 = {
    "score": "softmax",
    "groups": "top2",
    "group_fill": 0.0,
    "epsilon": 1e-20,
    "scale": "routed_scaling_factor",
    "ordered": False,
}

FAMILY_RULES: dict[str, FamilyRule] = {
    # -- softmax over all experts
    "Ernie4_5_MoeTopKRouter": FamilyRule(
        score="softmax", bias="moe_statics.e_score_correction_bias", normalise="always", floor="norm_min"
    ),
    "Ernie4_5_VLMoeMoeTopKRouter": FamilyRule(
        score="softmax", bias="moe_statics.e_score_correction_bias", normalise="always", floor="norm_min"
    ),
    "FlexOlmoTopKRouter": FamilyRule(score="softmax", normalise="norm_topk_prob"),
    "HunYuanMoEV1Gate": _SOFTMAX,
    "JambaTopKRouter": FamilyRule(score="softmax"),
    "MellumTopKRouter": FamilyRule(score="softmax", normalise="norm_topk_prob"),
    "MiniMaxTopKRouter": _SOFTMAX,
    "MixtralTopKRouter": _SOFTMAX,
    "OlmoeTopKRouter": FamilyRule(score="softmax", normalise="norm_topk_prob"),
    "Qwen2MoeTopKRouter": FamilyRule(score="softmax", normalise="norm_topk_prob"),
    "Qwen3MoeTopKRouter": FamilyRule(score="softmax", normalise="norm_topk_prob"),
    "Qwen3NextTopKRouter": FamilyRule(score="softmax", normalise="norm_topk_prob"),
    "Qwen3OmniMoeTalkerTextTopKRouter": FamilyRule(score="softmax", normalise="norm_topk_prob"),
    "Qwen3OmniMoeThinkerTextTopKRouter": FamilyRule(score="softmax", normalise="norm_topk_prob"),
    "Qwen3VLMoeTextTopKRouter": _SOFTMAX,
    "Qwen3_5MoeTopKRouter": _SOFTMAX,
    "Qwen4ExpTextTopKRouter": FamilyRule(score="softmax", normalise="norm_topk_prob"),
    # -- the same with groups
    "DeepseekOcr2TextTopkRouter": _DEEPSEEK_V2,
    "DeepseekV2TopkRouter": _DEEPSEEK_V2,
    "Mistral4TopkRouter": FamilyRule(normalise="norm_topk_prob", float32_scores=False, **_MISTRAL_4),
    "MistralLarge4TextTopkRouter": FamilyRule(normalise="always", **_MISTRAL_4),
    "UnlimitedOcrTextTopkRouter": _DEEPSEEK_V2,
    # -- softmax of the chosen logits
    "AriaTextTopKRouter": _SOFTMAX_OF_CHOSEN,
    "GptOssTopKRouter": _SOFTMAX_OF_CHOSEN,
    "GraniteMoeHybridTopKRouter": _SOFTMAX_OF_CHOSEN,
    "GraniteMoeSWATopKRouter": _SOFTMAX_OF_CHOSEN,
    "GraniteMoeSharedTopKRouter": _SOFTMAX_OF_CHOSEN,
    "GraniteMoeTopKRouter": _SOFTMAX_OF_CHOSEN,
    # -- sigmoid, with groups
    "AXK1TopkRouter": _DEEPSEEK_V3,
    "AXK2TopkRouter": FamilyRule(
        score="sigmoid",
        bias="e_score_correction_bias",
        groups="top2",
        group_fill=0.0,
        normalise="norm_topk_prob",
        epsilon=1e-20,
        scale="routed_scaling_factor",
        ordered=False,
    ),
    "BailingHybridTopkRouter": _DEEPSEEK_V3,
    "BeamTopKRouter": FamilyRule(
        score="sigmoid", bias="e_score_correction_bias", groups="top2", normalise="norm_topk_prob", epsilon=1e-20
    ),
    "DeepseekV32TopkRouter": _DEEPSEEK_V3,
    "DeepseekV3TopkRouter": _DEEPSEEK_V3,
    "Dots1TopkRouter": _DEEPSEEK_V3,
    "Dots3NoteTextTopkRouter": _DEEPSEEK_V3,
    "ExaoneMoeTopkRouter": _DEEPSEEK_V3,
    "Glm4MoeLiteTopkRouter": _DEEPSEEK_V3,
    "Glm4MoeTopkRouter": _DEEPSEEK_V3,
    "Glm4vMoeTextTopkRouter": _DEEPSEEK_V3,
    "Glm5NextTextTopkRouter": _DEEPSEEK_V3,
    "GlmMoeDsaTopkRouter": _DEEPSEEK_V3,
    "HYV4TopkRouter": _DEEPSEEK_V3,
    "KimiLinearTopkRouter": _DEEPSEEK_V3,
    "MiMoV2FlashTopkRouter": _DEEPSEEK_V3,
    "NemotronHTopkRouter": _DEEPSEEK_V3,
    "SolarOpenTopkRouter": _DEEPSEEK_V3,
    # -- sigmoid, or what the configuration says
    "AfmoeTokenChoiceRouter": FamilyRule(
        score="sigmoid", bias="argument", normalise="always", epsilon=1e-20, scale="route_scale"
    ),
    "DeepseekV4TopKRouter": _DEEPSEEK_V4,
    "FlintTopKRouter": FamilyRule(score="sigmoid", normalise="norm_topk_prob"),
    "HYV3TopKRouter": FamilyRule(
        score="sigmoid",
        bias="argument",
        normalise="always",
        epsilon=1e-20,
        scale="router_scaling_factor",
        ordered=False,
    ),
    "Inkling2TopKRouter": _DEEPSEEK_V4,
    "Kolibri1TopKRouter": FamilyRule(
        score="sigmoid", choose_by="logits", bias="e_score_correction_bias", normalise="norm_topk_prob"
    ),
    "LagunaTopKRouter": FamilyRule(score="sigmoid", bias="e_score_correction_bias", normalise="always"),
    "Lfm2MoeTopKRouter": FamilyRule(
        score="sigmoid",
        bias="argument",
        normalise="norm_topk_prob",
        epsilon=1e-6,
        scale="routed_scaling_factor",
        float32_scores=False,
    ),
    "MiniMaxM2TopKRouter": FamilyRule(score="sigmoid", bias="argument", normalise="always", ordered=False),
    "MiniMaxM3VLTopKRouter": FamilyRule(
        score="sigmoid", bias="e_score_correction_bias", normalise="always", ordered=False
    ),
    "MuseSparkTopkRouter": FamilyRule(
        score="sigmoid",
        bias="e_score_correction_bias",
        normalise="always",
        epsilon=1e-15,
        scale="routed_scaling_factor",
        ordered=False,
    ),
    "Step3p7TopKRouter": FamilyRule(
        score="sigmoid", bias="e_score_correction_bias", normalise="always", ordered=False
    ),
    # -- each its own
    "Cohere2MoeTopKRouter": CohereRule(),
    "DiffusionGemmaTextRouter": PerExpertScaleRule(),
    "Gemma4TextRouter": PerExpertScaleRule(),
    "InklingTopkRouter": InklingRule(),
    "Llama4Router": DenseScoresRule(),
    "LongcatFlashTopkRouter": LongcatRule(),
    "OpenAIPrivacyFilterTopKRouter": DividedRule(),
    "PhimoeTopKRouter": PhimoeRule(),
    "SwitchTransformersTop1Router": OneHotRule(),
    "ZayaRouter": ZayaRule(),
}

# Recorders of some families name a block; its routers are inside, one for each of its sets of experts.
BLOCKS_OF_ROUTERS = ("Ernie4_5_VLMoeMoeBlock",)

REFUSED_FAMILIES: dict[str, str] = {
    "DbrxRouter": "it returns logits alone; the choice is made in the block, after the point where views read it.",
    "DogeCDMoE": "its experts are rows of two embedding tables, found through products of keys, not feed-forwards.",
    "JetMoeAttention": "its experts are attention heads, sorted over the whole batch: no (T, K) table exists.",
    "JetMoeTopKGating": "it returns positions sorted over the whole batch: no (T, K) table exists.",
    "Qwen3OmniMoeTextTopKRouter": "its recorder names it, but no model contains it.",
    "NllbMoeTop2Router": "its experts read the one-hot mask as numbers of experts, so that what the router chose is "
    "not what they receive (transformers 5.23).",
}
