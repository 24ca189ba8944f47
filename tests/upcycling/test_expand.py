"""One expert becomes many (EvoMoE, 2112.14397)."""

import pytest
import torch
from common.tiny_families import tiny_inputs, tiny_model
from common.tiny_training import tiny_moe
from common.upcycling_toys import ids, tiny_dense, toy_ffn
from transformers import AutoModelForCausalLM

from hf_moe import moe_layers, upcycle
from hf_moe.upcycling import Diversify, expand, expand_experts, expand_optimizer_state


FAMILIES = ("moe_llama", "moe_qwen3", "moe_gpt2", "mixtral", "qwen3_moe", "gpt_oss", "granitemoe")
GUMBEL = {"router_type": "dense_to_sparse", "router_config": {"weight_from": "gumbel", "temperature": 2.0}}


def one_expert(**config):
    return tiny_moe(**{"num_experts": 1, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.0, **config})


def few_experts(family):
    fields = type(tiny_model(family).config).__dataclass_fields__
    number = next(name for name in ("num_local_experts", "num_experts") if name in fields)
    return tiny_model(family, **{number: 2, "num_experts_per_tok": 1})


def expert_tensors(view):
    return dict(view.experts.named_parameters())


@torch.no_grad()
def logits(model, length=12):
    return model(**tiny_inputs(model, ids(length=length, vocab=96))).logits


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(expand.logger, "warning", lines.append)
    return lines


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_followed_by_its_copies_and_routers_start_at_zero(family):
    model = few_experts(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expanded = expand_experts(model, 6, diversify="copy")
    assert type(expanded) is type(model)
    for old, new in zip(moe_layers(model), moe_layers(expanded), strict=True):
        assert new.num_experts == 6 and expert_tensors(new).keys() == expert_tensors(old).keys() != set()
        for name, tensor in expert_tensors(new).items():
            assert torch.equal(tensor, expert_tensors(old)[name].repeat_interleave(3, dim=0))
        assert all(not parameter.any() for parameter in new.router.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(moe_layers(model)) and moe_layers(model)[0].num_experts == 2
    assert torch.isfinite(logits(expanded)).all()


@pytest.mark.parametrize("family", ["moe_llama", "moe_gpt2", "mixtral", "gpt_oss"])
def test_repeated_rows_and_as_many_slots_compute_the_same(family):
    model = few_experts(family)
    expanded = expand_experts(model, 6, diversify="copy", router="repeat", num_experts_per_tok=3)
    torch.testing.assert_close(logits(expanded), logits(model), rtol=0, atol=2e-5)


def test_the_first_forward_of_phase_two_is_the_last_of_phase_one():
    model = one_expert().eval()
    experts, threshold = 4, 0.001
    expanded = expand_experts(model, experts, diversify="copy", **GUMBEL)
    reference = logits(model)
    torch.manual_seed(0)
    blocks = [view.block for view in moe_layers(expanded)]
    old_blocks = [view.block for view in moe_layers(model)]
    x = torch.randn(2, 50, 16)
    for old, new in zip(old_blocks, blocks, strict=True):
        was, now = old(x)[0], new.train()(x)[0]
        assert ((now - was).abs() <= experts * threshold * was.abs() + 1e-6).all()
    expanded.train()
    torch.testing.assert_close(logits(expanded), reference, rtol=0, atol=experts * threshold * reference.abs().max())


def test_zeros_in_a_router_without_noise_are_warned_of(said):
    expand_experts(one_expert(), 2, **GUMBEL)
    expand_experts(one_expert(), 2, router="repeat")
    assert not said
    expand_experts(one_expert(), 2)
    assert "Routers that start at zero send every token to the same experts" in said[0]


def test_a_fresh_router_starts_as_a_new_one_of_its_type():
    expanded = expand_experts(one_expert(initializer_range=0.2), 64, router="fresh", router_type="top_p")
    weight = torch.cat([view.router.weight for view in moe_layers(expanded)])
    assert weight.std().item() == pytest.approx(0.2, rel=0.1)


def test_masks_redraw_their_share_from_the_initial_distribution():
    model = one_expert(intermediate_size=256, hidden_size=64, initializer_range=0.5)
    expanded = expand_experts(model, 3, diversify="mask", rate=0.1, **GUMBEL)
    old, new = (expert_tensors(moe_layers(m)[0])["gate_up_proj"] for m in (model, expanded))
    changed = new != old
    assert changed.float().mean(dim=(1, 2)).tolist() == pytest.approx([0.1] * 3, abs=0.01)
    assert new[changed].std().item() == pytest.approx(0.5, rel=0.05)
    assert (changed[0] & changed[1]).float().mean().item() == pytest.approx(0.01, abs=0.004)  # drawn independently


def test_noise_is_relative_to_the_spread_of_a_matrix():
    model = one_expert(initializer_range=0.3)
    expanded = expand_experts(model, 4, diversify="noise", sigma=0.05, **GUMBEL)
    old, new = (expert_tensors(moe_layers(m)[1])["down_proj"] for m in (model, expanded))
    assert (new - old).std(dim=(1, 2)).tolist() == pytest.approx([0.05 * old.std().item()] * 4, rel=0.1)


def test_biases_are_copied():
    model = tiny_model("moe_gpt2", num_experts=1, num_experts_per_tok=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                parameter.normal_()
    expanded = expand_experts(model, 3, diversify="mask", rate=1.0, **GUMBEL)
    old, new = (expert_tensors(moe_layers(m)[0])["down_proj_bias"] for m in (model, expanded))
    assert torch.equal(new, old.expand(3, -1)) and old.any()


def test_the_seed_decides_everything():
    model = one_expert()
    a, b, c = (expand_experts(model, 2, seed=seed, **GUMBEL).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_an_expanded_model_reloads_with_its_router_and_provenance(tmp_path):
    expanded = expand_experts(one_expert(), 4, num_experts_per_tok=1, **GUMBEL)
    expanded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(expanded))
    assert again.config.router_type == "dense_to_sparse" and again.config.num_experts == 4
    assert again.config.upcycling["expansion"]["to"] == 4 and again.config.upcycling["expansion"]["method"] == "mask"


def test_zero_computation_experts_stay_as_many():
    model = tiny_moe("moe_plus_plus", num_experts=2, num_experts_per_tok=1)
    expanded = expand_experts(model, 4, diversify="copy", router="repeat")
    old, new = (moe_layers(m)[0] for m in (model, expanded))
    idle = old.num_experts - 2
    assert idle > 0 and new.num_experts == 4 + idle
    assert torch.equal(new.router.weight[4:], old.router.weight[2:])
    assert torch.equal(new.router.weight[:4], old.router.weight[:2].repeat_interleave(2, 0))


def test_layers_may_have_different_numbers_of_experts():
    model = tiny_moe(num_experts=[1, 2], num_experts_per_tok=1)
    expanded = expand_experts(model, 4, diversify="copy", **GUMBEL)
    assert [view.num_experts for view in moe_layers(expanded)] == [4, 4]


# -- optimizer --------------------------------------------------------------------------------------------------------
def stepped(model, optimizer, steps=1):
    torch.manual_seed(0)
    for _ in range(steps):
        model.train()(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("moments", ["copy", "reset"])
def test_moments_follow_the_experts_and_routers_begin_anew(moments):
    model = one_expert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stepped(model, optimizer, 2)
    expanded = expand_experts(model, 3, diversify="copy", **GUMBEL)
    later = torch.optim.AdamW(expanded.parameters(), lr=1e-3)
    later.load_state_dict(optimizer.state_dict())
    changed = expand_optimizer_state(later, expanded, moments)
    assert changed == 2 * 3  # gate_up_proj, down_proj and the router of both layers
    old, new = moe_layers(model)[0], moe_layers(expanded)[0]
    assert new.router.weight not in later.state
    if moments == "reset":
        assert new.experts.down_proj not in later.state
    else:
        for key in ("exp_avg", "exp_avg_sq"):
            kept = optimizer.state[old.experts.down_proj][key]
            assert torch.equal(later.state[new.experts.down_proj][key], kept.expand(3, -1, -1)) and kept.any()
    embedding = (m.get_input_embeddings().weight for m in (model, expanded))
    assert torch.equal(*(o.state[p]["exp_avg"] for o, p in zip((optimizer, later), embedding, strict=True)))
    stepped(expanded, later)
    assert expand_optimizer_state(later, expanded) == 0  # all shapes fit now


def test_a_state_of_another_model_is_refused():
    model = one_expert()
    expanded = expand_experts(model, 2, **GUMBEL)
    optimizer = torch.optim.AdamW(expanded.parameters())
    stepped(expanded, optimizer)
    weight = expanded.get_input_embeddings().weight
    optimizer.state[weight]["exp_avg"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"`model\.embed_tokens\.weight` has the shape .* belongs to another model"):
        expand_optimizer_state(optimizer, expanded)
    with pytest.raises(ValueError, match=r"`moments` must be one of \['copy', 'reset'\], got 'half'"):
        expand_optimizer_state(optimizer, expanded, "half")


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 3}, "`num_experts` must be a multiple of the 2 experts of `model.layers.0.mlp`, got 3"),
        ({"num_experts": 0}, "`num_experts` must be a whole number of at least 1, got 0"),
        ({"num_experts": 4, "diversify": "shake"}, r"`method` must be one of .*, got 'shake'"),
        ({"num_experts": 4, "rate": 1.5}, "`rate` must be between 0 and 1, got 1.5"),
        ({"num_experts": 4, "diversify": "noise", "sigma": -1.0}, "`sigma` must not be negative, got -1.0"),
        ({"num_experts": 4, "router": "ones"}, r"`router` must be one of .*, got 'ones'"),
        ({"num_experts": 4, "rooter": 1}, "MoeLlamaConfig has no field 'rooter'"),
    ],
)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        expand_experts(tiny_moe(num_experts=2), **arguments)


