"""The public function: defaults, reproducibility, early refusals, checks."""

import json

import pytest
import torch
from common.upcycling_toys import ids, logit_gap, tiny_dense

import hf_moe
from hf_moe.upcycling import (
    Copy,
    Drop,
    ImportanceShared,
    KMeans,
    Masks,
    Noise,
    Normal,
    Prompts,
    Repeated,
    Split,
    VirtualGroups,
    Zeros,
    list_targets,
    recipe,
    upcycle,
)


EVERY = {
    "noise": dict(experts=Noise()),
    "masks": dict(experts=Masks(keep=0.5)),
    "drop": dict(experts=Drop(0.5)),
    "split_random": dict(experts=Split()),
    "split_kmeans": dict(experts=Split("kmeans")),
    "split_coactivation": dict(experts=Split("coactivation"), calibration=ids()),
    "split_importance": dict(experts=Split("importance"), calibration=ids()),
    "importance_shared": dict(experts=ImportanceShared(0.5), calibration=ids()),
    "contribution_shared": dict(experts=ImportanceShared(0.5, "contribution"), calibration=ids()),
    "kmeans_router": dict(router=KMeans(), calibration=ids(batch=8)),
    "prompts_router": dict(router=Prompts({e: [[5 + e, 6]] for e in range(4)})),
    "groups": dict(experts=VirtualGroups(2)),
    "softmax": dict(weights="softmax"),
}
NATIVE_AND_OURS = ["mixtral", "moe_llama", "moe_plus_plus"]


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(recipe.logger, "warning", lines.append)
    return lines


def test_it_is_reached_from_the_package():
    assert hf_moe.upcycle is upcycle and hf_moe.UpcycleReport.__name__ == "UpcycleReport"


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("target", NATIVE_AND_OURS)
def test_every_recipe_runs_and_its_prediction_holds(name, target, tmp_path):
    if target == "mixtral" and name == "softmax":
        pytest.skip("Mixtral renormalises")
    dense = tiny_dense("llama")
    moe, report = upcycle(dense, num_experts=4, top_k=2, target=target, **EVERY[name])
    if report.predicted_exact:
        assert report.measured.max_difference <= 4e-6
    else:
        assert report.reason
    moe.train()
    loss = moe(input_ids=ids(), labels=ids()).loss
    loss.backward()
    assert torch.isfinite(loss)
    moe.eval().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["upcycling"]
    assert saved["predicted_exact"] == report.predicted_exact and saved["reason"] == report.reason


def test_the_seed_decides_everything_random_and_the_global_state_is_untouched():
    dense = tiny_dense("llama")
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    arguments = dict(num_experts=4, top_k=2, experts=Drop(), target="moe_plus_plus")
    a, _ = upcycle(dense, seed=1, **arguments)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    b, _ = upcycle(dense, seed=1, **arguments)
    c, _ = upcycle(dense, seed=2, **arguments)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.model.layers[0].mlp.gate.weight, c.model.layers[0].mlp.gate.weight)


def test_a_layer_comes_out_the_same_whichever_other_layers_are_made():
    dense = tiny_dense("llama")
    both, _ = upcycle(dense, num_experts=4, top_k=2, experts=Drop(), target="moe_llama")
    one, _ = upcycle(dense, num_experts=4, top_k=2, experts=Drop(), target="moe_llama", layers=[1])
    for name, tensor in one.model.layers[1].mlp.state_dict().items():
        assert torch.equal(tensor, both.model.layers[1].mlp.state_dict()[name])
    assert not torch.equal(both.model.layers[0].mlp.gate.weight, both.model.layers[1].mlp.gate.weight)


def test_the_default_router_is_the_one_the_recipe_needs():
    dense = tiny_dense("llama")
    for experts, expected in ((Copy(), "Normal"), (VirtualGroups(2), "Repeated")):
        _, report = upcycle(dense, num_experts=4, top_k=2, experts=experts, check=False)
        assert report.recipe["router"]["name"] == expected


