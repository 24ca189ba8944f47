"""Batches of requests that need few different experts."""

import random

import pytest

from hf_moe.offload import form_batch, queues_by_expert


QUEUES = {0: ["a", "b", "c"], 1: ["d", "e"], 2: ["f"]}


def test_the_longest_queues_fill_the_batch():
    batch, left = form_batch(QUEUES, 4)
    assert batch == ["a", "b", "c", "d"] and left == {1: ["e"], 2: ["f"]}
    assert QUEUES == {0: ["a", "b", "c"], 1: ["d", "e"], 2: ["f"]}  # unchanged


def test_it_ends_when_queues_run_dry():
    assert form_batch({}, 4) == ([], {}) and form_batch({0: [], 1: []}, 4) == ([], {})
    batch, left = form_batch(QUEUES, 100)
    assert batch == ["a", "b", "c", "d", "e", "f"] and left == {}


def test_every_request_is_served_once_and_in_order_within_its_queue():
    generator = random.Random(0)
    requests = [(number, generator.randrange(5)) for number in range(100)]
    queues, served = queues_by_expert(requests), []
    while queues:
        batch, queues = form_batch(queues, 7)
        assert 0 < len(batch) <= 7
        served += batch
    assert sorted(served) == list(range(100))
    expert_of = dict(requests)
    for expert in range(5):
        own = [number for number in served if expert_of[number] == expert]
        assert own == sorted(own)


def test_fewer_experts_are_needed_than_in_order_of_arrival():
    generator = random.Random(1)
    requests = [(number, generator.randrange(8)) for number in range(64)]
    expert_of = dict(requests)
    batch, _ = form_batch(queues_by_expert(requests), 16)
    distinct, in_order = len({expert_of[n] for n in batch}), len({expert for _, expert in requests[:16]})
    assert distinct < in_order


def test_a_batch_has_room_for_one_at_least():
    with pytest.raises(ValueError, match="`max_size` must be at least 1, got 0"):
        form_batch(QUEUES, 0)
