import pytest
import torch
from common.upcycling_toys import tokens
from transformers import AutoConfig

from hf_moe.upcycling.weight_rules import WeightRule, resolve_weight_rule, weight_rule_of


LOGITS = tokens(hidden=8)


def test_renormalised_softmax_is_softmax_of_the_selected_logits():
    weights, index = WeightRule("renormalise").apply(LOGITS, 3)
    top = LOGITS.topk(3, dim=-1)
    assert torch.equal(index, top.indices)
    torch.testing.assert_close(weights, top.values.softmax(-1), rtol=0, atol=1e-6)


def test_softmax_weights_are_probabilities_of_all_experts():
    weights, _ = WeightRule("softmax").apply(LOGITS, 3)
    torch.testing.assert_close(weights, LOGITS.softmax(-1).topk(3, dim=-1).values)


def test_sigmoid_weights_sum_to_the_factor():
    weights, _ = WeightRule("sigmoid", 2.5).apply(LOGITS, 3)
    torch.testing.assert_close(weights.sum(-1), torch.full((12,), 2.5))


@pytest.mark.parametrize(("name", "k", "total"), [
    ("renormalise", 2, 1.0), ("softmax", 2, None), ("softmax", 8, 1.0), ("sigmoid", 2, 1.0)
])  # fmt: skip
def test_the_sum_of_weights_is_known_or_not(name, k, total):
    rule = WeightRule(name)
    assert rule.total(k, 8) == total
    sums = rule.apply(LOGITS, k)[0].sum(-1)
    assert (sums.std() < 1e-6) == (total is not None)
    assert rule.typical_total(2, 8) == (0.25 if name == "softmax" else 1.0)


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match=r"`weights` must be one of .*renormalise.*, got 'softmax2'"):
        resolve_weight_rule("softmax2")
    with pytest.raises(TypeError, match=r"got int"):
        resolve_weight_rule(1)
    with pytest.raises(ValueError, match=r"factor of a weight rule must be above 0"):
        WeightRule("sigmoid", 0)


@pytest.mark.parametrize(("kind", "fields", "expected"), [
    ("mixtral", {}, WeightRule("renormalise")),
    ("granitemoe", {}, WeightRule("renormalise")),
    ("qwen3_moe", {}, WeightRule("softmax")),
    ("qwen3_moe", {"norm_topk_prob": True}, WeightRule("renormalise")),
    ("olmoe", {}, WeightRule("softmax")),
    ("flex_olmo", {"norm_topk_prob": True}, WeightRule("renormalise")),
    ("deepseek_v3", {}, WeightRule("sigmoid", 2.5)),
    ("jamba", {}, WeightRule("softmax")),
    ("phimoe", {}, None),
    ("llama", {}, None),
])  # fmt: skip
def test_rules_of_transformers_families(kind, fields, expected):
    assert weight_rule_of(AutoConfig.for_model(kind, **fields)) == expected


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granitemoe", "deepseek_v2"])
def test_the_table_agrees_with_the_family_itself(kind):
    """The rule is read off a tiny model: what its router hands to the experts."""
    from common.tiny_families import tiny_model

    model = tiny_model(kind).eval()
    seen = []
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            module.register_forward_pre_hook(lambda m, args: seen.append(args[2]))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 23).reshape(2, 10))
    rule = weight_rule_of(model.config)
    spread = float(seen[0].sum(-1).float().std())
    assert (spread < 1e-5) == (rule.total(model.config.num_experts_per_tok, 8) is not None)
