"""The gate of DeepSpeed-MoE (2201.05596) as options of our routers: RSample, top-2, capacity, first-choice loss."""

import pytest
import torch

from hf_moe.models.llama import MoeLlamaConfig
from hf_moe.routing import LayerRouting, build_router, expert_frequency, load_balance_loss


D = 8
LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0])


def make_router(top_k=1, num_experts=4, factor=None, **options):
    config = MoeLlamaConfig(
        hidden_size=D,
        num_attention_heads=2,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        expert_capacity_factor=factor,
        router_config=options,
    )
    return build_router(config, 0).train()


def with_logits(router, logits):
    """Hidden states that this router gives these logits, `(T, N)`."""
    with torch.no_grad():
        router.weight.copy_(torch.eye(router.num_experts, D))
    return torch.nn.functional.pad(logits, (0, D - logits.shape[-1]))


def shares(index, num_experts=4):
    return torch.bincount(index.flatten(), minlength=num_experts) / len(index)


# -- RSample and top-2 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rsample_draws_the_expert_by_its_probability(temperature):
    router = make_router(noise="gumbel", norm_topk_prob=False, temperature=temperature)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = router(with_logits(router, LOGITS.expand(20_000, 4)))
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(shares(out.top_k_index), expected, atol=0.012, rtol=0)
    # The weight is the probability itself, never the noisy one.
    torch.testing.assert_close(out.top_k_weights[:, 0], expected[out.top_k_index[:, 0]])


def test_the_second_expert_is_drawn_among_the_others():
    router = make_router(2, noise="gumbel_second")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        index = router(with_logits(router, LOGITS.expand(20_000, 4))).top_k_index
    assert (index[:, 0] == 0).all()
    torch.testing.assert_close(shares(index[:, 1])[1:], LOGITS[1:].softmax(-1), atol=0.012, rtol=0)


@pytest.mark.parametrize(("noise", "top_k"), [("gumbel", 1), ("gumbel_second", 2)])
def test_nothing_is_drawn_at_evaluation(noise, top_k):
    router = make_router(top_k, noise=noise).eval()
    hidden_states = with_logits(router, LOGITS.expand(50, 4))
    assert torch.equal(router(hidden_states).top_k_index, router(hidden_states).top_k_index)
    assert (router(hidden_states).top_k_index[:, 0] == 0).all()


def test_a_second_expert_needs_two_slots():
    with pytest.raises(ValueError, match=r"'gumbel_second'` draws the second expert, but `num_experts_per_tok` is 1"):
        make_router(1, noise="gumbel_second")


# -- capacity --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "factor", "expected"), [(64, 1.0, 8), (64, 1.25, 10), (64, 2.0, 16), (16, 1.0, 4), (16, 4.0, 8)]
)
def test_capacity_has_a_floor_of_four(tokens, factor, expected):
    router = make_router(num_experts=8, factor=factor, min_capacity=4)
    index = router(with_logits(router, torch.eye(8)[:1].expand(tokens, 8))).top_k_index
    assert (index == 0).sum() == expected and (index == 8).sum() == tokens - expected


@pytest.mark.parametrize("policy", ["random", "order"])
def test_random_token_selection_does_not_depend_on_the_position(policy):
    router = make_router(factor=0.4 * 4, capacity_policy=policy)  # 2 of 5 tokens stay
    hidden_states = with_logits(router, LOGITS.expand(5, 4))
    trials = 2000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kept = sum((router(hidden_states).top_k_index[:, 0] == 0).float() for _ in range(trials)) / trials
    expected = torch.full((5,), 0.4) if policy == "random" else torch.tensor([1.0, 1.0, 0, 0, 0])
    torch.testing.assert_close(kept, expected, atol=0.035, rtol=0)


def test_a_dropped_token_of_top_1_has_weight_0_and_others_their_probability():
    router = make_router(factor=1.0, norm_topk_prob=False)
    out = router(with_logits(router, LOGITS.expand(8, 4)))
    p = LOGITS.softmax(-1)[0]
    torch.testing.assert_close(out.top_k_weights[:, 0], torch.tensor([p, p, 0, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize("norm_survivors", [False, True])
def test_top_2_renormalises_over_the_survivors(norm_survivors):
    # Expert 0 is everybody's first choice and full after two tokens; second choices differ.
    logits = torch.tensor([[3.0, 2, 0, 0], [3, 0, 2, 0], [3, 0, 0, 2], [3, 2, 0, 0]])
    router = make_router(2, factor=1.0, norm_survivors=norm_survivors)
    out = router(with_logits(router, logits))
    first = (torch.tensor([3.0, 2.0]).softmax(-1)).tolist()
    assert out.top_k_index.tolist() == [[0, 1], [0, 2], [3, 4], [1, 4]]
    alone = 1.0 if norm_survivors else first[1]
    torch.testing.assert_close(out.top_k_weights, torch.tensor([first, first, [alone, 0.0], [alone, 0.0]]))


def test_negative_capacity_is_refused():
    with pytest.raises(ValueError, match=r"`router_config\['min_capacity'\]` must be at least 0, got -1"):
        make_router(min_capacity=-1)


# -- the balance loss ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("noise", [None, "gumbel_second"])
def test_the_loss_counts_first_choices_before_dropping(noise, factor, generator):
    logits = torch.randn(64, 4, generator=generator)
    router = make_router(2, factor=factor, noise=noise, balance_first_choice=True)
    out = router(with_logits(router, logits))
    layer = LayerRouting.from_router(router, out.router_logits, out.top_k_index)
    p, first = logits.softmax(-1), logits.argmax(-1)
    one_hot = torch.nn.functional.one_hot(first, 4).float()
    expected = 4 * (p.mean(0) * one_hot.mean(0)).sum()  # N sum mean(p) mean(onehot), the released code's
    loss = load_balance_loss(layer.distribution(), expert_frequency(layer.index, 4))
    torch.testing.assert_close(loss, expected)


def test_the_loss_is_1_for_uniform_probabilities_and_balanced_load():
    index = torch.arange(16).view(16, 1) % 4
    assert load_balance_loss(torch.full((16, 4), 0.25), expert_frequency(index, 4)) == 1.0
