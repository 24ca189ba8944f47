"""A report over a stream equals what is counted by hand, whatever the batches look like."""

import json

import pytest
import torch
from common.tiny_families import tiny_model

import hf_moe
from hf_moe.reporting import routing_report
from hf_moe.reporting.report import REPORT_FILES
from hf_moe.routing.balance import expert_frequency


TEXTS = [
    "The river runs past the old mill and down to the sea.",
    "A miller kept three cats.",
    "def add(a, b):\n    return a + b",
    "Experts specialise when the router lets them; otherwise every expert learns the same function.",
]


@pytest.fixture
def model():
    # Routers start at zero or close to it in several families; a decided one makes the counts uneven.
    model, generator = tiny_model("mixtral"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for view in hf_moe.moe_layers(model):
            view.router.weight.copy_(torch.randn(view.router.weight.shape, generator=generator))
    return model


def test_report_equals_routing_of_each_text_alone(model, tiny_tokenizer):
    report = routing_report(model, tiny_tokenizer, TEXTS, batch_size=3)
    ids = [tiny_tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    with torch.no_grad(), hf_moe.record_routing(model) as recorder:
        for input_ids in ids:
            model(input_ids=input_ids)
    assert report.num_tokens == sum(i.shape[1] for i in ids)
    for layer, record in zip(report.layers, recorder.layers, strict=True):
        index, logits = torch.cat(record.top_k_index), torch.cat(record.router_logits)
        load = expert_frequency(index, 8)
        assert layer.load == pytest.approx(load.tolist())
        assert layer.max_violation == pytest.approx(load.max().item() * 8 - 1, rel=1e-5)
        p = logits.softmax(-1)
        assert layer.entropy == pytest.approx(torch.special.entr(p).sum(-1).mean().item(), rel=1e-5)
        assert layer.marginal_entropy == pytest.approx(torch.special.entr(p.mean(0)).sum().item(), rel=1e-5)
        assert [layer.coactivation[i][i] for i in range(8)] == layer.counts
        assert layer.active_experts == layer.active_computing_experts == 2
    compute = hf_moe.active_compute(model)
    assert report.flops_per_token == compute.flops(2)
    assert report.flops_share == pytest.approx(compute.flops(2) / compute.flops(8)) and 0 < report.flops_share < 1


def test_batches_and_padding_do_not_change_the_report(model, tiny_tokenizer):
    one = routing_report(model, tiny_tokenizer, TEXTS, batch_size=1).to_dict()
    many = routing_report(model, tiny_tokenizer, iter(TEXTS), batch_size=4).to_dict()
    for a, b in zip(one["layers"], many["layers"], strict=True):
        assert a["counts"] == b["counts"] and a["coactivation"] == b["coactivation"]
        assert a["examples"] == b["examples"]
        assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-6)


def test_long_texts_are_cut_not_truncated(model, tiny_tokenizer):
    text = " ".join(TEXTS * 6)
    length = len(tiny_tokenizer(text, verbose=False).input_ids)
    assert length > 128  # longer than the model's positions
    assert routing_report(model, tiny_tokenizer, [text]).num_tokens == length


@pytest.mark.parametrize("max_tokens", [1, 17, 40])
def test_max_tokens_is_exact(model, tiny_tokenizer, max_tokens):
    report = routing_report(model, tiny_tokenizer, TEXTS, max_tokens=max_tokens, batch_size=2)
    assert report.num_tokens == max_tokens


def test_dead_experts_are_named(model, tiny_tokenizer):
    with torch.no_grad():  # the logit of expert 3 is the lowest for every token with this
        view = hf_moe.moe_layers(model)[0]
        view.router.weight[3] = 0
        view.router.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]),))
        view.router.weight[:] = 1.0
        view.router.weight[3] = -1.0
    report = routing_report(model, tiny_tokenizer, TEXTS)
    assert 3 in report.layers[0].dead_experts
    assert report.metrics()["dead_share"] >= 0.125 / 4


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model, tiny_tokenizer, training):
    model.train(training)
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    routing_report(model, tiny_tokenizer, TEXTS)
    assert model.training is training
    with pytest.raises(ValueError):
        routing_report(model, tiny_tokenizer, [TEXTS[0], None])
    assert model.training is training
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


