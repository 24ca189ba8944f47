import json
from dataclasses import replace

import pytest
import torch
from common.upcycling_toys import ids, tiny_dense

from hf_moe.upcycling import UpcycleReport, VirtualGroups, upcycle
from hf_moe.upcycling.report import MeasuredGap, count_parameters, measure_gap


@pytest.fixture(scope="module")
def made():
    dense = tiny_dense("llama")
    return dense, *upcycle(dense, num_experts=4, top_k=2, seed=7)


def test_parameters_are_counted_once_and_by_use(made):
    dense, moe, report = made
    expert, router = 3 * 16 * 32, 4 * 16
    assert report.dense_parameters == dense.num_parameters()
    assert report.parameters == moe.num_parameters() == dense.num_parameters() + 2 * (3 * expert + router)
    assert report.active_parameters == report.parameters - 2 * 2 * expert
    assert report.num_bytes == 4 * report.parameters
    assert count_parameters(moe.bfloat16()) == (report.parameters, 2 * report.parameters)
    moe.float()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("groups", [1, 2])
def test_active_parameters_are_those_of_a_model_with_only_the_active_experts(kind, groups):
    """The count for K of N experts is the size of the same model with K experts, plus the router rows it lacks."""
    dense = tiny_dense(kind)
    few, _ = upcycle(dense, num_experts=2, top_k=2, experts=VirtualGroups(groups), check=False)
    _, report = upcycle(dense, num_experts=8, top_k=2, experts=VirtualGroups(groups), check=False)
    assert report.active_parameters == few.num_parameters() + 2 * 6 * 16


def test_the_report_is_json(made):
    _, _, report = made
    again = json.loads(json.dumps(report.to_dict()))
    assert again["measured"]["num_tokens"] == 64 and again["seed"] == 7
    assert again["layers"][1] == {"layer": 1, "module": "model.layers.1.mlp", "expert_width": 32, "scale": 1.0}
    assert UpcycleReport(**{**again, "measured": MeasuredGap(**again["measured"])}) == report


def test_the_text_says_what_matters(made):
    _, _, report = made
    for text in (str(report), report.to_markdown()):
        assert "the same function as the dense model" in text and "measured max" in text
        assert "4, 2 per token" in text and "2 of 2 (all)" in text and "Normal(std=0.02)" in text
    assert report.to_markdown().splitlines()[:2] == ["| | |", "|---|---|"]
    lines = report.to_markdown().splitlines()
    assert all(line.replace(r"\|", "").count("|") == 3 for line in lines)
    assert str(report).splitlines()[0].startswith("Source")


def test_an_inexact_start_is_called_so(made):
    report = replace(made[2], predicted_exact=False, reason="of noise", measured=None)
    assert report.verdict == "not exactly the dense model (of noise); not measured"


def test_the_gap_is_measured_and_padding_left_out():
    dense = tiny_dense("llama")
    moe, _ = upcycle(dense, num_experts=2, top_k=1, check=False)
    inputs, mask = ids(batch=2, length=6), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        moe.lm_head.weight[5] += 0.25
        a = moe(input_ids=inputs, attention_mask=mask).logits
        b = dense(input_ids=inputs, attention_mask=mask).logits
    difference = (a - b).abs()[mask.bool()]
    gap = measure_gap(dense.train(), moe, [{"input_ids": inputs, "attention_mask": mask}], "calibration")
    assert gap.max_difference == pytest.approx(float(difference.max()))
    assert gap.mean_difference == pytest.approx(float(difference.mean()))
    assert (gap.num_tokens, gap.tokens, gap.output, gap.dtype) == (9, "calibration", "logits", "float32")
    assert dense.training and not gap.is_rounding


def test_rounding_is_relative_to_precision_and_size():
    gap = MeasuredGap(5e-4, 0.0, 10.0, 1, "random", "logits", "float32")
    assert gap.is_rounding and not replace(gap, largest=1.0).is_rounding
    assert replace(gap, max_difference=0.04, largest=1.0, dtype="bfloat16").is_rounding
