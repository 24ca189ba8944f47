"""Conversion to the backbones of this package: every rule and shared part, any layers, every experts kernel."""

import pytest
import torch
from common.upcycling_toys import ids, logit_gap, tiny_dense
from transformers import AutoModelForCausalLM

from hf_moe import upcycle
from hf_moe.upcycling import (
    Drop,
    Hash,
    MoePlusPlusTarget,
    Normal,
    Repeated,
    Split,
    VirtualGroups,
    WeightRule,
    Zeros,
)


BACKBONES = {"llama": "moe_llama", "qwen2": "moe_qwen2", "qwen3": "moe_qwen3", "gpt2": "moe_gpt2", "phi": "moe_phi",
             "stablelm": "moe_stablelm"}  # fmt: skip
RECIPES = {
    "copies": {},
    "sigmoid": dict(weights=WeightRule("sigmoid", 2.5)),
    "groups": dict(num_experts=8, top_k=4, experts=VirtualGroups(2)),
    "dense_shared": dict(shared="dense", experts=Drop()),
    "part_shared": dict(shared=0.5, experts=VirtualGroups(2)),
    "residual": dict(shared="residual"),
    "one_layer": dict(layers=[1]),
    "all_active_softmax": dict(top_k=4, weights="softmax"),
    "split": dict(top_k=4, experts=Split(), router=Zeros()),
    "hash": dict(router=Hash()),
}


def convert(kind, target=None, **changes):
    dense = tiny_dense(kind)
    arguments = {"num_experts": 4, "top_k": 2, "target": target or BACKBONES[kind], **changes}
    return dense, *upcycle(dense, **arguments)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_exact_recipes_keep_the_logits_also_after_reloading(kind, recipe, tmp_path):
    dense, moe, report = convert(kind, **RECIPES[recipe])
    assert moe.config.model_type == BACKBONES[kind] and report.predicted_exact
    assert logit_gap(dense, moe) <= 4e-6
    moe.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert logit_gap(moe, reloaded.eval()) == 0


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("recipe", ["copies", "groups", "part_shared"])
def test_every_experts_implementation_gives_the_dense_logits(kind, recipe, implementation):
    dense, moe, _ = convert(kind, check=False, **RECIPES[recipe])
    moe.set_experts_implementation(implementation)
    assert moe.config._experts_implementation == implementation
    assert logit_gap(dense, moe) <= 4e-6


def test_biases_of_llama_are_carried():
    dense = tiny_dense("llama", mlp_bias=True, attention_bias=True)
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    for shared in (None, "dense", "residual", 0.5):
        moe, report = upcycle(dense, num_experts=4, top_k=2, shared=shared)
        assert moe.config.model_type == "moe_llama" and moe.config.expert_type == "swiglu_bias"
        assert report.predicted_exact and logit_gap(dense, moe) <= 4e-6


def test_biases_of_gpt2_are_carried_through_groups():
    dense = tiny_dense("gpt2")
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    moe, report = upcycle(dense, num_experts=4, top_k=2, experts=VirtualGroups(2), shared=0.5)
    assert report.predicted_exact and logit_gap(dense, moe) <= 4e-6


def test_weights_go_where_their_names_say():
    dense, moe, _ = convert("gpt2")
    block, source = moe.transformer.h[1].mlp, dense.transformer.h[1].mlp
    assert block.experts.up_proj.shape == (4, 32, 16)
    for e in range(4):
        assert torch.equal(block.experts.up_proj[e], source.c_fc.weight.T)
        assert torch.equal(block.experts.down_proj_bias[e], source.c_proj.bias)
    dense, moe, _ = convert("llama", shared="residual")
    block, source = moe.model.layers[0].mlp, dense.model.layers[0].mlp
    assert torch.equal(block.experts.gate_up_proj[2], torch.cat([source.gate_proj.weight, source.up_proj.weight]))
    assert torch.equal(block.residual_expert.down_proj.weight, source.down_proj.weight)
    assert block.residual_gate.weight.abs().max() > 0


def test_the_routed_experts_start_at_zero_beside_a_dense_shared_one():
    _, moe, _ = convert("llama", shared="dense")
    block = moe.model.layers[0].mlp
    assert not block.experts.down_proj.any() and block.experts.gate_up_proj.abs().max() > 0
    moe(input_ids=ids(), labels=ids()).loss.backward()
    assert block.experts.down_proj.grad.abs().max() > 0