def test_zero_computation_experts_are_told_apart(tiny_tokenizer):
    model = tiny_model("moe_plus_plus", num_experts=4, num_zero_experts=1, num_copy_experts=1, num_constant_experts=2)
    report = routing_report(model, tiny_tokenizer, TEXTS)
    layer = report.layers[1]
    assert layer.expert_labels == ["0", "1", "2", "3", "constant 0", "constant 1", "copy 0", "zero 0"]
    computing = sum(layer.counts[:4]) / report.num_tokens
    assert layer.active_computing_experts == pytest.approx(computing)
    assert 0 < computing < layer.active_experts == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21
def test_own_backbone_and_peft_wrapper_report_alike(tiny_tokenizer):
    peft = pytest.importorskip("peft")
    model = tiny_model("moe_llama", moe_layers=[1])
    before = routing_report(model, tiny_tokenizer, TEXTS)
    wrapped = peft.PeftModel(model, peft.LoraConfig(target_modules=["q_proj"]))
    after = routing_report(wrapped, tiny_tokenizer, TEXTS)
    assert [layer.name for layer in before.layers] == ["model.layers.1.mlp"]
    assert after.flops_per_token > before.flops_per_token  # the adapter's own products
    cost = {"flops_per_token": None, "flops_share": None}
    assert {**after.to_dict(), **cost} == {**before.to_dict(), **cost}


# -- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_refused(model, tiny_tokenizer, texts):
    with pytest.raises(ValueError, match="`texts` holds no token"):
        routing_report(model, tiny_tokenizer, texts)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="`tokenizer` has 384 ids but the model embeds 300"):
        routing_report(tiny_model("mixtral", vocab_size=300), tiny_tokenizer, TEXTS)


@pytest.mark.parametrize("name", ["batch_size", "max_length", "max_tokens"])
def test_sizes_below_one_are_refused(model, tiny_tokenizer, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        routing_report(model, tiny_tokenizer, TEXTS, **{name: 0})


# -- what is written -------------------------------------------------------------------------------------------------
def test_saved_report_is_complete_and_readable(model, tiny_tokenizer, tmp_path):
    report = routing_report(model, tiny_tokenizer, TEXTS * 3, model_name="tiny | mixtral")
    folder = report.save(tmp_path / "new" / "report")
    assert sorted(path.name for path in folder.iterdir()) == sorted(REPORT_FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["report"]  # no temporary folder stays
    content = json.loads((folder / "report.json").read_text())
    assert content["num_tokens"] == report.num_tokens and len(content["layers"]) == 4
    assert {"text", "token_id", "count", "share"} == set(content["layers"][0]["examples"][0][0])
    page = (folder / "report.md").read_text()
    assert all(f"({name})" in page for name in REPORT_FILES if name.endswith(".png"))
    assert "| model.layers.3.mlp | 8 | 2.00 |" in page


def test_table_has_one_row_per_layer_for_the_card(model, tiny_tokenizer):
    rows = routing_report(model, tiny_tokenizer, TEXTS).table()
    assert [row["Layer"] for row in rows] == [f"model.layers.{i}.mlp" for i in range(4)]
    assert len({tuple(row) for row in rows}) == 1


def test_a_failed_save_leaves_the_old_report(model, tiny_tokenizer, tmp_path, monkeypatch):
    def draw(report, directory):
        for name in REPORT_FILES[:2]:
            (directory / name).write_text(report.model_name)
        return dict.fromkeys(REPORT_FILES[:2], "Not drawn.")

    monkeypatch.setattr("hf_moe.reporting.plots.save_plots", draw)
    report = routing_report(model, tiny_tokenizer, TEXTS)
    report.save(tmp_path / "report")
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_moe.reporting.markdown.render_markdown", fail)
    report.model_name = "another"
    with pytest.raises(KeyboardInterrupt):
        report.save(tmp_path / "report")
    assert len(before) == 4
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_top_1_routing_has_no_coactivation_plot(tiny_tokenizer, tmp_path):
    report = routing_report(tiny_model("mixtral", num_experts_per_tok=1), tiny_tokenizer, TEXTS)
    (tmp_path / "coactivation.png").write_bytes(b"of an older report")
    report.save(tmp_path)
    assert not (tmp_path / "coactivation.png").exists()
    assert "coactivation.png" not in (tmp_path / "report.md").read_text()


def test_a_file_in_the_way_is_refused_by_name(model, tiny_tokenizer, tmp_path):
    (tmp_path / "taken").write_text("mine")
    report = routing_report(model, tiny_tokenizer, TEXTS)
    with pytest.raises(OSError, match=r"`output` .*taken/report.* cannot be a folder: .*taken' is a file"):
        report.save(tmp_path / "taken" / "report")
    assert (tmp_path / "taken").read_text() == "mine"
