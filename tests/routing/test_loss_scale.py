import pytest
import torch

from hf_moe.routing import LoadBalancer
from hf_moe.routing.loss_scale import balance_loss_scale


MICRO_BATCHES = [[(6, 2), (10, 9)], [(3, 3), (13, 1)]]  # [rank][micro-batch] -> tokens, labelled tokens


def labels_of(num_labels, num_tokens=16):
    labels = torch.full((1, num_tokens), -100)
    labels[0, :num_labels] = 1
    return labels


def reduced(loss_per_micro_batch, num_items_given, average_tokens):
    """What Trainer and DDP make of the losses of `[rank][micro-batch]`."""
    world_size = len(loss_per_micro_batch)
    total = 0.0
    for rank in loss_per_micro_batch:
        for loss in rank:
            if num_items_given:
                loss = loss * world_size if average_tokens else loss
            else:
                loss = loss / len(rank)
            total = total + loss / world_size
    return total


@pytest.mark.parametrize("average_tokens", [True, False])
@pytest.mark.parametrize("num_items_given", [True, False])
@pytest.mark.parametrize("tokens_known", [True, False])
def test_scales_sum_to_one_over_micro_batches_and_ranks(average_tokens, num_items_given, tokens_known):
    all_labels = sum(n for rank in MICRO_BATCHES for _, n in rank)
    scales = []
    for rank in MICRO_BATCHES:
        num_items = all_labels if average_tokens else sum(n for _, n in rank)
        scales.append(
            [
                balance_loss_scale(
                    torch.tensor(tokens),
                    torch.tensor(32) if tokens_known else None,
                    num_micro_batches=torch.tensor(2),
                    world_size=2,
                    summed_over_ranks=average_tokens,
                    labels=labels_of(n),
                    labels_are_shifted=True,
                    num_items_in_batch=num_items if num_items_given else None,
                )
                for tokens, n in rank
            ]
        )
    assert float(reduced(scales, num_items_given, average_tokens)) == pytest.approx(1.0)
    if tokens_known:  # then every micro-batch weighs what its tokens do
        weights = [[MICRO_BATCHES[r][g][0] * (r == 0 and g == 1) for g in range(2)] for r in range(2)]
        picked = [[scales[r][g] * (weights[r][g] > 0) for g in range(2)] for r in range(2)]
        assert float(reduced(picked, num_items_given, average_tokens)) == pytest.approx(10 / 32)


def test_causal_labels_are_counted_from_the_second_position():
    labels = torch.tensor([[5, 6, -100, 7]])
    kwargs = {"labels": labels, "num_items_in_batch": torch.tensor(4)}
    assert balance_loss_scale(torch.tensor(4), **kwargs).item() == 0.5
    assert balance_loss_scale(torch.tensor(4), labels_are_shifted=True, **kwargs).item() == 0.75


def test_labels_per_sequence_are_all_counted():
    assert balance_loss_scale(torch.tensor(9), labels=torch.tensor([0, 1, 1]), num_items_in_batch=12).item() == 0.25


def test_scale_is_one_without_labels_or_count():
    assert balance_loss_scale(torch.tensor(4)).item() == 1.0
    assert balance_loss_scale(torch.tensor(4), num_items_in_batch=8).item() == 1.0


def test_a_step_without_labels_does_not_divide_by_zero():
    assert balance_loss_scale(torch.tensor(4), labels=labels_of(0), num_items_in_batch=0).item() == 0.0


def test_token_count_of_a_training_step_does_not_reach_evaluation(generator):
    from common.toy_moe import random_routing

    balancer = LoadBalancer([4], mode="running")
    balancer.begin_step(num_micro_batches=2, num_tokens=64)
    routing = random_routing(generator)
    assert balancer([routing], labels=labels_of(4), num_items_in_batch=8).scale.item() == 0.25  # 16 / 64 tokens
    balancer.eval()
    assert balancer([routing], labels=labels_of(5), num_items_in_batch=8).scale.item() == 0.5  # 4 / 8 labels