def test_checking_can_be_left_out():
    moe, report = upcycle(tiny_dense("llama"), num_experts=2, top_k=1, check=False)
    assert report.measured is None and "not measured" in report.verdict
    assert "max_difference" not in moe.config.upcycling


def test_a_scale_of_ones_own_is_used_and_its_effect_predicted():
    dense = tiny_dense("llama")
    moe, report = upcycle(dense, num_experts=2, top_k=1, scale=1.5)
    assert not report.predicted_exact and report.reason == "the scale is 1.5, and an exact start needs 1"
    assert torch.equal(moe.model.layers[0].mlp.experts.down_proj[0], 1.5 * dense.model.layers[0].mlp.down_proj.weight)
    _, report = upcycle(dense, num_experts=4, top_k=2, scale=2, experts=VirtualGroups(2))
    assert report.predicted_exact


def test_scales_are_folded_in_float32():
    dense = tiny_dense("llama").bfloat16()
    moe, _ = upcycle(dense, num_experts=6, top_k=3, experts=VirtualGroups(3), target="moe_llama", shared=0.25)
    experts = moe.model.layers[0].mlp.experts.down_proj  # (6, 16, 8)
    weight = dense.model.layers[0].mlp.down_proj.weight
    expected = set((3 * weight.float()).bfloat16().flatten().tolist())
    assert set(experts.flatten().tolist()) <= expected


def test_a_broken_promise_is_reported(said, monkeypatch):
    monkeypatch.setattr(Copy, "build", lambda self, ffn, n, *a, **k: [ffn.scaled(1.1)] * n)
    upcycle(tiny_dense("llama"), num_experts=2, top_k=1)
    assert len(said) == 1 and "should preserve the dense model, but the logits differ by" in said[0]


def test_narrow_experts_run_without_the_kernel_that_refuses_them(said):
    dense = tiny_dense("llama", intermediate_size=24)
    moe, report = upcycle(dense, num_experts=8, top_k=4, experts=VirtualGroups(4))
    assert "Experts of width 6 (hidden size 16) in float32 are not multiples of 16 bytes" in said[0]
    assert moe.config._experts_implementation == "eager"
    assert report.predicted_exact and logit_gap(dense, moe) <= 4e-6


def test_a_single_expert_is_the_dense_model():
    dense = tiny_dense("llama")
    for target in NATIVE_AND_OURS[:2]:
        moe, report = upcycle(dense, num_experts=1, top_k=1, target=target)
        assert report.predicted_exact and logit_gap(dense, moe) <= 4e-6
        assert moe.num_parameters() == dense.num_parameters() + 2 * 16  # one router row per layer


