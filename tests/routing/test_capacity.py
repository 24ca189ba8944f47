import pytest
import torch

from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM
from hf_moe.routing import RoutingContext, apply_capacity, build_router, pack_slots


N = 2
EXPERTS = torch.tensor([0, 0, 0, 1, 0])
SCORES = torch.tensor([0.9, 0.5, 0.8, 0.7, 0.6])


@pytest.mark.parametrize(("policy", "kept"), [("score", [0, N, 0, 1, N]), ("order", [0, 0, N, 1, N])])
def test_the_two_policies_of_the_oracle(policy, kept):
    index, weights = apply_capacity(EXPERTS[:, None], SCORES[:, None], torch.full((N,), 2.0), policy)
    kept = torch.tensor(kept)
    assert torch.equal(index[:, 0], kept)
    assert torch.equal(weights[:, 0], SCORES.masked_fill(kept == N, 0.0))


def test_random_policy_keeps_a_subset_of_the_right_size():
    seen = set()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(50):
            index, _ = apply_capacity(EXPERTS[:, None], SCORES[:, None], torch.full((N,), 2.0), "random")
            assert (index == 0).sum() == 2 and index[3] == 1
            seen.add(tuple(index[:, 0].tolist()))
    assert len(seen) == 6  # every pair of the four candidates


def test_first_choices_come_before_second_choices():
    index = torch.tensor([[1, 0], [2, 0], [0, 1]])
    weights = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.6, 0.4]])
    kept, _ = apply_capacity(index, weights, torch.ones(3), "order")
    # Expert 0 goes to token 2, whose first choice it is, not to token 0; expert 1 likewise to token 0.
    assert kept.tolist() == [[1, 3], [2, 3], [0, 3]]


def brute_force(index, weights, capacity, policy):
    """Assignment by assignment, in the order of the policy."""
    tokens, slots = index.shape
    order = [(t, k) for k in range(slots) for t in range(tokens)]
    if policy == "score":
        order.sort(key=lambda tk: -weights[tk].item())
    taken = [0] * len(capacity)
    dense = torch.zeros(tokens, len(capacity))
    for t, k in order:
        e = int(index[t, k])
        if e < len(capacity) and taken[e] < capacity[e]:
            taken[e] += 1
            dense[t, e] = weights[t, k]
    return dense


@pytest.mark.parametrize("policy", ["order", "score"])
@pytest.mark.parametrize("already_empty", [False, True])
def test_equals_a_loop_over_assignments(policy, already_empty, generator):
    experts, tokens, slots = 5, 40, 3
    for _ in range(5):
        weights, index = torch.rand(tokens, experts, generator=generator).topk(slots)
        if already_empty:
            empty = torch.rand(tokens, generator=generator) < 0.3
            index, weights = index.masked_fill(empty[:, None], experts), weights.masked_fill(empty[:, None], 0.0)
        capacity = 40 * torch.rand(experts, generator=generator)  # not rounded: rank r stays if r < C
        new_index, new_weights = apply_capacity(index, weights, capacity, policy)
        dense = torch.zeros(tokens, experts + 1).scatter_add(-1, new_index, new_weights)[:, :-1]
        assert torch.equal(dense, brute_force(index, weights, capacity.tolist(), policy))
        active = new_index < experts
        assert (active[:, 1:] <= active[:, :-1]).all() and (new_weights[:, 1:] <= new_weights[:, :-1]).all()


def test_infinite_capacity_changes_nothing_and_none_empties_everything(generator):
    weights, index = torch.rand(10, 4, generator=generator).topk(2)
    for policy in ("order", "score", "random"):
        same_index, same_weights = apply_capacity(index, weights, torch.full((4,), torch.inf), policy)
        assert torch.equal(same_index, index) and torch.equal(same_weights, weights)
        none_index, none_weights = apply_capacity(index, weights, torch.zeros(4), policy)
        assert (none_index == 4).all() and (none_weights == 0).all()


def test_inputs_are_not_changed_in_place(generator):
    weights, index = torch.rand(10, 4, generator=generator).topk(2)
    before = index.clone(), weights.clone()
    apply_capacity(index, weights, torch.ones(4))
    assert torch.equal(index, before[0]) and torch.equal(weights, before[1])


def test_dropped_weights_have_no_gradient(generator):
    weights = SCORES[:, None].clone().requires_grad_()
    _, kept = apply_capacity(EXPERTS[:, None], weights, torch.full((N,), 2.0))
    kept.sum().backward()
    assert weights.grad[:, 0].tolist() == [1, 1, 0, 1, 0]


