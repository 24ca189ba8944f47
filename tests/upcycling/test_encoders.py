"""BERT's family becomes `moe_bert` and `moe_roberta`: every head, every recipe, MoEBERT's importance split."""

import json

import pytest
import torch
import transformers
from common.upcycling_toys import generator
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_moe import upcycle, upcycle_checkpoint
from hf_moe.upcycling import (
    Copy,
    Drop,
    FromModels,
    Hash,
    ImportanceShared,
    KMeans,
    Prompts,
    Split,
    VirtualGroups,
    Zeros,
    extract_feed_forward,
    locate_feed_forwards,
)
from hf_moe.upcycling.split_feed_forward import SplitFeedForward
from hf_moe.upcycling.statistics import collect_statistics


SIZES = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 40, "type_vocab_size": 2,
}  # fmt: skip
TARGETS = {"bert": "moe_bert", "roberta": "moe_roberta", "xlm-roberta": "moe_roberta", "camembert": "moe_roberta"}
HEADS = ("", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
RECIPES = {
    "copies": {},
    "drop_nothing": dict(experts=Drop(0.0)),
    "groups": dict(num_experts=8, top_k=4, experts=VirtualGroups(2)),
    "dense_shared": dict(shared="dense", experts=Drop()),
    "part_shared": dict(shared=0.5, experts=VirtualGroups(2)),
    "residual": dict(shared="residual"),
    "one_layer": dict(layers=[1]),
    "split": dict(top_k=4, experts=Split(), router=Zeros()),
    "hash": dict(router=Hash()),
    "keep_all": dict(top_k=1, experts=ImportanceShared(1.0)),
}


def tiny(kind="bert", head="ForSequenceClassification", seed=0, **changes):
    config = AutoConfig.for_model(
        kind, **{**SIZES, "num_labels": 2 if head == "ForQuestionAnswering" else 3, **changes}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"AutoModel{head}").from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1) / 2, std=0.15)
    return model.eval()


def batch(labels=True, seed=0):
    ids = torch.randint(5, 96, (4, 10), generator=generator(seed))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, **({"labels": ids[:, 0] % 3} if labels else {})}


def first(outputs, mask):
    found = outputs.get("logits", outputs.get("start_logits", outputs.get("last_hidden_state")))
    return found[mask.bool()] if found.shape[:2] == mask.shape else found


@torch.no_grad()
def assert_same(one, other, tolerance=4e-6):
    inputs = batch(labels=False)
    mask = inputs["attention_mask"]
    torch.testing.assert_close(first(one(**inputs), mask), first(other(**inputs), mask), rtol=0, atol=tolerance)


def assert_same_weights(one, other):
    found, wanted = one.state_dict(), other.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert_same(one, other)  # the same numbers at another address: sums may round otherwise


# -- copies and the other exact recipes ------------------------------------------------------------------------------
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", TARGETS)
def test_copies_compute_the_dense_model_before_and_after_reloading(kind, head, tmp_path):
    dense = tiny(kind, head)
    moe, report = upcycle(dense, num_experts=4, top_k=2)
    assert report.target == TARGETS[kind] == moe.config.model_type and report.predicted_exact
    assert type(moe).__name__.endswith(head or "Model") and report.measured.is_rounding
    assert_same(moe, dense)
    moe.save_pretrained(tmp_path)
    reloaded, info = getattr(transformers, f"AutoModel{head}").from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_weights(reloaded, moe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_exact_recipes_keep_the_logits(recipe):
    dense = tiny()
    moe, report = upcycle(dense, **{"num_experts": 4, "top_k": 2, "target": "moe_bert", **RECIPES[recipe]})
    assert report.predicted_exact and moe.config.model_type == "moe_bert"
    assert_same(moe, dense)
    head = {
        name: value for name, value in dense.state_dict().items() if name.startswith(("classifier", "bert.pooler"))
    }
    assert head and all(torch.equal(moe.state_dict()[name], value) for name, value in head.items())


def test_the_dense_model_keeps_its_weights_and_its_memory():
    dense = tiny()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    moe, _ = upcycle(dense, num_experts=2, top_k=1, check=False)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_checkpoints_are_converted_file_by_file_to_the_same_model(kind, tmp_path):
    tiny(kind).save_pretrained(tmp_path / "dense")
    options = {"num_experts": 4, "top_k": 2, "seed": 3}
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", **options)
    streamed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe")
    loaded, _ = upcycle(str(tmp_path / "dense"), check=False, **options)
    assert type(streamed) is type(loaded)
    wanted = loaded.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in streamed.state_dict().items())