# -- refusals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(num_experts=0), ValueError, "`num_experts` must be at least 1, got 0"),
    (dict(num_experts=2.0), TypeError, r"`num_experts` must be a whole number, got 2.0"),
    (dict(top_k=5), ValueError, r"`top_k` must be between 1 and `num_experts` \(4\), got 5"),
    (dict(top_k=0), ValueError, "`top_k` must be between 1 and"),
    (dict(seed=-1), ValueError, "`seed` must not be negative"),
    (dict(scale=0), ValueError, "`scale` must be 'auto' or a number above 0, got 0"),
    (dict(scale="big"), ValueError, "`scale` must be 'auto' or a number"),
    (dict(scale=float("nan")), ValueError, "`scale` must be"),
    (dict(shared="some"), ValueError, r"`shared` must be None, 'dense', 'residual' or a number .*, got 'some'"),
    (dict(shared=1.0), ValueError, "`shared` must be None"),
    (dict(shared=0.001), ValueError, "`shared=0.001` leaves 0 of 32 channels"),
    (dict(experts="copy"), TypeError, r"`experts` must be an expert builder such as Copy\(\), got 'copy'"),
    (dict(experts=Drop), TypeError, r"write Drop\(...\)"),
    (dict(router="normal"), TypeError, "`router` must be 'auto' or a router start"),
    (dict(router=Normal), TypeError, r"write Normal\(...\)"),
    (dict(router=Zeros()), ValueError, "ties send every token to the same 2 experts"),
    (dict(router=Repeated(3)), ValueError, "`num_experts` must be a multiple of the `groups`"),
    (dict(weights="topk"), ValueError, "`weights` must be one of"),
    (dict(experts=VirtualGroups(3)), ValueError, "`num_experts` must be a multiple of `groups`"),
    (dict(experts=Split(), num_experts=5), ValueError, "32 channels .* `num_experts` = 5 equal parts"),
    (dict(experts=ImportanceShared(4)), ValueError, r"`experts=ImportanceShared\(...\)` looks at data"),
    (dict(router=KMeans()), ValueError, r"`router=KMeans\(...\)` looks at data \(router_inputs\): pass"),
    (dict(layers=[9]), ValueError, "use indices from 0 to 1"),
    (dict(target="mixtrall"), ValueError, "Did you mean 'mixtral'"),
    (dict(target=3), TypeError, "`target` must be a string or a Target, got int"),
    (dict(router_aux_loss=1), ValueError, "MixtralConfig has no field 'router_aux_loss'. Did you mean"),
    (dict(calibration=[]), ValueError, "`calibration` is empty"),
    (dict(calibration="text"), ValueError, "`calibration` has text, which needs `tokenizer`"),
    (dict(target="moe_qwen2"), ValueError, "cannot hold this recipe .*it is made from qwen2, not from llama"),
    (dict(target="moe_llama", shared=0.5, num_experts_per_tok=9), ValueError, "`num_experts_per_tok` must be between"),
])  # fmt: skip
def test_what_cannot_work_is_refused_with_a_sentence(arguments, error, message):
    dense = tiny_dense("llama")
    with pytest.raises(error, match=message):
        upcycle(dense, **{"num_experts": 4, "top_k": 2, **arguments})


def test_groups_that_are_cut_are_not_exact_but_allowed():
    _, report = upcycle(tiny_dense("llama"), num_experts=4, top_k=3, experts=VirtualGroups(2))
    assert not report.predicted_exact and "`top_k` (3) is not a multiple of `groups` (2)" in report.reason
    assert report.measured.max_difference > 1e-3


def test_layers_of_different_width_are_refused():
    from torch import nn

    dense = tiny_dense("llama")
    mlp = dense.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, nn.Linear(16, 8, bias=False))
    mlp.down_proj = nn.Linear(8, 16, bias=False)
    with pytest.raises(ValueError, match="feed-forwards of LlamaForCausalLM differ in shape; select layers of one"):
        upcycle(dense, num_experts=2, top_k=1)


def test_all_targets_are_listed():
    assert list_targets()[0] == "mixtral" and list_targets()[-1] == "generic"
    assert {"moe_llama", "moe_plus_plus", "qwen3_moe"} <= set(list_targets())


def test_text_calibration_uses_the_given_tokenizer(tiny_tokenizer):
    dense = tiny_dense("llama", vocab_size=384)
    moe, report = upcycle(
        dense, num_experts=2, top_k=1, router=KMeans(), calibration=["the cats kept the mice away", "a miller"],
        tokenizer=tiny_tokenizer,
    )  # fmt: skip
    assert report.measured.tokens == "calibration" and report.measured.max_difference <= 4e-6
    assert moe.model.layers[0].mlp.gate.weight.abs().max() > 0


def test_the_tokenizer_beside_the_model_is_found(tiny_tokenizer_dir, tmp_path):
    import shutil

    tiny_dense("llama", vocab_size=384).save_pretrained(tmp_path)
    for file in tiny_tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path)
    _, report = upcycle(tmp_path, num_experts=2, top_k=1, calibration=["the cats kept the mice away"])
    assert report.measured.tokens == "calibration"
