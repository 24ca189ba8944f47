"""Experts from several fine-tunes: whole models and PEFT adapters."""

import copy

import pytest
import torch
from common.upcycling_toys import generator, logit_gap, tiny_dense

from hf_moe import upcycle
from hf_moe.upcycling import Copy, FromModels, Prompts, locate_feed_forwards
from hf_moe.upcycling.builders import from_models


# PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def tuned(base, seed: int, everything: bool = False):
    """A fine-tune of `base`: its feed-forwards moved, or all its weights."""
    model = copy.deepcopy(base)
    g = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if everything or ".mlp." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))
    return model


def always(moe, expert: int) -> None:
    """Makes every router choose `expert`."""
    for module in moe.modules():
        if type(module).__name__ == "MixtralTopKRouter":
            module.register_forward_hook(
                lambda m, a, out: (out[0], torch.ones_like(out[1]), torch.full_like(out[2], expert))
            )


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(from_models.logger, "warning", lines.append)
    return lines


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_a_one_hot_router_reproduces_each_fine_tune(expert):
    base = tiny_dense("llama")
    models = [tuned(base, seed) for seed in (1, 2, 3)]
    moe, report = upcycle(base, num_experts=3, top_k=1, experts=FromModels(models))
    assert not report.predicted_exact and report.reason == "the experts are different fine-tunes"
    always(moe, expert)
    assert logit_gap(moe, models[expert]) <= 2e-6
    assert logit_gap(moe, base) > 1e-3


def test_identical_models_merge_to_one():
    base = tiny_dense("llama")
    moe, report = upcycle(base, num_experts=2, top_k=2, experts=FromModels([base, copy.deepcopy(base)]))
    assert report.predicted_exact and logit_gap(moe, base) <= 2e-6
    copies, _ = upcycle(base, num_experts=2, top_k=2, experts=Copy())
    assert logit_gap(moe, copies) == 0


def test_other_weights_come_from_the_base_or_are_averaged():
    base = tiny_dense("llama")
    models = [tuned(base, seed, everything=True) for seed in (1, 2)]
    own, _ = upcycle(base, num_experts=2, top_k=1, experts=FromModels(models))
    assert torch.equal(own.model.layers[0].self_attn.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)
    blend, report = upcycle(base, num_experts=2, top_k=1, experts=FromModels(models, backbone="average"))
    a, b = (m.model.layers[0].self_attn.q_proj.weight for m in models)
    torch.testing.assert_close(blend.model.layers[0].self_attn.q_proj.weight, (a + b) / 2)
    assert blend.lm_head.weight is blend.model.embed_tokens.weight
    assert not report.predicted_exact


def test_averaging_identical_models_is_exact():
    base = tiny_dense("llama")
    experts = FromModels([base, base], backbone="average")
    moe, report = upcycle(base, num_experts=2, top_k=1, experts=experts)
    assert report.predicted_exact and logit_gap(moe, base) <= 2e-6


def test_models_may_be_folders(tmp_path):
    base = tiny_dense("llama")
    for seed in (1, 2):
        tuned(base, seed).save_pretrained(tmp_path / f"m{seed}")
    base.save_pretrained(tmp_path / "base")
    experts = FromModels([str(tmp_path / "m1"), str(tmp_path / "m2")])
    moe, report = upcycle(str(tmp_path / "base"), num_experts=2, top_k=1, experts=experts)
    always(moe, 1)
    assert logit_gap(moe, tuned(base, 2)) <= 2e-6
    assert report.source == "base" and report.recipe["experts"]["models"] == ["m1", "m2"]  # no path of this machine


