"""Read-ME's conversion: masks, what is stored once, and the function that comes out."""

import json

import pytest
import torch
from common.model_battery import seeded
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hf_moe
from hf_moe.cli import main
from hf_moe.upcycling import convert_to_readme
from hf_moe.upcycling.channel_sets import channel_sets
from hf_moe.upcycling.feed_forward import locate_feed_forwards
from hf_moe.upcycling.statistics import collect_statistics


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama_biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def make_dense(family="llama", **changes):
    config_class, model_class, fields = FAMILIES[family]
    with seeded():
        model = model_class(config_class(**{**SIZES, **fields, **changes})).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero biases would hide mistakes
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_domains():
    """Three domains of disjoint tokens."""
    generator = torch.Generator().manual_seed(0)
    ranges = {"low": (3, 20), "middle": (20, 40), "high": (40, 64)}
    return {name: torch.randint(*limits, (4, 40), generator=generator) for name, limits in ranges.items()}


def masked_dense(dense, moe, input_ids, chosen):
    """Logits of the dense model with a_c = 0 outside the mask of each token's expert."""
    handles = []
    for layer, converted in zip(dense.model.layers, moe.model.layers, strict=True):
        mask = converted.mlp.channel_masks[chosen].to(dense.dtype)  # (B, S, I)
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
    logits = dense(input_ids).logits
    for handle in handles:
        handle.remove()
    return logits


# -- masks -----------------------------------------------------------------------------------------------------------
def test_masks_and_residual_of_the_papers_rule():
    activity = torch.tensor([[5, 4, 3, 2, 1, 0], [0, 4, 3, 5, 1, 2], [5, 4, 0, 1, 3, 2]]).float()
    sets = channel_sets(activity, keep=3)
    assert sets.masks.int().tolist() == [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0]]
    assert sets.masks.all(0).int().tolist() == [0, 1, 0, 0, 0, 0] and sets.shared.tolist() == [1]
    assert [rest.tolist() for rest in sets.experts] == [[0, 2], [2, 3], [0, 4]]


@pytest.mark.parametrize("multiple_of", [1, 4, 8])
def test_experts_of_a_round_width_keep_the_same_channels(multiple_of):
    activity = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) + torch.arange(40) / 20
    sets = channel_sets(activity, keep=20, multiple_of=multiple_of)
    assert sets.expert_size % multiple_of == 0 or sets.expert_size == 20
    for mask, rest in zip(sets.masks, sets.experts, strict=True):
        assert sorted([*sets.shared.tolist(), *rest.tolist()]) == mask.nonzero().squeeze(-1).tolist()
    # what moved are the least active of the common channels
    common = sets.masks.all(0).nonzero().squeeze(-1)
    moved = [c for c in common.tolist() if c not in sets.shared.tolist()]
    mean = activity.mean(0)
    assert not moved or max(mean[moved]) < min(mean[sets.shared])


def test_equal_domains_store_everything_once():
    sets = channel_sets(torch.arange(12.0).expand(3, 12), keep=5, multiple_of=8)
    assert sets.shared.tolist() == [7, 8, 9, 10, 11] and sets.expert_size == 0


def test_activity_is_the_mean_size_of_what_the_down_projection_receives():
    dense, batches = make_dense(), [{"input_ids": ids[None]} for ids in make_domains()["low"]]
    seen = []
    handle = dense.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    stats = collect_statistics(dense, locate_feed_forwards(dense), batches, {"activity"})
    handle.remove()
    expected = torch.cat([state.reshape(-1, 48) for state in seen]).abs().mean(0)
    torch.testing.assert_close(stats[1].importance["activity"], expected)
    assert stats[1].activations is None


# -- the result ------------------------------------------------------------------------------------------------------
@every_family
@torch.no_grad()
def test_keeping_everything_keeps_the_function(family):
    dense, domains = make_dense(family), make_domains()
    moe, report = convert_to_readme(dense, domains, keep=1.0, router_hidden_size=16)
    assert report.predicted_exact and report.measured.is_rounding
    torch.testing.assert_close(moe(domains["low"]).logits, dense(domains["low"]).logits, rtol=1e-5, atol=1e-5)
    # nothing but the router was added, and Qwen2's zero biases
    router = sum(p.numel() for p in moe.model.router.parameters())
    assert report.parameters - router - report.dense_parameters == (2 * 32 if family == "qwen2" else 0)


@every_family
@pytest.mark.parametrize("multiple_of", [1, 8])
@torch.no_grad()
def test_the_result_is_the_dense_model_with_masked_activations(family, multiple_of):
    dense, domains = make_dense(family), make_domains()
    moe, report = convert_to_readme(dense, domains, router_hidden_size=16, multiple_of=multiple_of)
    assert not report.predicted_exact
    assert all(e + s == 24 for e, s in zip(moe.config.expert_sizes, moe.config.shared_sizes, strict=True))
    ids = torch.cat(list(domains.values()))
    outputs = moe(ids, output_router_logits=True)
    chosen = outputs.router_logits.argmax(-1)
    assert len(chosen.unique()) > 1
    torch.testing.assert_close(outputs.logits, masked_dense(dense, moe, ids, chosen), rtol=1e-4, atol=1e-5)