@pytest.mark.parametrize("head", ["ForPreTraining", "ForNextSentencePrediction"])
def test_heads_without_a_class_of_ours_become_generic(head):
    dense = tiny("bert", head)
    moe, report = upcycle(dense, num_experts=4, top_k=2)
    assert report.target == "generic" and type(moe).__name__ == f"UpcycledBert{head}"
    assert report.predicted_exact and report.measured.is_rounding


def test_relatives_without_a_type_of_ours_become_generic(tmp_path):
    dense = tiny("electra", embedding_size=16)
    moe, report = upcycle(dense, num_experts=4, top_k=2)
    assert report.target == "generic" and report.predicted_exact
    assert_same(moe, dense)
    moe.save_pretrained(tmp_path)
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path), moe)


def test_decoders_do_not_become_encoders():
    with pytest.raises(ValueError, match=r"cannot hold this recipe for BertForMaskedLM: the source is a decoder"):
        upcycle(tiny("bert", "ForMaskedLM", is_decoder=True), num_experts=2, top_k=1, target="moe_bert")
    with pytest.raises(ValueError, match=r"it has no causal language model class"):
        upcycle(tiny("bert", "ForCausalLM", is_decoder=True), num_experts=2, top_k=1, target="moe_bert")


def test_released_pretraining_checkpoints_load(tmp_path):
    """As bert-base-uncased is: two heads, of which the config names one, and norms under their old names."""
    released = tiny("bert", "ForPreTraining")
    released.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    state = load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        state = {key.replace(new, name): value for key, value in state.items()}
    assert any(key.endswith(".gamma") for key in state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    moe, report = upcycle(str(tmp_path), num_experts=4, top_k=2)
    assert type(moe).__name__ == "MoeBertForMaskedLM" and report.predicted_exact and report.measured.is_rounding
    inputs = batch(labels=False)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        moe(**inputs).logits[real], released(**inputs).prediction_logits[real], rtol=0, atol=4e-6
    )


# -- what recipes see ------------------------------------------------------------------------------------------------
def test_the_feed_forward_is_the_two_maps_without_residual_and_norm():
    dense = tiny()
    sites = locate_feed_forwards(dense)
    assert [site.name for site in sites] == [f"bert.encoder.layer.{i}.intermediate" for i in range(3)]
    layer, x = dense.bert.encoder.layer[1], torch.randn(2, 5, 16, generator=generator())
    ffn = extract_feed_forward(sites[1].module)
    torch.testing.assert_close(ffn(x), layer.output.dense(layer.intermediate(x)))
    assert ffn.activation == "gelu" and ffn.biased and not ffn.gated
    assert not SplitFeedForward.fits(layer.attention) and not SplitFeedForward.fits(layer.intermediate)