def test_fresh_routers_are_those_of_this_package():
    with pytest.raises(ValueError, match="those of MixtralForCausalLM can be 'zeros' or 'repeat'"):
        expand_experts(few_experts("mixtral"), 4, router="fresh")


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        expand_experts(tiny_dense("llama"), 4)


# -- as an expert builder ---------------------------------------------------------------------------------------------
def test_upcycling_with_diversified_copies():
    dense = tiny_dense("llama", initializer_range=0.15)
    moe, report = upcycle(dense, num_experts=4, top_k=2, experts=Diversify("mask", rate=0.1))
    assert not report.predicted_exact and "10% of the weights" in report.reason
    assert report.recipe["experts"] == {"name": "Diversify", "method": "mask", "rate": 0.1, "sigma": 0.01, "std": 0.15}
    down = expert_tensors(moe_layers(moe)[0])["down_proj"]
    assert not torch.equal(down[0], down[1])
    _, report = upcycle(dense, num_experts=4, top_k=2, experts=Diversify("copy"))
    assert report.predicted_exact and report.measured.is_rounding
    _, report = upcycle(dense, num_experts=4, top_k=2, experts=Diversify("noise", sigma=0.1))
    assert "noise of 0.1 standard deviations" in report.reason and not report.measured.is_rounding


def test_a_builder_that_changes_nothing_returns_the_feed_forward_itself():
    ffn = toy_ffn()
    for builder in (Diversify("copy"), Diversify("mask", rate=0.0), Diversify("noise", sigma=0.0)):
        assert all(expert is ffn for expert in builder.build(ffn, 3))
    changed = Diversify("mask", rate=0.5).build(ffn, 2, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(changed[0].up, changed[1].up) and not torch.equal(changed[0].up, ffn.up)
