"""Aggregation of Experts: a model with itself, and back again."""

import pytest
import torch
from common.model_battery import make_inputs, make_model
from common.tiny_families import tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

from hf_moe import moe_layers
from hf_moe.cli import main
from hf_moe.upcycling import aggregate_checkpoints, aggregate_experts, prune_experts


N = 4
PLAIN = {"norm_topk_prob": False}


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def branches(**changes):
    """Two models of one history: the second has moved a little."""
    a, b = make_model("moe_llama", **changes), make_model("moe_llama", **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return a, b


def block_outputs(model, x):
    with torch.no_grad():
        return [block(x)[0] for _, block in model.moe_blocks()]


X = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))


# -- a model with itself ---------------------------------------------------------------------------------------------
def test_both_copies_of_an_expert_get_half_of_its_probability():
    model = make_model("moe_llama")
    both = aggregate_experts(model, model)
    tokens = X.flatten(0, 1)
    p = model.model.layers[0].mlp.gate(tokens).router_logits.softmax(-1)
    q = both.model.layers[0].mlp.gate(tokens).router_logits.softmax(-1)
    torch.testing.assert_close(q, torch.cat([p, p], dim=-1) / 2)


def test_top_1_of_a_plain_softmax_is_exactly_half_and_rescaled_exactly_the_same():
    model = make_model("moe_llama", num_experts_per_tok=1, router_config=PLAIN)
    expected = block_outputs(model, X)
    for rescale, factor in ((False, 0.5), (True, 1.0)):
        both = aggregate_experts(model, model, rescale=rescale)
        for got, one in zip(block_outputs(both, X), expected, strict=True):
            torch.testing.assert_close(got, factor * one)
    assert torch.equal(run(both, make_inputs()).argmax(-1), run(model, make_inputs()).argmax(-1))


def test_renormalised_top_2_is_both_copies_and_so_the_renormalised_top_1():
    model = make_model("moe_llama", num_experts_per_tok=1)
    both = aggregate_experts(model, model)
    torch.testing.assert_close(run(both, make_inputs()), run(model, make_inputs()))  # top-1 of 2N: one copy, weight 1
    for _, block in both.moe_blocks():
        block.gate.top_k = 2
    for got, one in zip(block_outputs(both, X), block_outputs(model, X), strict=True):
        torch.testing.assert_close(got, one)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_families_of_transformers_hold_both(family, tmp_path):
    model = tiny_model(family)
    both = aggregate_experts(model, model)
    for before, after in zip(moe_layers(model), moe_layers(both), strict=True):
        assert after.num_experts == 2 * before.num_experts
        for name, parameter in before.experts.named_parameters():
            twice = torch.cat([parameter, parameter])
            got = after.experts.get_parameter(name)
            assert torch.equal(got, twice) or torch.equal(got, 2 * twice)
    inputs = tiny_inputs(model, make_inputs()["input_ids"])
    both.save_pretrained(tmp_path)
    # copies are ties, of which any may be chosen
    torch.testing.assert_close(run(type(both).from_pretrained(tmp_path), inputs), run(both, inputs))


# -- two models ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("router", [{}, {"router_type": "gating_residual"}, {"router_config": PLAIN}], ids=str)
def test_pruned_to_the_first_experts_it_is_the_first_model_again(router):
    a, b = branches(**router)
    both = aggregate_experts(a, b, shared="a", rescale=False)
    back = prune_experts(both, dict.fromkeys(range(2), range(N)))
    assert back.state_dict().keys() == a.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in a.state_dict().items())
    assert torch.equal(run(back, make_inputs()), run(a, make_inputs()))


def test_shared_weights_are_the_mean_or_those_of_one():
    a, b = branches()
    for shared, expected in (("mean", lambda x, y: (x + y) / 2), ("a", lambda x, y: x), ("b", lambda x, y: y)):
        both = aggregate_experts(a, b, shared=shared)
        name = "model.layers.1.self_attn.q_proj.weight"
        x, y = a.get_parameter(name), b.get_parameter(name)
        torch.testing.assert_close(both.get_parameter(name), expected(x, y))
        experts = both.model.layers[0].mlp.experts.down_proj
        assert torch.equal(experts[:N], a.model.layers[0].mlp.experts.down_proj)
        assert torch.equal(experts[N:], b.model.layers[0].mlp.experts.down_proj)


def test_the_models_given_are_left_alone_and_nothing_is_shared():
    a, b = branches()
    kept = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    both = aggregate_experts(a, b, shared="a")
    with torch.no_grad():
        for parameter in both.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in a.state_dict().items())


def test_training_goes_on():
    a, b = branches()
    both = aggregate_experts(a, b).train()
    inputs = make_inputs()
    optimizer = torch.optim.AdamW(both.parameters(), lr=5e-3)
    losses = []
    for _ in range(15):
        loss = both(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# -- folder to folder ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["moe_llama", "mixtral", "qwen3_moe"])
def test_folders_give_what_models_give(family, tmp_path):
    model = tiny_model(family)
    other = tiny_model(family)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    for folder, each in (("a", model), ("b", other)):
        each.save_pretrained(tmp_path / folder)  # mixtral and qwen write their experts one by one
    aggregate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", max_shard_size=50_000)
    expected = aggregate_experts(model, other)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-7, msg=name)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]  # no temporary folder is left


def test_a_t5_is_aggregated_folder_to_folder(tmp_path, capsys):
    from hf_moe import MoeT5Config, MoeT5ForConditionalGeneration

    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = MoeT5ForConditionalGeneration(MoeT5Config(**sizes, num_experts=4, decoder_start_token_id=0)).eval()
    model.save_pretrained(tmp_path / "a")
    arguments = ["aggregate", str(tmp_path / "a"), str(tmp_path / "a"), str(tmp_path / "out"), "--shared", "a"]
    assert main(arguments) == 0 and "Wrote" in capsys.readouterr().out
    both = MoeT5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert [block.num_experts for _, block in both.moe_blocks()] == [8, 8]
    assert main(arguments) == 2  # the folder is there


# -- refusals --------------------------------------------------------------------------------------------------------
def test_what_cannot_be_aggregated_is_refused(tmp_path):
    a = make_model("moe_llama")
    with pytest.raises(ValueError, match="`shared` must be one of"):
        aggregate_experts(a, a, shared="both")
    with pytest.raises(ValueError, match="they must be alike"):
        aggregate_experts(a, make_model("moe_qwen2"))
    with pytest.raises(ValueError, match="only models of one shape"):
        aggregate_experts(a, make_model("moe_llama", num_experts=6))
    for why, changes in (
        ("token id", {"router_type": "hash"}),
        ("groups of experts", {"router_config": {"num_expert_groups": 2, "top_k_groups": 1}}),
        ("leaves of a tree", {"router_type": "comet"}),
    ):
        model = make_model("moe_llama", **changes)
        with pytest.raises(ValueError, match=why):
            aggregate_experts(model, model)
    model = make_model("moe_plus_plus")
    with pytest.raises(ValueError, match="zero-computation"):
        aggregate_experts(model, model)
    with pytest.raises(ValueError, match="is not a folder"):
        aggregate_checkpoints(tmp_path / "none", tmp_path / "none", tmp_path / "out")
