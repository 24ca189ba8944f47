"""Pruning experts: what stays is what was there, and where nobody chose what goes, nothing changes."""

import pytest
import torch
from common.model_battery import make_inputs, make_model
from common.tiny_families import FAMILIES, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

from hf_moe import moe_layers
from hf_moe.cli import main
from hf_moe.upcycling import expert_usage, prune_experts


N = 4


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


# -- identities ------------------------------------------------------------------------------------------------------
def test_keeping_everything_gives_the_same_model_and_leaves_the_source_alone():
    model, inputs = make_model("moe_llama"), make_inputs(padding="right")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    same = prune_experts(model, num_experts=N, policy="random")
    assert same is not model and torch.equal(run(same, inputs), run(model, inputs))
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_permutation_of_all_experts_changes_nothing():
    model, inputs = make_model("moe_llama"), make_inputs()
    shuffled = prune_experts(model, {0: [2, 0, 3, 1], 1: torch.tensor([3, 2, 1, 0])})
    torch.testing.assert_close(run(shuffled, inputs), run(model, inputs))
    assert not torch.equal(shuffled.model.layers[0].mlp.experts.down_proj, model.model.layers[0].mlp.experts.down_proj)


@pytest.mark.parametrize("top_k", [1, 2])
def test_removing_experts_nobody_chose_changes_nothing_where_weights_are_renormalised(top_k):
    model = make_model("moe_llama", num_experts=6, num_experts_per_tok=top_k)
    inputs = make_inputs(batch=1, sequence=3)
    unused = expert_usage(model, [inputs]).unused()
    assert unused  # three tokens cannot use six experts in every layer
    keep = {layer: [e for e in range(6) if e not in experts] for layer, experts in unused.items()}
    pruned = prune_experts(model, keep)
    torch.testing.assert_close(run(pruned, inputs), run(model, inputs))


def test_weights_of_a_plain_softmax_grow_by_what_was_removed():
    model = make_model(
        "moe_llama", num_experts_per_tok=1, router_config={"norm_topk_prob": False}, num_hidden_layers=1
    )
    pruned = prune_experts(model, {0: [0, 2]})
    old, new = (m.model.layers[0].mlp.gate for m in (model, pruned))
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    p = old(x).router_logits.softmax(-1)
    kept = torch.isin(p.argmax(-1), torch.tensor([0, 2]))
    assert 0 < kept.sum() < 20
    expected = p.amax(-1) / (1 - p[:, 1] - p[:, 3])
    torch.testing.assert_close(new(x[kept]).top_k_weights[:, 0], expected[kept])
    assert torch.equal(new(x[kept]).top_k_index[:, 0], p.argmax(-1)[kept] // 2)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "ernie4_5_moe", "gemma4_text", "moe_gpt2"]
)
def test_families_of_transformers_keep_the_experts_asked_for(family, tmp_path):
    model = tiny_model(family)
    keep = [6, 1, 4, 3]
    pruned = prune_experts(model, {view.index: keep for view in moe_layers(model)})
    for before, after in zip(moe_layers(model), moe_layers(pruned), strict=True):
        assert after.num_experts == 4
        for name, parameter in before.experts.named_parameters():
            assert torch.equal(after.experts.get_parameter(name), parameter[keep])
    inputs = tiny_inputs(model, make_inputs()["input_ids"])
    pruned.save_pretrained(tmp_path)
    again = type(pruned).from_pretrained(tmp_path)
    assert torch.equal(run(again, inputs), run(pruned, inputs))