def test_the_shared_part_and_the_routed_part_share_the_channels():
    dense, moe, _ = convert("llama", shared=0.25, experts=VirtualGroups(2))
    block, source = moe.model.layers[0].mlp, dense.model.layers[0].mlp
    assert (moe.config.shared_expert_intermediate_size, moe.config.moe_intermediate_size) == (8, 12)
    rows = torch.cat([block.shared_experts.up_proj.weight, *(block.experts.gate_up_proj[e, 12:] for e in (0, 1))])
    assert torch.equal(rows.sort(dim=0).values, source.up_proj.weight.sort(dim=0).values)


def test_calibration_makes_the_most_important_channels_shared():
    dense = tiny_dense("llama")
    calibration = ids(3, batch=4)
    moe, _ = upcycle(dense, num_experts=4, top_k=2, shared=0.25, experts=VirtualGroups(2), calibration=calibration)
    site = dense.model.layers[0].mlp
    seen = []
    site.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        dense(input_ids=calibration)
    importance = seen[0].abs().mean((0, 1)) * site.down_proj.weight.norm(dim=0)
    top = importance.topk(8).indices.sort().values
    assert torch.equal(moe.model.layers[0].mlp.shared_experts.up_proj.weight, site.up_proj.weight[top])


@pytest.mark.parametrize("layers", ["all", [0], "every:2", r"\.1\.mlp$"])
def test_layers_are_written_into_the_config(layers):
    dense, moe, report = convert("llama", layers=layers)
    expected = {"all": [0, 1], "every:2": [1], r"\.1\.mlp$": [1]}.get(str(layers), [0])
    assert moe.config.moe_layer_indices == expected == [entry["layer"] for entry in report.layers]
    assert [name for name, _ in moe.moe_blocks()] == [f"model.layers.{i}.mlp" for i in expected]
    assert logit_gap(dense, moe) <= 4e-6


def test_router_options_are_added_to_those_of_the_rule():
    _, moe, _ = convert("llama", weights="softmax", router_config={"noise": "gaussian"})
    assert moe.config.router_config == {"norm_topk_prob": False, "noise": "gaussian"}


def test_an_unknown_routers_weights_are_not_predicted():
    from hf_moe.routing import SoftmaxTopKRouter, register_router
    from hf_moe.routing.registry import ROUTERS

    class OddRouter(SoftmaxTopKRouter):
        pass

    register_router("odd_for_test")(OddRouter)
    try:
        dense, moe, report = convert("llama", router_type="odd_for_test")
    finally:
        del ROUTERS["odd_for_test"]
    assert (
        not report.predicted_exact and "nothing is known about the weights of router 'odd_for_test'" in report.reason
    )
    assert logit_gap(dense, moe) <= 4e-6


def test_a_measured_scale_corrects_plain_softmax_weights():
    dense = tiny_dense("llama")
    arguments = dict(num_experts=8, top_k=2, weights="softmax", router=Normal(0.5), target="moe_llama")
    calibration = [ids(seed, batch=4) for seed in range(3)]
    blind, _ = upcycle(dense, check=False, **arguments)
    seeing, report = upcycle(dense, calibration=calibration, **arguments)
    assert not report.predicted_exact
    scales = [entry["scale"] for entry in report.layers]
    assert all(1 < scale < 4 for scale in scales) and scales[0] != scales[1]
    assert logit_gap(dense, seeing) < 0.7 * logit_gap(dense, blind)


def test_zero_computation_experts_belong_to_moe_plus_plus():
    with pytest.raises(ValueError, match=r"cannot start with zero-computation experts .* `target=\"moe_plus_plus\"`"):
        convert("llama", num_zero_experts=1)


def test_a_window_of_mistral_is_refused():
    dense = tiny_dense("mistral", sliding_window=4)
    with pytest.raises(ValueError, match=r"the source has a sliding window \(`sliding_window=4`\), and it has none"):
        upcycle(dense, num_experts=2, top_k=1, target="moe_llama")
    moe, _ = upcycle(tiny_dense("mistral"), num_experts=2, top_k=1, target="moe_llama")
    assert logit_gap(tiny_dense("mistral"), moe) <= 4e-6


# -- MoE++ ---------------------------------------------------------------------------------------------------------
def usage(moe, input_ids) -> list[float]:
    """Share of the tokens that use a zero-computation expert, per layer."""
    with torch.no_grad():
        outputs = moe(input_ids=input_ids, output_router_logits=True)
    return [float((index >= moe.config.num_experts).any(-1).float().mean()) for index in outputs.router_indices]


@pytest.mark.parametrize("recipe", ["copies", "groups", "dense_shared", "part_shared", "residual", "one_layer"])
def test_moe_plus_plus_starts_as_the_dense_model_with_idle_zero_computation_experts(recipe, tmp_path):
    calibration = ids(5, batch=8)
    dense, moe, report = convert("llama", "moe_plus_plus", calibration=calibration, **RECIPES[recipe])
    assert usage(moe, calibration) == [0.0] * len(report.layers)
    assert logit_gap(dense, moe, calibration) <= 4e-6
    assert report.measured.max_difference <= 4e-6 and report.measured.tokens == "calibration"
    moe.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert logit_gap(moe, reloaded.eval()) == 0