def test_the_routers_embedding_begins_with_the_models_own():
    dense = make_dense()
    moe, _ = convert_to_readme(dense, make_domains(), router_hidden_size=16, check=False)
    assert torch.equal(moe.model.router.embed_tokens.weight, dense.model.embed_tokens.weight[:, :16])
    default, _ = convert_to_readme(dense, make_domains(), check=False)
    assert default.config.router_hidden_size == 32  # no more than the model has
    again, _ = convert_to_readme(dense, make_domains(), check=False)
    other, _ = convert_to_readme(dense, make_domains(), check=False, seed=1)
    heads = [m.model.router.head.weight for m in (default, again, other)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_the_dense_model_is_left_alone():
    dense = make_dense()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    moe, _ = convert_to_readme(dense, make_domains(), check=False)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert not dense._forward_hooks and not dense.model.layers[0].mlp._forward_pre_hooks


def test_the_report_counts_and_the_config_remembers(tmp_path):
    moe, report = convert_to_readme(make_dense(), make_domains(), router_hidden_size=16)
    used = report.parameters - sum(2 * 3 * 32 * size for size in moe.config.expert_sizes)
    assert report.active_parameters == used
    assert "3, 1 per token" in str(report) and json.dumps(report.to_dict())
    assert moe.config.upcycling["calibration_tokens"] == {"low": 160, "middle": 160, "high": 160}
    card = hf_moe.create_model_card(moe, report=report)
    assert "2410.19123" in str(card) and "the channels all domains keep" in str(card)
    moe.save_pretrained(tmp_path)
    loaded = hf_moe.ReadMeForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.upcycling == moe.config.upcycling
    assert torch.equal(loaded.model.layers[0].mlp.channel_masks, moe.model.layers[0].mlp.channel_masks)


def test_half_precision_is_kept_but_for_the_router():
    moe, report = convert_to_readme(make_dense().bfloat16(), make_domains(), keep=1.0, router_hidden_size=16)
    assert moe.dtype == torch.bfloat16 and moe.model.router.head.weight.dtype == torch.float32
    assert report.measured.is_rounding


def test_texts_are_cut_in_windows_and_read_no_further_than_needed(tiny_tokenizer):
    dense, texts = make_dense(vocab_size=384), ["The river runs past the old mill and down to the sea. " * 4] * 3
    read = []

    def endless():
        while True:
            read.append(1)
            yield texts[0]

    moe, _ = convert_to_readme(
        dense, {"one": texts, "two": endless()}, tokenizer=tiny_tokenizer, samples=5, length=16, check=False
    )
    assert moe.config.upcycling["calibration_tokens"]["two"] <= 5 * 16 and 0 < len(read) <= 5
    with pytest.raises(ValueError, match="which needs `tokenizer`"):
        convert_to_readme(dense, {"one": texts, "two": texts})


@torch.no_grad()
def test_experts_specialise_on_their_domains():
    # with the right expert the language model loses less on a domain than with the others, on average
    dense, domains = make_dense(initializer_range=0.3), make_domains()
    moe, _ = convert_to_readme(dense, domains, router_hidden_size=16, check=False)
    gaps = torch.zeros(3, 3)
    for row, ids in enumerate(domains.values()):
        expected = dense(ids).logits
        for expert in range(3):
            chosen = torch.full_like(ids, expert)
            gaps[row, expert] = (masked_dense(dense, moe, ids, chosen) - expected).norm()
    assert gaps.diagonal().mean() < gaps.mean()


# -- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "`keep` must be above 0 and at most 1, got 0.0"),
        ({"keep": 1.5}, "`keep` must be above 0"),
        ({"samples": 0}, "`samples` must be at least 1"),
        ({"multiple_of": 0}, "`multiple_of` must be at least 1"),
        ({"domains": {"one": torch.ones(1, 4, dtype=torch.long)}}, "`domains` must be a mapping of at least two"),
        ({"domains": ["one", "two"]}, "`domains` must be a mapping of at least two"),
        ({"domains": {"one": [], "two": []}}, r"`domains\['one'\]` has no text"),
        ({"router_hidden_size": 64}, r"`router_hidden_size` must be at most the model's `hidden_size` \(32\)"),
        ({"router_hidden_size": 20}, "`router_hidden_size` .* must be a multiple"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        convert_to_readme(make_dense(), **{"domains": make_domains(), **options})


def test_other_models_are_refused():
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM cannot become `read_me`.* llama, mistral, qwen2"):
        convert_to_readme(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)), make_domains())
    with pytest.raises(ValueError, match="LlamaModel cannot become"):
        convert_to_readme(LlamaModel(LlamaConfig(**SIZES)), make_domains())
    with pytest.raises(ValueError, match=r"sliding window \(`sliding_window=8`\)"):
        convert_to_readme(make_dense("mistral", sliding_window=8), make_domains())
    with pytest.raises(ValueError, match="`mlp_bias=True` is not supported"):
        convert_to_readme(make_dense(mlp_bias=True), make_domains())
    with pytest.raises(ValueError, match="ReadMeForCausalLM cannot become"):
        convert_to_readme(convert_to_readme(make_dense(), make_domains(), check=False)[0], make_domains())


# -- command ---------------------------------------------------------------------------------------------------------
def test_the_command_writes_a_model_that_loads(tmp_path, tiny_tokenizer_dir, tiny_tokenizer, capsys):
    make_dense(vocab_size=384).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("The river runs past the old mill.\n\nAnd down to the sea.\n" * 20)
    arguments = ["refactor", str(tmp_path / "dense"), str(tmp_path / "out"), "--length", "32", "--samples", "2"]
    assert main([*arguments, "--domain", f"river={tmp_path / 'text.txt'}", "--domain", "reference"]) == 0
    assert "2, 1 per token" in capsys.readouterr().out
    model = hf_moe.ReadMeForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.upcycling["experts"]["domains"] == ["river", "reference"]
    assert json.loads((tmp_path / "out" / "upcycling.json").read_text())["num_experts"] == 2
    assert main([*arguments, "--domain", "reference"]) == 2  # the folder is there
    assert main([*arguments[:2], str(tmp_path / "new"), "--domain", "code", "--domain", "code"]) == 2
    assert "is there twice" in capsys.readouterr().err and not (tmp_path / "new").exists()