def test_only_some_layers_may_be_merged():
    base = tiny_dense("qwen3")
    models = [tuned(base, seed) for seed in (1, 2)]
    moe, _ = upcycle(base, num_experts=2, top_k=1, experts=FromModels(models), layers=[1])
    assert torch.equal(moe.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    experts = moe.model.layers[1].mlp.experts.down_proj
    assert torch.equal(experts[1], models[1].model.layers[1].mlp.down_proj.weight)


def test_experts_may_be_scaled_and_get_noise():
    base = tiny_dense("llama")
    experts = FromModels([base, base, base], residual_scales=[1.0, 0.5, 1.0], noise_scales=[0.0, 0.0, 0.1])
    moe, report = upcycle(base, num_experts=3, top_k=1, experts=experts)
    down, dense = moe.model.layers[0].mlp.experts.down_proj, base.model.layers[0].mlp.down_proj.weight
    assert torch.equal(down[0], dense) and torch.equal(down[1], 0.5 * dense)
    assert float((down[2] - dense).detach().std()) == pytest.approx(0.1, rel=0.1)
    assert not report.predicted_exact


def test_prompts_start_the_router_of_a_merge():
    base = tiny_dense("llama")
    models = [tuned(base, seed) for seed in (1, 2)]
    router = Prompts({0: [[5, 6, 7]], 1: [[50, 60, 70]]})
    moe, _ = upcycle(base, num_experts=2, top_k=1, experts=FromModels(models), router=router)
    expected = router.prepare(base, locate_feed_forwards(base)).rows[1]
    torch.testing.assert_close(moe.model.layers[1].mlp.gate.weight, expected)


# -- adapters ------------------------------------------------------------------------------------------------------
def adapter(base, modules, seed, folder=None):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=16, target_modules=modules))
    g = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=g))
    if folder is not None:
        model.save_pretrained(folder)
    return model.eval()


MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("from_folder", [True, False])
def test_each_adapter_becomes_one_expert(from_folder, tmp_path, said):
    base = tiny_dense("llama")
    adapters = [adapter(base, MLP, seed, tmp_path / str(seed)) for seed in (1, 2)]
    sources = [str(tmp_path / "1"), str(tmp_path / "2")] if from_folder else adapters
    before = {k: v.clone() for k, v in base.state_dict().items()}
    moe, _ = upcycle(base, num_experts=2, top_k=1, experts=FromModels(sources))
    for expert in (0, 1):
        one = copy.deepcopy(moe)
        always(one, expert)
        assert logit_gap(one, adapters[expert]) <= 4e-6
        assert logit_gap(one, base) > 1e-3
    assert not said
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert any("lora_" in name for name, _ in adapters[0].named_parameters())  # the caller's adapter is unmerged


def test_an_adapter_that_touches_attention_is_warned_about(said):
    base = tiny_dense("llama")
    models = [adapter(base, [*MLP, "q_proj", "v_proj"], 1), adapter(base, MLP, 2)]
    upcycle(base, num_experts=2, top_k=1, experts=FromModels(models), check=False)
    assert len(said) == 1 and "also changes q_proj, v_proj; only its changes to the feed-forwards" in said[0]
    upcycle(base, num_experts=2, top_k=1, experts=FromModels(models, backbone="average"), check=False)
    assert len(said) == 1  # averaging uses all of it


# -- what does not fit ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("changes", "message"), [
    (dict(hidden_size=32), "has `hidden_size` = 32, the model being upcycled 16"),
    (dict(vocab_size=80), "has `vocab_size` = 80, the model being upcycled 96"),
    (dict(num_hidden_layers=3), "has `num_hidden_layers` = 3, the model being upcycled 2"),
    (dict(intermediate_size=48), "of LlamaForCausalLM has another form"),
    (dict(hidden_act="gelu"), "of LlamaForCausalLM has another form"),
])  # fmt: skip
def test_models_of_another_size_are_refused(changes, message):
    base = tiny_dense("llama")
    with pytest.raises(ValueError, match=message):
        upcycle(base, num_experts=2, top_k=1, experts=FromModels([base, tiny_dense("llama", **changes)]))


def test_the_number_of_models_is_the_number_of_experts():
    base = tiny_dense("llama")
    with pytest.raises(ValueError, match=r"`num_experts` must equal the number of `models` \(2\), got 4"):
        upcycle(base, num_experts=4, top_k=1, experts=FromModels([base, base]))


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(models=[]), "`models` must be a list with one fine-tune per expert"),
    (dict(models="me/model"), "`models` must be a list"),
    (dict(models=["a", "b"], backbone="mean"), "`backbone` must be one of"),
    (dict(models=["a", "b"], residual_scales=[1.0]), r"`residual_scales` must have one value per model \(2\), got 1"),
])  # fmt: skip
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FromModels(**arguments)


def test_models_must_be_loaded_first():
    with pytest.raises(ValueError, match="must load its models first"):
        FromModels(["a"]).build(None, 1)
    assert FromModels(["a"]).describe()["models"] == ["a"]