def test_no_tokens_are_no_problem():
    index, weights = apply_capacity(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), torch.ones(3))
    assert index.shape == weights.shape == (0, 2)


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match=r"`policy` must be one of .*'order', 'score', 'random'.* got 'best'"):
        apply_capacity(EXPERTS[:, None], SCORES[:, None], torch.ones(N), "best")


def test_packing_moves_active_slots_first_and_sorts_them():
    index = torch.tensor([[0, 1, 2], [2, 1, 0]])
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3]])
    keep = torch.tensor([[True, False, True], [False, False, False]])
    new_index, new_weights = pack_slots(index, weights, keep, num_experts=3)
    assert new_index.tolist() == [[2, 0, 3], [3, 3, 3]]
    torch.testing.assert_close(new_weights, torch.tensor([[0.5, 0.2, 0.0], [0.0, 0.0, 0.0]]))


# -- in a router -----------------------------------------------------------------------------------------------------
def make_router(factor, **fields):
    config = MoeLlamaConfig(
        hidden_size=8, num_attention_heads=2, num_experts=4, expert_capacity_factor=factor, **fields
    )
    return build_router(config, 0)


def test_capacity_is_a_share_of_all_assignments():
    assert make_router(1.25).capacity(2 * 100).tolist() == [62.5] * 4


def test_nothing_is_dropped_at_evaluation(generator):
    router = make_router(0.25)
    hidden_states = torch.randn(32, 8, generator=generator)
    assert (router.eval()(hidden_states).top_k_index < 4).all()
    out = router.train()(hidden_states)
    counts = torch.bincount(out.top_k_index.flatten(), minlength=5)[:4]
    assert counts.max() == 4  # 0.25 * 2 * 32 / 4


def test_padding_takes_no_capacity(generator):
    router = make_router(0.5).train()
    hidden_states = torch.randn(32, 8, generator=generator)
    mask = torch.arange(32) >= 16
    out = router(hidden_states, RoutingContext(token_mask=mask))
    alone = router(hidden_states[16:])
    assert torch.equal(out.top_k_index[16:], alone.top_k_index)
    assert torch.equal(out.top_k_weights[16:], alone.top_k_weights)


def test_random_selection_keeps_every_candidate_with_probability_c_over_m():
    """Five candidates, two places: 0.4 whatever the position; by order it would always be the first two."""
    kept = torch.zeros(5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(4000):
            tokens = torch.zeros(5, 1, dtype=torch.int64)
            kept += (apply_capacity(tokens, torch.ones(5, 1), torch.full((1,), 2.0), "random")[0] == 0).squeeze()
    torch.testing.assert_close(kept / 4000, torch.full((5,), 0.4), atol=0.025, rtol=0)


@pytest.mark.parametrize("policy", ["order", "score", "random"])
def test_room_for_everybody_is_bit_for_bit_no_capacity(policy, generator):
    hidden_states = torch.randn(32, 8, generator=generator)
    bounded = make_router(1.0, router_config={"capacity_policy": policy, "min_capacity": 64}).train()
    free = make_router(None).train()
    free.load_state_dict(bounded.state_dict())
    out, expected = bounded(hidden_states), free(hidden_states)
    assert torch.equal(out.top_k_index, expected.top_k_index)
    assert torch.equal(out.top_k_weights, expected.top_k_weights)


def test_the_same_generator_state_keeps_the_same_tokens_also_under_checkpointing(generator):
    config = MoeLlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, num_experts=4,
        expert_capacity_factor=0.5, router_config={"capacity_policy": "random"}, initializer_range=0.3,
    )  # fmt: skip
    model = MoeLlamaForCausalLM(config).train()
    ids = torch.randint(0, 50, (2, 16), generator=generator)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            out = model(ids, labels=ids, output_router_logits=True)
            out.loss.backward()
        found.append(([*out.router_indices], [p.grad.clone() for p in model.parameters()]))
    for first, second in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(first, second) and (first == 4).any()
    for with_graph, recomputed in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(recomputed, with_graph)


def test_capacity_at_evaluation_is_an_option(generator):
    hidden_states = torch.randn(32, 8, generator=generator)
    router = make_router(0.25, router_config={"eval_capacity_factor": 0.5})
    for training, most in ((True, 4), (False, 8)):  # factor * 2 * 32 / 4
        counts = router.train(training)(hidden_states).top_k_index.flatten().bincount(minlength=5)[:4]
        assert counts.max() == most
    for factor, fields in ((0.0, 1.0), (1.0, None)):
        with pytest.raises(ValueError, match=r"\['eval_capacity_factor'\]` must be above 0 and needs"):
            make_router(fields, router_config={"eval_capacity_factor": factor})