REFUSED = {"deepseek_v4", "inkling_text", "longcat_flash", "muse_spark_text", "switch_transformers"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_or_refused(family):
    model = tiny_model(family)
    half = {view.index: [6, 1, 4, 3] for view in moe_layers(model)}
    if family in REFUSED:
        with pytest.raises(ValueError, match=r"are not stacked|cannot have another number|one entry for each"):
            prune_experts(model, half)
        return
    inputs = {**tiny_inputs(model, make_inputs()["input_ids"]), "use_cache": False}
    assert torch.equal(run(prune_experts(model, {}), inputs), run(model, inputs))
    pruned = prune_experts(model, half)
    assert run(pruned, inputs).isfinite().all()
    assert all(view.num_computing_experts == 4 for view in moe_layers(pruned))


# -- what is not a row of the experts --------------------------------------------------------------------------------
def test_selection_biases_go_with_their_experts():
    model = make_model("moe_llama", router_type="sigmoid_topk", router_config={"selection_bias": True})
    for _, block in model.moe_blocks():
        block.gate.e_score_correction_bias.copy_(torch.arange(N))
    pruned = prune_experts(model, {0: [3, 1], 1: [2, 0]})
    biases = [block.gate.e_score_correction_bias.tolist() for _, block in pruned.moe_blocks()]
    assert biases == [[3.0, 1.0], [2.0, 0.0]]


def test_residual_maps_between_routers_are_cut_on_both_sides():
    model = make_model("moe_llama", router_type="gating_residual")
    pruned = prune_experts(model, {0: [3, 1], 1: [2, 0]})
    old, new = (m.model.layers[1].mlp.gate.residual_weight for m in (model, pruned))
    assert torch.equal(new, old[[2, 0]][:, [3, 1]])
    assert run(pruned, make_inputs()).isfinite().all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_hash_tables_keep_what_stays_and_deal_out_the_rest(top_k):
    model = make_model("moe_llama", router_type="hash", num_experts_per_tok=top_k)
    keep = [3, 1, 0]
    pruned = prune_experts(model, {0: keep, 1: keep})
    old, new = (m.model.layers[0].mlp.gate.table for m in (model, pruned))
    assert new.shape == old.shape and 0 <= new.min() and new.max() < 3
    for before, after in zip(old.tolist(), new.tolist(), strict=True):
        assert len(set(after)) == top_k
        assert {keep.index(e) for e in before if e in keep} <= set(after)
    assert run(pruned, make_inputs()).isfinite().all()


def test_zero_computation_experts_stay():
    model = make_model("moe_plus_plus")
    idle = model.config.num_zero_computation_experts
    pruned = prune_experts(model, {0: [3, 1], 1: [0, 2]})
    assert pruned.config.num_experts == 2 and pruned.config.num_zero_computation_experts == idle
    old, new = (m.model.layers[0].mlp.gate.weight for m in (model, pruned))
    assert torch.equal(new, old[[3, 1, *range(4, 4 + idle)]])
    assert run(pruned, make_inputs()).isfinite().all()


def test_experts_per_token_are_lowered_to_what_is_left():
    pruned = prune_experts(make_model("moe_llama", num_experts_per_tok=3), num_experts=2, policy="random")
    assert pruned.config.num_experts_per_tok == 2
    assert run(pruned, make_inputs()).isfinite().all()


def test_layers_may_keep_different_numbers(tmp_path):
    model, inputs = make_model("moe_llama"), make_inputs()
    pruned = prune_experts(model, {1: [0, 3]})
    assert pruned.config.num_experts == [4, 2]
    pruned.save_pretrained(tmp_path)
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), run(pruned, inputs))


def test_both_stacks_of_a_t5_are_pruned():
    from hf_moe import MoeT5Config, MoeT5ForConditionalGeneration

    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = MoeT5ForConditionalGeneration(MoeT5Config(**sizes, num_experts=4, decoder_start_token_id=0)).eval()
    ids = make_inputs()["input_ids"]
    batch = {"input_ids": ids, "labels": ids[:, :3]}
    usage = expert_usage(model, [batch])
    assert usage.num_tokens == (16, 6)  # targets are the decoder's tokens
    pruned = prune_experts(model, num_experts=2, usage=usage)
    assert [block.num_experts for _, block in pruned.moe_blocks()] == [2, 2]
    assert pruned(**batch).loss.isfinite()
    assert prune_experts(model, {1: [2, 0, 1]}).config.num_experts == [4, 3]


# -- choosing --------------------------------------------------------------------------------------------------------
def test_load_and_probability_keep_the_most_used():
    model = make_model("moe_llama", num_experts=6)
    usage = expert_usage(model, [make_inputs(4, 8, seed=seed) for seed in range(3)])
    for policy, values in (("load", usage.counts), ("probability", usage.probabilities)):
        pruned = prune_experts(model, num_experts=3, usage=usage, policy=policy)
        for row, (_, block) in enumerate(pruned.moe_blocks()):
            best = sorted(values[row].argsort(descending=True, stable=True)[:3].tolist())
            source = model.moe_blocks()[row][1].experts.down_proj
            assert torch.equal(block.experts.down_proj, source[best])


