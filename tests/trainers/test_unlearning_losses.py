import copy
import math
from types import SimpleNamespace

import pytest
import torch
from common.tiny_families import tiny_model
from torch.nn import functional as F

from hf_moe.attribution import dense_weights, pad_token_rows
from hf_moe.trainers.unlearning_anchor import RouterAnchor, anchor_loss, has_constant_weights
from hf_moe.trainers.unlearning_data import PairCollator, PairedRows, TokenRows
from hf_moe.trainers.unlearning_losses import npo, sequence_log_probs, token_cross_entropy
from hf_moe.trainers.unlearning_metrics import balance_metrics
from hf_moe.trainers.unlearning_steering import decoder_layers
from hf_moe.views import Routing, moe_layers


P = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


def rows(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 384, (n,), generator=generator).tolist()} for n in lengths]


@pytest.mark.parametrize(
    ("weights", "target", "expected"),
    [
        ([0.5, 0.3], 0, 0.34),
        ([0.625, 0.375], 0, 0.28125),  # renormalised
        ([0.5, 0.3], 2, 1.34),  # the target was not chosen
        ([1.0, 0.0], 0, 0.0),  # already one-hot
        ([0.5, 0.5], 0, 0.5),  # equal weights: (K - 1) / K
    ],
)
def test_anchor_of_the_paper(weights, target, expected):
    (view,) = moe_layers(tiny_model("mixtral", num_local_experts=4, num_hidden_layers=1))
    gates = dense_weights(view, Routing(P.log(), torch.tensor([weights]), torch.tensor([[0, 1]])))
    assert anchor_loss(gates, [target]).item() == pytest.approx(expected)


def test_anchor_of_several_targets_and_with_padding():
    assert anchor_loss(P, [0, 1]).item() == pytest.approx(0.25 + 0.49 + 0.0225 + 0.0025)
    padded = torch.cat([P, torch.full((1, 4), 9.0)])
    assert anchor_loss(padded, [0], torch.tensor([True, False])).item() == pytest.approx(anchor_loss(P, [0]).item())


def test_a_renormalised_single_weight_has_no_gradient_but_its_probability_has():
    model = tiny_model("mixtral", num_experts_per_tok=1, num_hidden_layers=1)
    batch = pad_token_rows(rows(6, 4))
    (view,) = moe_layers(model)
    gradients = {}
    for on in ("weights", "probs"):
        model.zero_grad()
        anchor = RouterAnchor(model, {view.name: [1]}, on)
        with anchor.reading():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        anchor.loss(batch["attention_mask"]).backward()
        gradients[on] = view.router.weight.grad.abs().max().item()
    assert gradients["weights"] < 1e-6 < 1e-3 < gradients["probs"]


@pytest.mark.parametrize(
    ("family", "constant"), [("mixtral", True), ("gpt_oss", True), ("deepseek_v2", False), ("moe_llama", None)]
)
def test_constant_weights_are_found_by_looking(family, constant):
    batch = pad_token_rows(rows(6, 4))
    model = tiny_model(family)
    assert not has_constant_weights(model, moe_layers(model)[-1], batch)
    if constant is not None:
        model = tiny_model(family, num_experts_per_tok=1)
        assert has_constant_weights(model, moe_layers(model)[-1], batch) is constant


def test_a_router_that_ran_without_graph_or_not_at_all_is_refused():
    model = tiny_model("mixtral").requires_grad_(False)
    anchor = RouterAnchor(model, {"model.layers.1.mlp": [0]}, "weights")
    with pytest.raises(ValueError, match="was not seen to run"):
        anchor.loss(None)
    with anchor.reading():
        model(input_ids=torch.tensor([[3, 4]]), use_cache=False)
    with pytest.raises(ValueError, match="ran without a graph: its anchor would silently be dropped"):
        anchor.loss(None)
    assert not any(module._forward_hooks for module in model.modules())


def test_cross_entropy_is_that_of_transformers():
    model, batch = tiny_model("mixtral"), pad_token_rows(rows(6, 4))
    output = model(**batch, use_cache=False)
    torch.testing.assert_close(token_cross_entropy(output.logits, batch["labels"]), output.loss)
    per_row = sequence_log_probs(output.logits, batch["labels"])
    torch.testing.assert_close(-per_row.sum() / 8, output.loss)


