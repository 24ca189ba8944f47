"""Growth of dense models: exact where the theory says so, and not where it does not (AquilaMoE, 2408.06567)."""

import json

import pytest
import torch
from common.growth_toys import gradients, grown_gap, small_model
from common.upcycling_toys import ids
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel

from hf_moe import grow_model, upcycle
from hf_moe.cli import main
from hf_moe.routing.balance import router_z_loss
from hf_moe.upcycling.growth import grow, growable_families


WIDER = {"hidden_size": 64, "num_attention_heads": 8}


@pytest.fixture
def said(monkeypatch):
    """What was warned of."""
    lines = []
    monkeypatch.setattr(grow.logger, "warning", lines.append)
    return lines


# -- width ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", ["fpi", "fpi_uneven"])
@pytest.mark.parametrize("kind", growable_families())
def test_every_family_doubles_without_changing_its_function(kind, width):
    model = small_model(kind)
    inner = {} if kind == "gpt2" else {"intermediate_size": 96}
    grown, report = grow_model(model, width=width, **WIDER, **inner)
    assert grown_gap(model, grown) < 2e-5
    assert report.predicted_exact and report.measured.is_rounding
    assert type(grown) is type(model) and grown.config.hidden_size == 64


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("order", ["cyclic", "random"])
def test_query_heads_stay_in_their_groups(kv_heads, order):
    model = small_model("llama", num_key_value_heads=kv_heads)
    grown, _ = grow_model(model, **WIDER, intermediate_size=96, order=order, width="fpi", check=False)
    assert grown.config.num_key_value_heads == kv_heads and grown.config.head_dim == 8
    assert grown_gap(model, grown) < 1e-5


def test_heads_copied_across_groups_give_another_model():
    model = small_model("llama")
    grown, report = grow_model(model, **WIDER, width="fpi", check=False)
    assert report.head_map == [0, 1, 0, 1, 2, 3, 2, 3]
    crossed = torch.arange(8) % 4  # h mod H over all heads
    with torch.no_grad():
        for old, new in zip(model.model.layers, grown.model.layers, strict=True):
            heads = old.self_attn.q_proj.weight.unflatten(0, (4, 8))[crossed]
            new.self_attn.q_proj.weight.copy_((heads / 2).repeat(1, 1, 2).flatten(0, 1))
            columns = old.self_attn.o_proj.weight.unflatten(1, (4, 8))[:, crossed].flatten(1) / 2
            new.self_attn.o_proj.weight.copy_(columns.repeat(2, 1))
    assert grown_gap(model, grown) > 1


def test_the_feed_forward_and_the_groups_may_grow_to_any_size():
    model = small_model("llama")
    for sizes in ({"intermediate_size": 70}, {"hidden_size": 96, "num_attention_heads": 6}):
        grown, report = grow_model(model, **sizes)
        assert report.predicted_exact and grown_gap(model, grown) < 1e-5


def test_more_key_value_heads_are_copies_and_fewer_are_averages():
    model = small_model("llama")
    more, report = grow_model(model, num_attention_heads=8, num_key_value_heads=4)
    assert report.predicted_exact and grown_gap(model, more) < 1e-5
    fewer, report = grow_model(model, num_key_value_heads=1)
    assert not report.predicted_exact and "averaged" in report.reason and grown_gap(model, fewer) > 1e-2
    heads = model.model.layers[0].self_attn.k_proj.weight.unflatten(0, (2, 8))
    assert torch.equal(fewer.model.layers[0].self_attn.k_proj.weight, heads.mean(0))


def test_a_hidden_size_that_is_no_multiple_is_warned_of(said):
    model = small_model("llama")
    grown, report = grow_model(model, hidden_size=40)
    assert not report.predicted_exact and not report.measured.is_rounding and grown_gap(model, grown) > 0.1
    assert "`hidden_size=40` is no multiple of 32" in " ".join(said)
    assert "`hidden_size=40` is no multiple of 32" in report.warnings[0]


def test_a_norm_over_all_heads_wants_them_equally_often():
    model = small_model("olmo2")
    grown, report = grow_model(model, hidden_size=96, num_attention_heads=6)
    assert not report.predicted_exact and "`q_norm` is a norm over all heads" in report.reason
    assert grown_gap(model, grown) > 1e-3


@pytest.mark.parametrize("width", ["fpi", "fpi_uneven"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "starcoder2"])
def test_tied_embeddings_divide_the_final_norm(kind, width):
    model = small_model(kind, tie_word_embeddings=True)
    grown, _ = grow_model(model, **WIDER, width=width)
    assert grown.get_output_embeddings().weight is grown.get_input_embeddings().weight
    assert grown_gap(model, grown) < 1e-5
    norm = [m for n, m in grown.named_modules() if n.rpartition(".")[2] in ("norm", "ln_f")][-1]
    with torch.no_grad():
        norm.weight.mul_(2)  # not divided
    assert grown_gap(model, grown) > 0.1


