"""The contrast of two streams' logits, paper 2405.14507."""

import math

import pytest
import torch

from hf_moe.generation import contrast_logits


STRONG = torch.tensor([[2.0, 1.5, 0.0, -1.0]])
WEAK = torch.tensor([[2.2, 0.4, 0.9, -1.0]])


def test_the_contrast_of_a_worked_example():
    scores = contrast_logits(STRONG, WEAK, beta=0.5, alpha=0.1)
    torch.testing.assert_close(scores, torch.tensor([[1.9, 2.05, -0.45, -math.inf]]))
    assert scores.argmax() == 1 and STRONG.argmax() == 0
    torch.testing.assert_close(scores.softmax(-1), torch.tensor([[0.4430, 0.5147, 0.0423, 0.0]]), atol=5e-5, rtol=0)


def test_a_higher_alpha_leaves_fewer_tokens():
    scores = contrast_logits(STRONG, WEAK, beta=0.5, alpha=0.5)
    torch.testing.assert_close(scores, torch.tensor([[1.9, 2.05, -math.inf, -math.inf]]))


def test_the_cut_is_that_of_a_share_of_the_best_probability(generator):
    strong, weak = torch.randn(2, 6, 50, generator=generator).mul(3)
    probabilities = strong.softmax(-1)
    expected = probabilities >= 0.1 * probabilities.amax(-1, keepdim=True)
    assert torch.equal(contrast_logits(strong, weak).isfinite(), expected)


def test_beta_zero_and_alpha_zero_leave_the_strong_logits(generator):
    strong, weak = torch.randn(2, 3, 20, generator=generator)
    assert torch.equal(contrast_logits(strong, weak, beta=0, alpha=0), strong)


def test_alpha_one_leaves_the_best_token_alone(generator):
    strong, weak = torch.randn(2, 3, 20, generator=generator)
    scores = contrast_logits(strong, weak, beta=5, alpha=1)
    assert torch.equal(scores.isfinite().sum(-1), torch.ones(3, dtype=torch.long))
    assert torch.equal(scores.argmax(-1), strong.argmax(-1))


def test_a_constant_added_to_either_stream_changes_nothing(generator):
    strong, weak = torch.randn(2, 3, 20, generator=generator, dtype=torch.float32)
    expected = contrast_logits(strong, weak).softmax(-1)
    torch.testing.assert_close(contrast_logits(strong + 3, weak).softmax(-1), expected)
    torch.testing.assert_close(contrast_logits(strong, weak - 7).softmax(-1), expected)


def test_half_precision_is_contrasted_in_single_precision():
    # the cut is at 100 + log(0.1) = 97.697, which bfloat16 would round down to the last token's 97.5
    strong = torch.tensor([[100.0, 98.0, 97.5]], dtype=torch.bfloat16)
    scores = contrast_logits(strong, torch.zeros_like(strong))
    assert scores.dtype == torch.float32
    assert scores.isfinite().tolist() == [[True, True, False]]


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_a_token_that_both_streams_rule_out_stays_out(alpha):
    strong, weak = torch.tensor([[1.0, -math.inf]]), torch.tensor([[2.0, -math.inf]])
    assert contrast_logits(strong, weak, alpha=alpha)[0, 1] == -math.inf


def test_streams_of_different_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"`weak_logits` must have the shape of `strong_logits` \(1, 4\), got \(2, 4\)"
    ):
        contrast_logits(STRONG, WEAK.repeat(2, 1))