def test_moe_plus_plus_promises_no_exactness_and_reports_the_gap():
    _, moe, report = convert("llama", "moe_plus_plus")
    assert not report.predicted_exact and "may choose a zero-computation expert" in report.reason
    assert report.measured.tokens == "random"
    assert moe.config.upcycling["max_difference"] == report.measured.max_difference


def test_the_zero_computation_experts_are_within_reach():
    """Idle at the start, yet with a fair part of the probability, so that the balance loss moves them at once."""
    _, moe, _ = convert("llama", "moe_plus_plus")
    with torch.no_grad():
        logits = moe(input_ids=ids(), output_router_logits=True).router_logits
    share = torch.stack([x.softmax(-1)[:, 4:].sum(-1).mean() for x in logits])
    assert bool((share > 0.1).all())
    moe.train()
    moe(input_ids=ids(), labels=ids()).loss.backward()
    for _, block in moe.moe_blocks():
        assert bool((block.gate.bias.grad[4:] < 0).all())  # a step against the gradient raises them


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_share_of_tokens_that_use_them_can_be_chosen(share):
    calibration = ids(5, batch=40)
    _, moe, report = convert("llama", MoePlusPlusTarget(share), calibration=calibration, layers=[0])
    assert usage(moe, calibration)[0] == pytest.approx(share, abs=0.01)
    assert f"about {share} of the tokens" in report.reason


def test_without_zero_computation_experts_the_start_is_exact():
    dense, moe, report = convert(
        "llama", "moe_plus_plus", num_zero_experts=0, num_copy_experts=0, num_constant_experts=0
    )
    assert report.predicted_exact and logit_gap(dense, moe) <= 4e-6


def test_the_paper_s_weights_are_right_on_average():
    calibration = ids(5, batch=8)
    arguments = dict(weights="softmax", calibration=calibration, target="moe_plus_plus")
    _, moe, report = convert("llama", **arguments)
    assert moe.config.router_config == {"norm_topk_prob": False, "bias": True}
    assert not report.predicted_exact
    small = convert("llama", router=Normal(1e-5), **arguments)[2]
    assert small.measured.max_difference < 1e-3 * report.measured.max_difference + 1e-5


def test_moe_plus_plus_drops_no_tokens_while_loads_are_lopsided():
    _, moe, _ = convert("llama", "moe_plus_plus")
    assert moe.config.expert_capacity_factor is None
    _, moe, _ = convert("llama", "moe_plus_plus", expert_capacity_factor=1.1)
    assert moe.config.expert_capacity_factor == 1.1


def test_moe_plus_plus_keeps_the_paper_s_other_defaults():
    _, moe, _ = convert("llama", "moe_plus_plus")
    config = moe.config
    counts = (config.num_zero_experts, config.num_copy_experts, config.num_constant_experts)
    assert counts == (1, 1, 2) and config.router_tau == 0.75 and config.router_type == "gating_residual"
    assert not moe.model.layers[1].mlp.gate.residual_weight.any()
    assert 0 < float(moe.model.layers[0].mlp.zero_experts.constants.detach().abs().max()) < 0.2


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(weights="sigmoid"), "its router is a softmax"),
    (dict(router_config={"num_layers_gate": 2}), r"has a matrix of shape .* leave out the options"),
])  # fmt: skip
def test_moe_plus_plus_says_what_it_cannot_start(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert("llama", "moe_plus_plus", **arguments)


def test_the_share_must_be_a_share():
    with pytest.raises(ValueError, match=r"`zero_computation_share` must be in \[0, 1\), got 1"):
        MoePlusPlusTarget(1)


@pytest.mark.parametrize("router_type", ["comet", "dselect_k", "hash"])
def test_routers_without_a_matrix_start_as_they_do_by_themselves(router_type, tmp_path):
    dense, moe, _ = convert("llama", router_type=router_type)
    assert logit_gap(dense, moe) <= 4e-6  # copies, and weights that sum to 1
    moe.save_pretrained(tmp_path)
    assert logit_gap(moe, AutoModelForCausalLM.from_pretrained(tmp_path).eval()) <= 1e-6
    with pytest.raises(
        ValueError, match=rf"`router=Repeated\(\.\.\.\)` makes a router matrix.* '{router_type}' has none"
    ):
        convert("llama", router_type=router_type, router=Repeated(2))