def test_npo_weighs_the_gradient_of_each_sequence():
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reference = logits.detach() + torch.tensor([[[0.0]], [[0.0]]])
    labels = torch.tensor([[1, 2, 3, -100], [4, 5, 6, 1]])

    def step(beta):
        args = SimpleNamespace(npo_beta=beta)
        return SimpleNamespace(
            args=args, forget={"labels": labels}, forget_logits=logits, reference_forget_logits=reference
        )

    assert npo(step(0.1))[0].item() == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)
    gradient = torch.autograd.grad(npo(step(0.1))[0], logits)[0]
    expected = torch.autograd.grad(sequence_log_probs(logits, labels).mean(), logits)[0]
    torch.testing.assert_close(gradient, expected)  # at the reference it is gradient ascent
    reference = F.log_softmax(torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1)), -1)
    ratio = (sequence_log_probs(logits, labels) - sequence_log_probs(reference, labels)).exp()
    torch.testing.assert_close(npo(step(0.5))[0], 2 / 0.5 * (1 + ratio**0.5).log().mean())


def test_pairs_use_every_row_to_retain_before_any_twice():
    data = PairedRows(TokenRows(rows(3, 3)), TokenRows(rows(2, 4, 5, 6, 7)), seed=1)
    seen = []
    for epoch in range(5):
        data.set_epoch(epoch)
        seen += [len(data[i]["retain"]["input_ids"]) for i in range(len(data))]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [2, 4, 5, 6, 7]
    assert "retain" not in PairedRows(TokenRows(rows(3)))[0]


def test_each_side_is_padded_by_itself():
    batch = PairCollator(9)([{"forget": {"input_ids": [3, 4]}, "retain": {"input_ids": [5]}}] * 2)
    assert batch["forget"]["input_ids"].shape == (2, 2) and batch["retain"]["input_ids"].shape == (2, 1)
    first = PairCollator(9)([{"forget": {"input_ids": [3, 4]}}, {"forget": {"input_ids": [5]}}])["forget"]
    assert first["input_ids"].tolist() == [[3, 4], [5, 9]] and first["labels"].tolist() == [[3, 4], [5, -100]]
    with pytest.raises(ValueError, match="A forget batch is nothing but padding"):
        PairCollator()([{"forget": {"input_ids": [3], "attention_mask": [0]}}])


def test_rows_of_tokens_text_and_messages(tiny_tokenizer):
    given = TokenRows([{"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "other": "x"}], max_length=2)
    assert given[0] == {"input_ids": [3, 4], "labels": [-100, 4]}
    text = TokenRows([{"text": "cats and mice"}], tiny_tokenizer, 4)[0]["input_ids"]
    assert text == tiny_tokenizer("cats and mice")["input_ids"][:4]
    message = {"messages": [{"role": "user", "content": "cats"}]}
    ids = TokenRows([message], tiny_tokenizer)[0]["input_ids"]
    assert tiny_tokenizer.decode(ids) == tiny_tokenizer.apply_chat_template(message["messages"], tokenize=False)
    with pytest.raises(ValueError, match="`forget_dataset` is empty"):
        TokenRows([], name="forget_dataset")
    with pytest.raises(ValueError, match="pass a tokenizer as `processing_class`"):
        TokenRows([{"text": "a"}])
    with pytest.raises(TypeError, match="need a column `input_ids`, `text` or `messages`, got \\['a'\\]"):
        TokenRows([{"a": 1}])
    with pytest.raises(TypeError, match="must have a length and rows by number"):
        TokenRows(iter([]))


def test_balance_is_zero_at_the_start_and_one_when_all_is_forgotten_for_nothing():
    assert balance_metrics(2.0, 3.0, 2.0, 3.0, 5.0) == {"forgetting": 0.0, "utility": 1.0, "balance": 0.0}
    assert balance_metrics(9.0, 2.9, 2.0, 3.0, 5.0) == {"forgetting": 1.0, "utility": 1.0, "balance": 1.0}
    half = balance_metrics(3.5, 3.0 + math.log(2), 2.0, 3.0, 5.0)
    assert half == pytest.approx({"forgetting": 0.5, "utility": 0.5, "balance": 0.5})
    assert balance_metrics(9.0, 1e4, 2.0, 3.0, 5.0)["balance"] == 0.0
    assert balance_metrics(3.5, None, 2.0, None, 5.0) == {"forgetting": 0.5}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "moe_gpt2", "moe_plus_plus"])
def test_decoder_layers_are_found(family):
    model = tiny_model(family)
    paths = decoder_layers(model)
    assert len(paths) == 4 and all(moe.name.startswith(tuple(paths)) for moe in moe_layers(model))
    assert decoder_layers(copy.deepcopy(model)) == paths
