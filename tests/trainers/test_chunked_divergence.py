"""The divergence in chunks against its definition on whole logits."""

import pytest
import torch
from torch.nn import functional as F

from hf_moe.trainers import chunked_divergence


P = torch.tensor([0.7, 0.2, 0.1])
Z = torch.tensor([1.0, 0.0, 0.0])


def identity(states):
    return states


def test_value_and_gradient_are_those_of_the_closed_form():
    student = Z[None].clone().requires_grad_()
    divergence, _ = chunked_divergence(student, P.log()[None], torch.tensor([-100]), identity, identity)
    entropy, cross = -(P * P.log()).sum(), -(P * F.log_softmax(Z, -1)).sum()
    assert (entropy.item(), cross.item()) == (pytest.approx(0.801819, abs=1e-6), pytest.approx(0.851445, abs=1e-6))
    assert divergence.item() == pytest.approx(0.049626, abs=1e-6)
    divergence.backward()
    torch.testing.assert_close(student.grad[0], torch.softmax(Z, -1) - P)
    assert student.grad[0].tolist() == pytest.approx([-0.1239, 0.0119, 0.1119], abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_change_neither_loss_nor_gradients(chunk_size, temperature):
    generator = torch.Generator().manual_seed(0)
    hidden, guide = torch.randn(7, 5, generator=generator), torch.randn(7, 4, generator=generator)
    weight, guide_weight = torch.randn(11, 5, generator=generator), torch.randn(11, 4, generator=generator)
    targets = torch.tensor([3, -100, 0, 10, 5, -100, 1])
    found = []
    for size in (chunk_size, None):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if size is None:
            logits, log_p = h @ w.T, F.log_softmax(guide @ guide_weight.T / temperature, dim=-1)
            log_q = F.log_softmax(logits / temperature, dim=-1)
            divergence = temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
            cross_entropy = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
        else:
            divergence, cross_entropy = chunked_divergence(
                h, guide, targets, lambda s, w=w: s @ w.T, lambda s: s @ guide_weight.T,
                temperature=temperature, chunk_size=size,
            )  # fmt: skip
        (divergence + 0.3 * cross_entropy).backward()
        found.append((divergence, cross_entropy, h.grad, w.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_same_model_is_no_distance_away():
    states = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    divergence, _ = chunked_divergence(states, states.detach(), torch.zeros(4, dtype=torch.long), identity, identity)
    divergence.backward()
    assert divergence.item() == 0 and states.grad.abs().max() < 1e-6


def test_tokens_the_teacher_excludes_do_not_spoil_the_sum():
    student = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]])
    divergence, _ = chunked_divergence(student, teacher, torch.tensor([0]), identity, identity)
    divergence.backward()
    assert divergence.item() == pytest.approx(torch.log(torch.tensor(1.5)).item())
    assert student.grad.isfinite().all()


def test_nothing_to_distil_is_a_zero_with_a_gradient():
    student = torch.randn(0, 3, requires_grad=True)
    divergence, cross_entropy = chunked_divergence(
        student, student.detach(), torch.zeros(0).long(), identity, identity
    )
    (divergence + cross_entropy).backward()
    assert divergence.item() == cross_entropy.item() == 0
    assert student.grad.shape == (0, 3)
