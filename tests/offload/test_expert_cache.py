"""Eviction: known sequences, and no policy beats Belady's."""

import itertools
import random

import pytest
import torch

from hf_moe import ReadMeConfig, ReadMeForCausalLM
from hf_moe.offload import ExpertCache, count_hits


REFERENCES = [0, 1, 2, 0, 1, 3, 0, 1, 2, 0, 1, 3]


@pytest.mark.parametrize(("policy", "hits"), [("lru", [0, 0, 6]), ("belady", [0, 3, 6])])
def test_hits_on_the_reference_sequence(policy, hits):
    assert [count_hits(REFERENCES, capacity, policy) for capacity in (1, 2, 3)] == hits


def test_belady_is_at_least_as_good_as_lru():
    generator, better = random.Random(0), 0
    for _ in range(200):
        sequence = [generator.randrange(6) for _ in range(40)]
        for capacity in range(1, 7):
            belady, lru = (count_hits(sequence, capacity, policy) for policy in ("belady", "lru"))
            assert belady >= lru
            better += belady > lru
    assert better > 200


def best_hits(sequence, capacity, resident=frozenset()):
    """The most hits there can be, by trying every eviction."""
    if not sequence:
        return 0
    first, rest = sequence[0], sequence[1:]
    if first in resident:
        return 1 + best_hits(rest, capacity, resident)
    if len(resident) < capacity:
        return best_hits(rest, capacity, resident | {first})
    return max(best_hits(rest, capacity, resident - {victim} | {first}) for victim in resident)


def test_belady_is_optimal_on_short_sequences():
    for sequence in itertools.product(range(3), repeat=6):
        assert count_hits(sequence, 2, "belady") == best_hits(sequence, 2)


def test_without_knowledge_of_the_future_belady_is_lru():
    cache, other = ExpertCache(2, "belady"), ExpertCache(2, "lru")
    for expert in REFERENCES:
        cache.fetch(expert)
        other.fetch(expert)
        assert cache.resident == other.resident
    assert (cache.hits, cache.misses) == (other.hits, other.misses) == (0, 12)


def test_an_expert_is_loaded_once_while_it_stays():
    loaded = []
    cache = ExpertCache(2, load=lambda expert: loaded.append(expert) or f"weights {expert}")
    assert [cache.fetch(expert) for expert in (0, 1, 0, 2, 0, 1)][-1] == "weights 1"
    assert loaded == [0, 1, 2, 1] and cache.resident == (0, 1) and cache.hit_rate == 2 / 6


def test_a_failed_load_changes_nothing():
    def load(expert):
        if expert == 2:
            raise OSError("no such file")
        return expert

    cache = ExpertCache(2, load=load)
    cache.fetch(0)
    cache.fetch(1)
    with pytest.raises(OSError):
        cache.fetch(2)
    assert cache.resident == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "`capacity` must be a whole number of at least 1, got 0"),
        ((1.5,), "`capacity`"),
        ((2, "fifo"), "'fifo'"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExpertCache(*arguments)


@torch.no_grad()
def test_a_router_that_runs_ahead_supplies_what_is_to_come():
    config = ReadMeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_experts=4,
        router_hidden_size=16,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ReadMeForCausalLM(config).eval()
        ids = torch.randint(64, (1, 60))
    experts = model(ids, routing_only=True).router_logits.argmax(-1)[0].tolist()
    assert len(set(experts)) == 4
    assert count_hits(experts, 2, "belady") > count_hits(experts, 2, "lru")
