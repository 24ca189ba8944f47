"""Metrics against closed forms, through every entrance that `evaluate` has."""

import math
from pathlib import Path

import evaluate
import pytest
import torch

import hf_moe.metrics
from hf_moe.metrics import BalanceViolation, ExpertLoad, Perplexity, RoutingEntropy, token_losses


FOLDER = Path(hf_moe.metrics.__file__).parent
INDEX = [[0, 1], [0, 2], [0, 1], [0, 3]]  # expert 0 in every token: load 4, 2, 1, 1 of 8


# -- perplexity ------------------------------------------------------------------------------------------------------
def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    losses = token_losses(torch.zeros(3, 6, 50), torch.randint(0, 50, (3, 6), generator=torch.Generator()))
    assert Perplexity().compute(**losses)["perplexity"] == pytest.approx(50, rel=1e-6)


def test_perplexity_weighs_tokens_not_rows():
    result = Perplexity().compute(losses=[1.0, 3.0, 77.0], num_tokens=[3, 1, 0])
    assert result == {"perplexity": pytest.approx(math.exp(1.5)), "nll": pytest.approx(1.5), "num_tokens": 4}


def test_perplexity_beyond_floats_is_infinite():
    assert Perplexity().compute(losses=[1000.0], num_tokens=[1])["perplexity"] == math.inf


def test_perplexity_without_any_token_is_refused():
    with pytest.raises(ValueError, match="`num_tokens` must be counts"):
        Perplexity().compute(losses=[1.0], num_tokens=[0])


def test_batches_add_up_to_one_call(generator):
    logits = torch.randn(4, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (4, 7), generator=generator)
    labels[1, 3:] = -100
    whole = Perplexity().compute(**token_losses(logits, labels))
    parts = Perplexity()
    for start in (0, 3):
        parts.add_batch(**token_losses(logits[start : start + 3], labels[start : start + 3]))
    assert parts.compute() == pytest.approx(whole)


def test_token_losses_equal_the_loss_of_the_model(tiny_llama, generator):
    input_ids = torch.randint(3, 384, (2, 9), generator=generator)
    labels = input_ids.clone()
    labels[1, 5:] = -100
    with torch.no_grad():
        outputs = tiny_llama(input_ids=input_ids, labels=labels)
    rows = token_losses(outputs.logits, labels)
    assert rows["num_tokens"].tolist() == [8, 4]
    assert Perplexity().compute(**rows)["nll"] == pytest.approx(outputs.loss.item(), rel=1e-6)


def test_token_losses_of_a_fully_masked_row_are_zero():
    rows = token_losses(torch.randn(1, 4, 5, generator=torch.Generator()), torch.full((1, 4), -100))
    assert rows["losses"].item() == 0 and rows["num_tokens"].item() == 0


def test_token_losses_refuse_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\) and \(2, 4\)"):
        token_losses(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))


# -- load and balance ------------------------------------------------------------------------------------------------
def test_load_counts_assignments():
    result = ExpertLoad(num_experts=5).compute(top_k_index=INDEX)
    assert result["expert_load"] == pytest.approx([0.5, 0.25, 0.125, 0.125, 0])
    assert result["dead_share"] == pytest.approx(0.2)


def test_empty_slots_are_not_load():
    result = ExpertLoad(num_experts=2).compute(top_k_index=[[0, 2], [1, 2], [0, 2], [2, 2]])
    assert result["expert_load"] == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    "top_k_index,expected",
    [([[0, 1], [2, 3]], 0.0), (INDEX, 1.0), ([[0, 1]] * 6, 1.0), ([[0], [0]], 3.0)],
    ids=["even", "half on one", "two of four", "all on one"],
)
def test_violation_is_the_largest_load_over_the_mean_minus_one(top_k_index, expected):
    result = BalanceViolation(num_experts=4).compute(top_k_index=top_k_index)
    assert result["max_violation"] == pytest.approx(expected)


