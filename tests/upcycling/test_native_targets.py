"""Conversion to MoE families of transformers: same logits, same generation, same after saving and reloading."""

import json

import pytest
import torch
from common.upcycling_toys import ids, logit_gap, tiny_dense
from transformers import AutoModelForCausalLM

from hf_moe import upcycle
from hf_moe.upcycling import Normal, Split, VirtualGroups, WeightRule, Zeros, weight_rule_of


FAMILIES = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "granite": "granitemoe",
    "olmo2": "flex_olmo",
}
RECIPES = {
    "copies": {},
    "groups": dict(num_experts=8, top_k=4, experts=VirtualGroups(2)),
    "single": dict(num_experts=1, top_k=1),
    "all_active": dict(num_experts=4, top_k=4, experts=Split(), router=Zeros()),
}


def convert(kind, **changes):
    dense = tiny_dense(kind)
    return dense, *upcycle(dense, **{"num_experts": 4, "top_k": 2, **changes})


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_auto_takes_the_native_family_and_the_logits_stay(kind, recipe, tmp_path):
    dense, moe, report = convert(kind, **RECIPES[recipe])
    assert moe.config.model_type == FAMILIES[kind] and type(moe).__module__.startswith("transformers.")
    assert report.predicted_exact
    assert logit_gap(dense, moe) <= 2e-6
    moe.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert logit_gap(moe, reloaded.eval()) == 0


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_result_is_no_accident(kind):
    """The feed-forwards matter: with one bank of experts negated, the logits change."""
    dense, moe, _ = convert(kind)
    parameter = next(p for n, p in moe.named_parameters() if n.endswith("experts.down_proj"))
    parameter.data.neg_()
    assert logit_gap(dense, moe) > 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen3", "granite"])
def test_generation_is_the_dense_model_s(kind):
    dense, moe, _ = convert(kind)
    settings = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(dense.generate(ids(), **settings), moe.generate(ids(), **settings))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "granite"])
def test_every_experts_implementation_gives_the_dense_logits(kind, implementation):
    dense, moe, _ = convert(kind)
    moe.set_experts_implementation(implementation)
    assert logit_gap(dense, moe) <= 2e-6


@pytest.mark.parametrize("shared", ["dense", 0.25])
@pytest.mark.parametrize(("kind", "family"), [("qwen2", "qwen2_moe"), ("granite", "granitemoeshared")])
def test_shared_experts_go_where_the_family_has_a_place(kind, family, shared, tmp_path):
    experts = None if shared == "dense" else VirtualGroups(2)
    dense, moe, report = convert(kind, shared=shared, experts=experts)
    assert moe.config.model_type == family and report.predicted_exact
    assert logit_gap(dense, moe) <= 2e-6
    moe.save_pretrained(tmp_path)
    assert logit_gap(dense, AutoModelForCausalLM.from_pretrained(tmp_path).eval()) <= 2e-6


def test_an_idle_shared_expert_of_qwen2_is_silent_but_can_learn():
    _, moe, _ = convert("qwen2")
    block = moe.model.layers[0].mlp
    assert moe.config.shared_expert_intermediate_size == 8
    assert not block.shared_expert.down_proj.weight.any() and not block.shared_expert_gate.weight.any()
    moe(input_ids=ids(), labels=ids()).loss.backward()
    assert block.shared_expert.down_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwen_keeps_dense_layers_where_asked(kind):
    dense, moe, report = convert(kind, layers=[1])
    assert moe.config.mlp_only_layers == [0] and type(moe.model.layers[0].mlp).__name__.endswith("MLP")
    assert [entry["layer"] for entry in report.layers] == [1]
    assert logit_gap(dense, moe) <= 2e-6


@pytest.mark.parametrize("kind", ["qwen3", "olmo2"])
def test_plain_softmax_weights_are_a_setting_of_the_family(kind):
    _, moe, report = convert(kind, weights="softmax")
    assert moe.config.norm_topk_prob is False and not report.predicted_exact
    assert weight_rule_of(moe.config) == WeightRule("softmax")
    dense, moe, report = convert(kind, weights="softmax", top_k=4)
    assert report.predicted_exact and logit_gap(dense, moe) <= 2e-6


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_config_names_router_loss_and_provenance(kind, tmp_path):
    _, moe, _ = convert(kind, router_aux_loss_coef=0.02)
    assert moe.config.router_aux_loss_coef == 0.02
    assert getattr(moe.config, "norm_topk_prob", True) is True
    assert weight_rule_of(moe.config) == WeightRule("renormalise")
    moe.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["upcycling"]["experts"] == {"name": "Copy"}
    assert saved["upcycling"]["source"] == type(tiny_dense(kind)).__name__
    assert saved["upcycling"]["target"] == FAMILIES[kind] and saved["upcycling"]["predicted_exact"] is True


def test_fields_only_the_dense_family_knows_are_left_behind():
    _, moe, _ = convert("llama")
    assert not hasattr(moe.config, "pretraining_tp") and not hasattr(moe.config, "mlp_bias")