def test_embeddings_tied_to_a_norm_without_weights_are_refused():
    with pytest.raises(ValueError, match="no weight in its last norm"):
        grow_model(small_model("olmo", tie_word_embeddings=True), hidden_size=64)


# -- symmetry -------------------------------------------------------------------------------------------------------
def test_copies_get_equal_gradients_under_fpi_and_unequal_ones_otherwise(said):
    model = small_model("llama")
    sizes = {**WIDER, "intermediate_size": 70}
    tied, _ = grow_model(model, **sizes, width="fpi", check=False)
    assert 'width="fpi"` without dropout ties the copies' in " ".join(said)
    for a, b in gradients(tied):
        assert torch.equal(a, b)
    for options in ({"width": "fpi_uneven"}, {"width": "aki"}, {"width": "fpi", "noise_std": 0.01}):
        parted, report = grow_model(model, **sizes, **options, check=False)
        assert not any("ties the copies" in warning for warning in report.warnings)
        for a, b in gradients(parted):
            # Adam divides a common factor away, so the directions must differ.
            assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) < 1 - 1e-5


def test_dropout_parts_copies_too(said):
    grow_model(small_model("llama", attention_dropout=0.1), hidden_size=64, width="fpi", check=False)
    assert "ties the copies" not in " ".join(said)


def test_noise_of_zero_keeps_the_function_and_noise_is_relative():
    model = small_model("llama")
    noisy, report = grow_model(model, intermediate_size=96, width="fpi", noise_std=0.01)
    quiet, _ = grow_model(model, intermediate_size=96, width="fpi")
    assert not report.predicted_exact and 1e-4 < grown_gap(model, noisy) < 0.5
    old, added = (noisy.model.layers[0].mlp.up_proj.weight - quiet.model.layers[0].mlp.up_proj.weight).split(48)
    assert not old.any()
    assert added.std().item() == pytest.approx(0.01 * model.model.layers[0].mlp.up_proj.weight.std().item(), rel=0.1)


# -- AKI ------------------------------------------------------------------------------------------------------------
def test_added_units_of_aki_are_those_of_the_next_layer():
    model = small_model("llama", num_hidden_layers=3)
    aki, report = grow_model(model, intermediate_size=64, width="aki")
    fpi, _ = grow_model(model, intermediate_size=64, width="fpi", check=False)
    assert not report.predicted_exact and "next layer" in report.reason and grown_gap(model, aki) > 0.1
    for layer, source in enumerate((1, 2, 2)):  # the last layer uses itself
        up = aki.model.layers[layer].mlp.up_proj.weight
        assert torch.equal(up[:48], model.model.layers[layer].mlp.up_proj.weight)
        assert torch.equal(up[48:], model.model.layers[source].mlp.up_proj.weight[:16])
        down = (m.model.layers[layer].mlp.down_proj.weight for m in (aki, fpi))
        assert torch.equal(*down)


def test_aki_of_one_layer_or_of_no_new_units_is_fpi():
    single = small_model("llama", num_hidden_layers=1)
    grown, report = grow_model(single, **WIDER, method="aki")
    assert report.predicted_exact and grown_gap(single, grown) < 1e-5
    model = small_model("llama")
    deeper = [grow_model(model, num_hidden_layers=4, width=width, check=False)[0] for width in ("aki", "fpi")]
    assert grown_gap(*deeper) == 0


# -- depth ----------------------------------------------------------------------------------------------------------
def test_interpolated_and_stacked_layers_change_the_function(said):
    model = small_model("llama", num_hidden_layers=3)
    for depth, layers in (("interpolate", [0, 0, 1, 1, 2, 2]), ("stack", [0, 1, 2, 0, 1, 2])):
        grown, report = grow_model(model, num_hidden_layers=6, depth=depth)
        assert report.depth_map == layers and not report.predicted_exact and grown_gap(model, grown) > 0.1
        for layer, source in zip(grown.model.layers, layers, strict=True):
            assert torch.equal(layer.mlp.up_proj.weight, model.model.layers[source].mlp.up_proj.weight)
    assert "3 repeated layers act once more" in " ".join(said)


@pytest.mark.parametrize("kind", ["llama", "olmo2", "gpt2", "gpt_neox", "phi"])
def test_identity_layers_change_nothing(kind):
    model = small_model(kind)
    grown, report = grow_model(model, num_hidden_layers=5, depth="identity")
    assert report.predicted_exact and grown_gap(model, grown) == 0