def test_random_choices_follow_the_seed():
    model = make_model("moe_llama", num_experts=8)
    first = [
        prune_experts(model, num_experts=3, policy="random", seed=s).model.layers[0].mlp.gate.weight for s in (0, 0, 1)
    ]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_usage_is_counted_by_group_without_padding():
    model = make_model("moe_llama")
    code, prose = make_inputs(padding="right", seed=1), make_inputs(seed=2)
    usage = expert_usage(model, [{**code, "language": "code"}, {**prose, "language": "prose"}], per_group="language")
    assert usage["code"].num_tokens == (13, 13) and usage["prose"].num_tokens == (16, 16)
    assert usage["code"].counts[0].sum() == 13 * 2
    torch.testing.assert_close(usage["prose"].probabilities[1].sum().item(), 16.0)
    both = expert_usage(model, [code, prose])
    assert all(torch.equal(a, b) for a, b in zip(both.counts, (usage["code"] + usage["prose"]).counts, strict=True))
    named = expert_usage(model, [code], per_group=lambda batch: "all")
    assert torch.equal(named["all"].counts[0], usage["code"].counts[0])


def test_usage_of_transformers_models_leaves_padding_out():
    model, inputs = tiny_model("mixtral"), make_inputs(padding="right")
    assert expert_usage(model, [inputs]).num_tokens[0] == 13


# -- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either `keep`"),
        ({"keep": {0: [0]}, "num_experts": 2}, "either `keep`"),
        ({"keep": {7: [0]}}, "names the MoE layer 7"),
        ({"keep": {0: [0, 4]}}, "experts 0 to 3"),
        ({"keep": {0: [1, 1]}}, "each once"),
        ({"keep": {0: []}}, "at least one"),
        ({"num_experts": 5, "policy": "random"}, "from 1 to 4"),
        ({"num_experts": 2}, "pass `usage="),
        ({"num_experts": 2, "policy": "best"}, "`policy` must be one of"),
    ],
)
def test_what_cannot_be_kept_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_experts(make_model("moe_llama"), **arguments)


def test_families_that_cannot_be_pruned_say_why():
    with pytest.raises(ValueError, match="leaves of a tree"):
        prune_experts(make_model("moe_llama", router_type="comet"), num_experts=2, policy="random")
    with pytest.raises(ValueError, match="has one number for all its layers"):
        prune_experts(tiny_model("mixtral"), {0: [0, 1, 2]})
    with pytest.raises(ValueError, match="are not stacked"):
        prune_experts(tiny_model("switch_transformers"), num_experts=2, policy="random")
    grouped = make_model("moe_llama", router_config={"num_expert_groups": 2, "top_k_groups": 1})
    with pytest.raises(ValueError, match="2 groups"):
        prune_experts(grouped, {0: [0, 1, 2], 1: [0, 1, 2]})


# -- command ---------------------------------------------------------------------------------------------------------
def test_the_command_prunes_a_folder(tmp_path, capsys, request):
    tokenizer = request.getfixturevalue("tiny_tokenizer")
    model = make_model("moe_llama", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    (tmp_path / "text.txt").write_text("one two three.\n\nfour five six.\n\nseven eight nine.\n")
    source, out = str(tmp_path / "moe"), str(tmp_path / "small")
    assert main(["prune", source, out, "--experts", "2", "--text", str(tmp_path / "text.txt")]) == 0
    assert "2 experts in every MoE layer" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(out).config.num_experts == 2
    assert main(["prune", source, str(tmp_path / "no"), "--experts", "2"]) == 2
    assert "give `--text FILE`" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_the_command_prunes_both_stacks_of_a_t5(tmp_path):
    from hf_moe import MoeT5Config, MoeT5ForConditionalGeneration

    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    MoeT5ForConditionalGeneration(MoeT5Config(**sizes, num_experts=4)).save_pretrained(tmp_path / "moe")
    words = ["prune", str(tmp_path / "moe"), str(tmp_path / "out"), "--experts", "3", "--policy", "random"]
    assert main(words) == 0
    pruned = MoeT5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert [block.num_experts for _, block in pruned.moe_blocks()] == [3, 3]