def test_the_users_own_fields_are_kept():
    dense = tiny_dense("llama")
    dense.config.house_number = 7
    moe, _ = upcycle(dense, num_experts=2, top_k=1)
    assert moe.config.house_number == 7


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_dense_model_is_left_as_it_is(kind):
    dense = tiny_dense(kind).train()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    config = dense.config.to_dict()
    moe, _ = upcycle(dense, num_experts=2, top_k=1, seed=3)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(1.0)
    assert dense.training and all(m.training for m in dense.modules())
    assert dense.config.to_dict() == config
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    shared = {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in moe.parameters()}
    assert not shared


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied, tmp_path):
    dense = tiny_dense("llama", tie_word_embeddings=tied)
    moe, _ = upcycle(dense, num_experts=2, top_k=1)
    for model in (moe, _reload(moe, tmp_path)):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert logit_gap(dense, model) <= 2e-6


def _reload(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_that_of_the_dense_model(dtype):
    dense = tiny_dense("llama").to(dtype)
    moe, report = upcycle(dense, num_experts=4, top_k=2)
    assert {p.dtype for p in moe.parameters()} == {dtype}
    assert report.measured.dtype == str(dtype).removeprefix("torch.")
    for e in range(4):  # copies in bfloat16 are exact: no scale is applied
        assert torch.equal(moe.model.layers[0].mlp.experts.down_proj[e], dense.model.layers[0].mlp.down_proj.weight)


@pytest.mark.parametrize(("auto", "head"), [
    ("AutoModelForSequenceClassification", "MixtralForSequenceClassification"),
    ("AutoModelForTokenClassification", "MixtralForTokenClassification"),
    ("AutoModel", "MixtralModel"),
])  # fmt: skip
def test_other_heads_are_carried_over(auto, head):
    dense = tiny_dense("llama", auto=auto)
    moe, report = upcycle(dense, num_experts=2, top_k=1)
    assert type(moe).__name__ == head
    assert report.measured.output == ("last_hidden_state" if auto == "AutoModel" else "logits")
    assert report.measured.max_difference <= 2e-6


def test_a_window_of_mistral_is_kept():
    dense = tiny_dense("mistral", sliding_window=4)
    moe, _ = upcycle(dense, num_experts=2, top_k=1)
    assert moe.config.model_type == "mixtral" and moe.config.sliding_window == 4
    assert logit_gap(dense, moe) <= 2e-6


def test_windows_in_some_layers_of_qwen2_are_kept():
    windows = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    dense = tiny_dense("qwen2", **windows)
    moe, _ = upcycle(dense, num_experts=2, top_k=1)
    assert moe.config.layer_types == dense.config.layer_types == ["full_attention", "sliding_attention"]
    assert logit_gap(dense, moe) <= 2e-6


@pytest.mark.parametrize(("kind", "changes", "arguments", "reason"), [
    ("llama", {"attention_bias": True}, {}, "its attention has no biases"),
    ("llama", {"mlp_bias": True}, {}, "its experts are gated and have no biases"),
    ("llama", {}, {"layers": [0]}, "all its layers are MoE layers"),
    ("llama", {}, {"weights": "softmax"}, "its weights are renormalise, not softmax"),
    ("llama", {}, {"shared": "dense"}, "it has no place for `shared='dense'`"),
    ("qwen2", {}, {}, "it is made from llama or mistral, not from qwen2"),
])  # fmt: skip
def test_mixtral_says_why_it_does_not_fit(kind, changes, arguments, reason):
    with pytest.raises(ValueError, match=f"`target='mixtral'` cannot hold this recipe for .*: {reason}"):
        upcycle(tiny_dense(kind, **changes), num_experts=2, top_k=1, target="mixtral", **arguments)


def test_mixed_attention_does_not_fit_qwen3_moe():
    dense = tiny_dense("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match=r"all its layers have the same attention, and those of the source have not"):
        upcycle(dense, num_experts=2, top_k=1, target="qwen3_moe")


def test_a_gradient_at_the_first_step_reaches_experts_but_hardly_the_router():
    """Copies with renormalised weights give the same output whatever the router does."""
    _, moe, _ = convert("llama", router=Normal(0.1))
    moe(input_ids=ids(), labels=ids()).loss.backward()
    block = moe.model.layers[0].mlp
    assert block.experts.down_proj.grad.abs().max() > 1e-4
    assert block.gate.weight.grad.abs().max() < 1e-6


def test_one_hot_routing_reaches_single_experts():
    """Which entry becomes which expert: scaling expert e changes only tokens that are sent to e."""
    _, moe, _ = convert("llama", top_k=1, router=Normal(1.0))
    gate = moe.model.layers[1].mlp.gate
    chosen = []
    gate.register_forward_hook(lambda m, a, out: chosen.append(out[2].reshape(2, 10)))
    with torch.no_grad():
        base = moe(input_ids=ids()).logits
        expert = int(chosen[0][0, 4])
        moe.model.layers[1].mlp.experts.down_proj[expert] *= 2
        moved = (moe(input_ids=ids()).logits - base).abs().amax(-1) > 1e-6
    assert torch.equal(moved, chosen[0] == expert) and not moved.all()