def test_statistics_are_those_of_the_definition():
    dense, inputs = tiny(), batch()
    sites = locate_feed_forwards(dense)
    needs = {"router_inputs", "activations", "taylor", "contribution"}
    stats = collect_statistics(dense, sites, [inputs], needs)[1]
    seen = {}
    layer = dense.bert.encoder.layer[1]

    def keep(name):
        def hook(_module, args):
            args[0].retain_grad()
            seen[name] = args[0]

        return hook

    handles = [
        layer.intermediate.register_forward_pre_hook(keep("x")),
        layer.output.dense.register_forward_pre_hook(keep("a")),
    ]
    dense(**inputs).loss.backward()
    for handle in handles:
        handle.remove()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(stats.router_inputs, seen["x"][real].detach())
    torch.testing.assert_close(stats.activations, seen["a"][real].detach())
    torch.testing.assert_close(stats.importance["taylor"], (seen["a"] * seen["a"].grad)[real].abs().mean(0).detach())
    contribution = seen["a"][real].abs().mean(0) * layer.output.dense.weight.norm(dim=0)
    torch.testing.assert_close(stats.importance["contribution"], contribution.detach())


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
def test_importances_of_a_task_need_its_labels(head):
    options = {"num_experts": 4, "top_k": 1, "experts": ImportanceShared(8, width=12)}
    with pytest.raises(ValueError, match=r"needs the labels of its task: pass `calibration` as model inputs with"):
        upcycle(tiny("bert", head), calibration=batch(labels=False), **options)
    given = batch(labels=False)
    if head == "ForQuestionAnswering":
        given |= {"start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([2, 3, 4, 5])}
    else:
        given["labels"] = given["input_ids"] % 3 if head == "ForTokenClassification" else given["input_ids"][:, 0] % 3
    moe, report = upcycle(tiny("bert", head), calibration=given, **options)
    assert not report.predicted_exact and moe.config.moe_intermediate_size == 12


def test_fine_tunes_become_experts_of_one_model():
    dense, other = tiny(), tiny(seed=1)
    moe, _ = upcycle(dense, num_experts=2, top_k=1, experts=FromModels([dense, other]), check=False)
    for index, layer in enumerate(moe.bert.encoder.layer):
        for expert, source in enumerate((dense, other)):
            wanted = source.bert.encoder.layer[index].intermediate.dense.weight
            assert torch.equal(layer.mlp.experts.up_proj[expert], wanted)


@pytest.mark.parametrize("router", [KMeans(), Prompts({e: [list(range(5 + e, 12 + e))] for e in range(4)})], ids=repr)
def test_router_starts_that_look_at_data_work(router):
    dense = tiny()
    moe, report = upcycle(dense, num_experts=4, top_k=1, router=router, calibration=batch())
    assert report.predicted_exact
    assert_same(moe, dense)


# -- MoEBERT's split -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("router_type", ["softmax_topk", "comet", "hash"])
def test_the_split_shares_the_most_important_channels_and_deals_the_rest_by_rank(router_type):
    dense, inputs = tiny(), batch()
    split = ImportanceShared(8, width=12)
    moe, _ = upcycle(
        dense, num_experts=4, top_k=1, experts=split, calibration=inputs, check=False, router_type=router_type
    )
    assert moe.config.router_type == router_type and moe.config.upcycling["experts"]["width"] == 12
    stats = collect_statistics(dense, locate_feed_forwards(dense), [inputs], {"taylor"})
    for index, layer in enumerate(moe.bert.encoder.layer):
        first_map, second_map = (
            dense.bert.encoder.layer[index].intermediate.dense,
            dense.bert.encoder.layer[index].output,
        )
        order = stats[index].importance["taylor"].argsort(descending=True)
        bank = layer.mlp.experts
        for expert in range(4):
            channels = [*order[:8].tolist(), *order[8 + expert :: 4].tolist()][:12]
            assert torch.equal(bank.up_proj[expert], first_map.weight[channels])
            assert torch.equal(bank.up_proj_bias[expert], first_map.bias[channels])
            assert torch.equal(bank.down_proj[expert], second_map.dense.weight[:, channels])
            assert torch.equal(bank.down_proj_bias[expert], second_map.dense.bias)
        assert torch.equal(layer.output.LayerNorm.weight, second_map.LayerNorm.weight)


def test_bert_base_is_split_as_in_the_papers():
    split = ImportanceShared(512, width=768)
    assert split.expert_width(3072, 4) == 768 and ImportanceShared(512).expert_width(3072, 4) == 1152
    dealt = split.deal(torch.arange(3072, 0, -1).float(), 4)
    assert [len(part) for part in dealt] == [768] * 4
    assert all(part[:512].tolist() == list(range(512)) for part in dealt)
    assert [part[512:515].tolist() for part in dealt] == [[512 + e, 516 + e, 520 + e] for e in range(4)]
    assert len(torch.cat(dealt).unique()) == 512 + 4 * 256


def test_keeping_all_channels_is_a_copy_and_looks_at_no_data():
    everything = ImportanceShared(1.0)
    assert everything.keeps_all and not everything.needs and everything.expert_width(32, 4) == 32
    dense = tiny()
    ffn = extract_feed_forward(locate_feed_forwards(dense)[0].module)
    assert all(expert is ffn for expert in everything.build(ffn, 4)) and Copy().build(ffn, 4) == [ffn] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImportanceShared(8, width=4), "`width` must be at least 1 and hold the shared channels"),
        (lambda: ImportanceShared(1.5), "`shared` must be a whole number of channels or a share up to 1.0, got 1.5"),
        (lambda: ImportanceShared(8, width=15).expert_width(32, 4), "between the 8 shared channels and 14, what 4"),
        (lambda: ImportanceShared(32).expert_width(32, 4), "`shared=1.0` to give all channels to every expert"),
    ],
    ids=range(4),
)
def test_widths_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