def test_lists_of_layers_are_re_indexed(said):
    kinds = ["sliding_attention", "full_attention"]
    model = small_model("qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=8)
    grown, _ = grow_model(model, num_hidden_layers=4, check=False)
    assert grown.config.layer_types == [kinds[0]] * 2 + [kinds[1]] * 2
    assert "`layer_types` differs between layers" in " ".join(said)
    rope = grow_model(small_model("smollm3", no_rope_layers=[0, 1]), num_hidden_layers=3, check=False)[0]
    assert rope.config.no_rope_layers == [0, 0, 1]


def test_methods_are_names_for_width_and_depth():
    model = small_model("llama")
    for method, width, depth in (("fpi", "fpi", "interpolate"), ("aki", "aki", "stack"),
                                 ("aki_pro", "aki", "interpolate")):  # fmt: skip
        _, report = grow_model(model, num_hidden_layers=3, hidden_size=64, method=method, check=False)
        assert (report.width, report.depth) == (width, depth)
    with pytest.raises(ValueError, match=r"`method='aki'` means `depth='stack'`, got `depth='identity'`"):
        grow_model(model, num_hidden_layers=3, method="aki", depth="identity")


# -- what comes out ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "result"), [("llama", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe"), ("gpt2", "moe_gpt2")]
)
def test_growing_then_upcycling_is_growing(kind, result):
    model = small_model(kind)
    grown, _ = grow_model(model, hidden_size=64, check=False)  # heads stay as wide, so `head_dim` must be carried over
    moe, report = upcycle(grown, num_experts=4, top_k=2)
    assert report.predicted_exact and moe.config.model_type == result
    assert grown_gap(grown, moe) < 1e-5 and grown_gap(model, moe) < 2e-5


def test_the_z_loss_of_scaling_out_is_the_mean_squared_logsumexp():
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    assert router_z_loss(logits).item() == pytest.approx(4.7082, abs=5e-5)  # the squared maximum would be 4


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_grown_model_reloads_as_what_it_was(kind, tmp_path):
    model = small_model(kind)
    grown, _ = grow_model(model, **WIDER, num_hidden_layers=3, check=False)
    grown.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and grown_gap(grown, again) == 0
    assert again.config.growth["layers"] == [0, 0, 1] and again.config.growth["before"]["hidden_size"] == 32
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_the_source_is_left_as_it_is_and_shares_no_memory():
    model = small_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    grown, _ = grow_model(model, num_hidden_layers=3, check=False)
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config


def test_heads_other_than_the_language_models_grow():
    config = small_model("llama").config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base, classifier = LlamaModel(config).eval(), LlamaForSequenceClassification(config).eval()
    grown, report = grow_model(base, hidden_size=64)
    assert type(grown) is LlamaModel and report.measured.output == "last_hidden_state"
    assert report.measured.is_rounding  # of the coordinates there were
    grown, report = grow_model(classifier, hidden_size=64)
    assert report.predicted_exact and grown_gap(classifier, grown) < 1e-5


def test_the_seed_decides_everything():
    model = small_model("llama")
    a, b, c = (grow_model(model, **WIDER, order="random", seed=seed, check=False)[0] for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


def test_bfloat16_grows_in_float32():
    model = small_model("llama", num_key_value_heads=1).to(torch.bfloat16)
    grown, report = grow_model(model, hidden_size=96, num_attention_heads=6, width="fpi")
    assert grown.dtype == torch.bfloat16 and report.measured.is_rounding
    thirds = (model.lm_head.weight.float() / 3).to(torch.bfloat16)
    assert torch.equal(grown.lm_head.weight, thirds.repeat(1, 3))


def test_a_grown_model_trains():
    grown, _ = grow_model(small_model("llama"), **WIDER, num_hidden_layers=3, check=False)
    optimizer = torch.optim.AdamW(grown.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = grown(input_ids=ids(), labels=ids()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_the_report_says_what_happened():
    _, report = grow_model(small_model("llama"), hidden_size=64, num_hidden_layers=3, depth="identity")
    text = str(report)
    assert "hidden_size 32 -> 64, num_hidden_layers 2 -> 3" in text and "layers 0, 0-1" in text
    assert "the same function as the dense model" in text and "copies of a unit share out what it did" in text
    assert report.to_dict()["measured"]["max_difference"] < 1e-5
    assert report.to_markdown().count("\n") == len(report.rows()) + 2


def test_the_command_grows_a_checkpoint(tmp_path, capsys):
    model = small_model("llama")
    model.save_pretrained(tmp_path / "small")
    sizes = ["--hidden-size", "64", "--num-attention-heads", "8", "--num-hidden-layers", "3", "--depth", "identity"]
    assert main(["grow", str(tmp_path / "small"), str(tmp_path / "large"), *sizes]) == 0
    assert "the same function as the dense model" in capsys.readouterr().out
    assert grown_gap(model, AutoModelForCausalLM.from_pretrained(tmp_path / "large")) < 1e-5
    assert json.loads((tmp_path / "large" / "growth.json").read_text())["after"]["hidden_size"] == 64
    assert main(["grow", str(tmp_path / "small"), str(tmp_path / "other"), "--hidden-size", "16"]) == 2
    assert "growth only adds" in capsys.readouterr().err and not (tmp_path / "other").exists()