def test_layers_that_collapsed_on_different_experts_do_not_hide_each_other():
    # Pooled over layers both experts would have the same load.
    rows = [[[0], [1]]] * 8
    assert BalanceViolation(num_experts=2).compute(top_k_index=rows) == {
        "max_violation": 1.0,
        "max_violation_worst_layer": 1.0,
    }
    assert ExpertLoad(num_experts=2).compute(top_k_index=rows)["expert_load"] == [[1.0, 0.0], [0.0, 1.0]]


def test_number_of_experts_may_be_given_to_compute():
    assert BalanceViolation().compute(top_k_index=INDEX, num_experts=4)["max_violation"] == pytest.approx(1)


def test_number_of_experts_is_required():
    with pytest.raises(ValueError, match="`num_experts` is missing"):
        ExpertLoad().compute(top_k_index=INDEX)


def test_experts_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`top_k_index` holds 0 to 3, but `num_experts` is 2"):
        ExpertLoad(num_experts=2).compute(top_k_index=INDEX)


# -- entropy ---------------------------------------------------------------------------------------------------------
def test_entropy_of_uniform_and_of_certain_routers():
    uniform = RoutingEntropy().compute(probabilities=torch.full((5, 8), 1 / 8))
    assert uniform["routing_entropy"] == pytest.approx(math.log(8))
    assert uniform["routing_entropy_normalized"] == pytest.approx(1)
    certain = RoutingEntropy().compute(probabilities=torch.eye(8))
    assert certain["routing_entropy"] == 0
    assert certain["marginal_entropy"] == pytest.approx(math.log(8), rel=1e-6)  # as a whole all experts are used


def test_entropy_is_taken_per_layer():
    rows = [[[1.0, 0.0], [0.5, 0.5]]] * 3
    assert RoutingEntropy().compute(probabilities=rows)["routing_entropy"] == pytest.approx(math.log(2) / 2)


def test_logits_instead_of_probabilities_are_refused(generator):
    with pytest.raises(ValueError, match="`probabilities` must be distributions"):
        RoutingEntropy().compute(probabilities=torch.randn(4, 8, generator=generator))


def test_long_streams_are_summed_in_chunks(generator):
    probabilities = torch.randn(9001, 4, generator=generator).softmax(-1)
    expected = torch.special.entr(probabilities.double()).sum(-1).mean().item()
    assert RoutingEntropy().compute(probabilities=probabilities)["routing_entropy"] == pytest.approx(
        expected, rel=1e-6
    )


# -- entrances of evaluate -------------------------------------------------------------------------------------------
def test_metrics_combine():
    routing = evaluate.combine([ExpertLoad(num_experts=4), BalanceViolation(num_experts=4), RoutingEntropy()])
    probabilities = [[0.25] * 4] * 4
    routing.add_batch(top_k_index=INDEX[:1], probabilities=probabilities[:1])
    routing.add_batch(top_k_index=INDEX[1:], probabilities=probabilities[1:])
    result = routing.compute()
    assert result["expert_load"] == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert result["max_violation"] == pytest.approx(1)
    assert result["routing_entropy"] == pytest.approx(math.log(4))


def test_a_combined_evaluation_accepts_all_inputs_at_once():
    both = evaluate.combine([Perplexity(), ExpertLoad(num_experts=4)])
    result = both.compute(losses=[0.0] * 4, num_tokens=[1] * 4, top_k_index=INDEX)
    assert result["perplexity"] == 1 and result["dead_share"] == 0


@pytest.mark.parametrize(
    "file,options,inputs,key,expected",
    [
        ("perplexity", {}, {"losses": [math.log(2)], "num_tokens": [3]}, "perplexity", 2.0),
        ("expert_load", {"num_experts": 4}, {"top_k_index": INDEX}, "dead_share", 0.0),
        ("balance_violation", {"num_experts": 4}, {"top_k_index": INDEX}, "max_violation", 1.0),
        ("routing_entropy", {}, {"probabilities": [[0.5, 0.5]]}, "routing_entropy", math.log(2)),
    ],
)
def test_metrics_load_by_path(file, options, inputs, key, expected):
    metric = evaluate.load(str(FOLDER / f"{file}.py"), **options)
    assert metric.compute(**inputs)[key] == pytest.approx(expected)
