"""Metric values become evaluation results that the Hub's card classes accept."""

import math

import pytest
from common.card_rules import card_errors
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_moe.metrics import evaluation_results


def test_results_render_into_a_valid_card():
    results = evaluation_results({"eval_perplexity": 12.5, "eval_nll": math.log(12.5)}, "WikiText-2 (test)")
    data = ModelCardData(model_name="tiny", license="apache-2.0", eval_results=[EvalResult(**r) for r in results])
    content = str(ModelCard(f"---\n{data.to_yaml()}\n---\n# tiny\n"))
    assert card_errors(content) == []
    assert [(r["metric_type"], r["metric_value"]) for r in results] == [("perplexity", 12.5), ("nll", 2.525729)]
    assert results[0]["dataset_type"] == "wikitext-2-test"


def test_only_finite_numbers_that_measure_the_model_are_kept():
    metrics = {
        "eval_loss": 2.0,
        "eval_runtime": 3.0,
        "eval_samples_per_second": 9.0,
        "epoch": 1.0,
        "expert_load": [0.5, 0.5],
        "perplexity": math.inf,
        "flag": True,
    }
    assert [r["metric_type"] for r in evaluation_results(metrics, "data")] == ["loss"]


def test_dataset_must_be_named():
    with pytest.raises(ValueError, match="`dataset_name` must name"):
        evaluation_results({"perplexity": 2.0}, "")
