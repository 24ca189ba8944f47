from types import SimpleNamespace

import pytest
import torch

from hf_moe.routing import LayerRouting, LoadBalancer, RoutingContext, build_router
from hf_moe.routing.balance import expert_counts


def make_config(num_experts=2, zero=1, copy=1, constant=0, tau=0.75, capacity=None, hidden=8, **router_config):
    return SimpleNamespace(
        hidden_size=hidden,
        num_experts=num_experts,
        num_zero_experts=zero,
        num_copy_experts=copy,
        num_constant_experts=constant,
        num_routing_targets=num_experts + zero + copy + constant,
        num_experts_per_tok=2,
        moe_layer_indices=[0, 1, 2],
        initializer_range=0.3,
        router_tau=tau,
        expert_capacity_factor=capacity,
        router_type=router_config.pop("router_type", "gating_residual"),
        router_config=router_config,
        balance_mode="micro",
        balance_local_fraction=0.0,
        router_z_loss_coef=0.0,
        router_bias_update_speed=0.0,
    )


def make_router(config, layer_idx=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(layer_idx)
        router = build_router(config, layer_idx)
    if router.residual_weight is not None:
        with torch.no_grad():
            router.residual_weight.normal_(generator=torch.Generator().manual_seed(7))
    return router.eval()


def gives(logits, **options):
    """A router of four experts, the last a zero expert, whose logits are `logits` for the input (1, 0, ..., 0)."""
    router = make_router(make_config(2, zero=1, copy=0, constant=1, **options))
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor(logits)
    token = torch.zeros(1, 8)
    token[0, 0] = 1.0
    return router, token


# -- Eq. 6: the residual ---------------------------------------------------------------------------------------------
def test_logits_are_w_x_plus_the_mapped_previous_logits(generator):
    router = make_router(make_config(), layer_idx=1)
    hidden_states = torch.randn(5, 8, generator=generator)
    previous = torch.randn(5, 4, generator=generator)
    out = router(hidden_states, RoutingContext(prev_state=previous))
    expected = hidden_states @ router.weight.T + previous @ router.residual_weight.T
    torch.testing.assert_close(out.router_logits, expected)


def test_the_state_is_the_complete_score_after_the_addition_and_before_softmax(generator):
    router = make_router(make_config(), layer_idx=1)
    out = router(torch.randn(5, 8, generator=generator), RoutingContext(prev_state=torch.ones(5, 4)))
    assert torch.equal(out.state, out.router_logits)
    assert out.state.requires_grad  # later layers train this router too


def test_two_layers_unroll_to_the_closed_form(generator):
    config = make_config()
    first, second = make_router(config, 0), make_router(config, 1)
    x1, x2 = torch.randn(2, 5, 8, generator=generator)
    state = first(x1, RoutingContext()).state
    logits = second(x2, RoutingContext(prev_state=state)).router_logits
    torch.testing.assert_close(logits, x2 @ second.weight.T + x1 @ first.weight.T @ second.residual_weight.T)


def test_zero_residual_weight_equals_no_residual(generator):
    hidden_states = torch.randn(5, 8, generator=generator)
    context = RoutingContext(prev_state=torch.randn(5, 4, generator=generator))
    router, plain = make_router(make_config(), 1), make_router(make_config(residual=False), 1)
    plain.weight = router.weight
    assert not torch.equal(router(hidden_states, context).router_logits, plain(hidden_states, context).router_logits)
    torch.nn.init.zeros_(router.residual_weight)
    for ours, theirs in zip(router(hidden_states, context), plain(hidden_states, context), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_the_residual_weight_starts_at_zero():
    assert build_router(make_config(), 1).residual_weight.eq(0).all()


def test_the_first_moe_layer_ignores_the_state(generator):
    config = make_config()
    config.moe_layer_indices = [1, 3]
    hidden_states = torch.randn(5, 8, generator=generator)
    state = RoutingContext(prev_state=torch.randn(5, 4, generator=generator))
    first, second = make_router(config, 1), make_router(config, 3)
    assert first.residual_weight is None
    assert torch.equal(first(hidden_states, state).router_logits, first(hidden_states).router_logits)
    assert not torch.equal(second(hidden_states, state).router_logits, second(hidden_states).router_logits)


def test_a_half_precision_state_is_added_in_full_precision(generator):
    router = make_router(make_config(), 1)
    hidden_states = torch.randn(5, 8, generator=generator)
    state = torch.randn(5, 4, generator=generator).bfloat16()
    logits = router(hidden_states, RoutingContext(prev_state=state)).router_logits
    torch.testing.assert_close(logits, router(hidden_states, RoutingContext(prev_state=state.float())).router_logits)


def test_two_layer_gate_is_w2_tanh_w1_x(generator):
    router = make_router(make_config(num_layers_gate=2))
    assert router.hidden_weight.shape == (8 * 4, 8)
    hidden_states = torch.randn(5, 8, generator=generator)
    expected = torch.tanh(hidden_states @ router.hidden_weight.T) @ router.weight.T
    torch.testing.assert_close(router(hidden_states).router_logits, expected)


def test_the_bias_moves_the_choice_away_from_an_expert(generator):
    router = make_router(make_config(bias=True))
    hidden_states = torch.randn(50, 8, generator=generator)
    assert (router(hidden_states).top_k_index >= 2).any()
    with torch.no_grad():
        router.bias[2:] = -100.0
    assert (router(hidden_states).top_k_index < 2).all()


# -- Eq. 1 against the released code ---------------------------------------------------------------------------------
def test_paper_weights_are_not_renormalised():
    # Oracle: logits [2, 1, 0, 1.5], the last a zero expert: p = [.4740, .1744, .0641, .2875].
    router, token = gives([2.0, 1.0, 0.0, 1.5])
    out = router(token)
    probabilities = router.probabilities(out.router_logits)
    torch.testing.assert_close(probabilities, torch.tensor([[0.4740, 0.1744, 0.0641, 0.2875]]), atol=5e-5, rtol=0)
    assert out.top_k_index.tolist() == [[0, 3]]
    torch.testing.assert_close(out.top_k_weights, torch.tensor([[0.4740, 0.2875]]), atol=5e-5, rtol=0)


def test_release_gives_the_zero_experts_share_to_the_other_expert():
    router, token = gives([2.0, 1.0, 0.0, 1.5], router_type="moepp_release")
    out = router(token)
    assert out.top_k_index.tolist() == [[0, 3]]  # the zero expert was chosen: losses and reports see it
    assert out.top_k_weights.tolist() == [[1.0, 0.0]]


def test_release_moves_a_heavier_zero_expert_behind_the_other_expert():
    router, token = gives([1.5, 1.0, 0.0, 2.0], router_type="moepp_release")
    out = router(token)
    assert out.top_k_index.tolist() == [[0, 3]]
    assert out.top_k_weights.tolist() == [[1.0, 0.0]]


def test_release_renormalises_two_other_experts():
    router, token = gives([2.0, 1.0, 0.0, -1.0], router_type="moepp_release")
    expected = torch.tensor([[2.0, 1.0]]).softmax(-1)  # p_a / (p_a + p_b)
    torch.testing.assert_close(router(token).top_k_weights, expected)


def test_mixtral_gating_has_no_special_case_for_the_zero_expert():
    router, token = gives([2.0, 1.0, 0.0, 1.5], router_type="moepp_release", mixtral_gating=True)
    out = router(token)
    assert out.top_k_index.tolist() == [[0, 3]]
    torch.testing.assert_close(out.top_k_weights, torch.tensor([[2.0, 1.5]]).softmax(-1))


@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
def test_logit_normalisation_sets_the_spread_of_the_softmax_but_not_of_the_state(std):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.5])
    router, token = gives(logits.tolist(), router_type="moepp_release", logit_norm_std=std)
    out = router(token)
    torch.testing.assert_close(out.state, logits[None])
    expected = (logits / (logits.std() / std)).softmax(-1)[None]
    torch.testing.assert_close(router.probabilities(out.router_logits), expected)
    torch.testing.assert_close(out.top_k_weights, expected[:, :2] / expected[:, :2].sum())


def test_logit_normalisation_of_equal_logits_has_a_finite_gradient():
    router, token = gives([0.0, 0.0, 0.0, 0.0], router_type="moepp_release", logit_norm_std=1.0)
    router(token).top_k_weights[:, 0].sum().backward()
    assert router.weight.grad.isfinite().all()


# -- Eq. 7: the heterogeneous balance loss ---------------------------------------------------------------------------
def balance_loss(router, logits, index):
    """L_b in the paper's convention: sum f = K and no factor N. The load balancer has sum f = 1 and a factor N."""
    value = LoadBalancer([logits.shape[-1]])([LayerRouting.from_router(router, logits, index)]).aux_loss
    return value * index.shape[-1] / logits.shape[-1]


def test_balance_loss_of_the_balanced_case():
    # Oracle: 2 feed-forward and 2 zero-computation experts, tau .75, all f = .5 and P = .25 give 0.4375.
    router = make_router(make_config())
    assert router.balance_weights.tolist() == [1.0, 1.0, 0.75, 0.75]
    index = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]])
    torch.testing.assert_close(balance_loss(router, torch.zeros(4, 4), index), torch.tensor(0.4375))


def test_balance_loss_follows_the_equation(generator):
    router = make_router(make_config(num_experts=3, constant=2, tau=0.25))
    out = router(torch.randn(40, 8, generator=generator))
    loss = 0.0
    for i in range(7):
        f = (out.top_k_index == i).any(-1).float().mean()  # share of tokens that select i
        p = out.router_logits.softmax(-1)[:, i].mean()
        loss = loss + (1.0 if i < 3 else 0.25) * f * p
    torch.testing.assert_close(balance_loss(router, out.router_logits, out.top_k_index), loss)


def test_without_zero_computation_experts_the_loss_is_mixtrals(generator):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    router = make_router(make_config(num_experts=4, zero=0, copy=0))
    out = router(torch.randn(40, 8, generator=generator))
    ours = 4 * balance_loss(router, out.router_logits, out.top_k_index)
    torch.testing.assert_close(ours, load_balancing_loss_func((out.router_logits,), num_experts=4, top_k=2))


@pytest.mark.parametrize("tau", [0.25, 0.75, 1.0])
def test_the_balance_loss_leads_to_the_compute_ratio_of_tau(tau):
    # Descending on L_b alone makes eta_i f_i equal, that is tau N_ffn / (tau N_ffn + N_zc) of the slots are
    # feed-forward: 0.5 at tau .25, .75 at tau .75, .8 at tau 1 for 16 + 4 experts.
    config = make_config(num_experts=16, constant=2, tau=tau, hidden=16)
    router = make_router(config).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    counts = torch.zeros(20)
    for step in range(500):
        out = router(torch.randn(512, 16, generator=generator) + 1.0)
        if step >= 400:
            counts += expert_counts(out.top_k_index, 20)
        optimizer.zero_grad()
        balance_loss(router, out.router_logits, out.top_k_index).backward()
        optimizer.step()
    expected = tau * 16 / (tau * 16 + 4)
    assert abs(counts[:16].sum() / counts.sum() - expected) < 0.02


# -- Eq. 8: the heterogeneous capacity -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tau", "ffn", "zero_computation"), [(0.75, 51.5625, 68.75), (0.1, 19.6429, 196.4286), (1.0, 55.0, 55.0)]
)
def test_capacities(tau, ffn, zero_computation):
    router = make_router(make_config(num_experts=16, constant=2, tau=tau, capacity=1.1))
    capacity = router.capacity(1000)
    expected = torch.tensor([ffn] * 16 + [zero_computation] * 4)
    torch.testing.assert_close(capacity, expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(capacity.sum(), torch.tensor(1100.0))


def test_capacity_counts_assignments_not_tokens(generator):
    # Eq. 8 with T = tokens would drop 45 % of a perfectly even choice at K = 2.
    router = make_router(make_config(num_experts=2, tau=1.0, capacity=1.1)).train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4, 8))
    rows = torch.tensor([[2.0, 1, 0, 0], [0, 2, 1, 0], [0, 0, 2, 1], [1, 0, 0, 2]]).repeat(10, 1)
    out = router(torch.nn.functional.pad(rows, (0, 4)))
    assert (out.top_k_index < 4).all()


def test_capacity_applies_in_training_only():
    router = make_router(make_config(num_experts=2, capacity=0.5)).train()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 0] = 5.0
    tokens = torch.zeros(20, 8)
    tokens[:, 0] = 1.0  # everybody wants expert 0, which takes .5 * .75 * 40 / (.75 * 2 + 2) = 4.29 of 40: ranks 0-4
    out = router(tokens)
    assert (out.top_k_index == 0).sum() == 5
    assert (out.top_k_weights[out.top_k_index == 4] == 0).all()
    assert (router.eval()(tokens).top_k_index == 0).sum() == 20


# -- options ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("router_type", "option", "message"),
    [
        ("gating_residual", {"num_layers_gate": 3}, "must be 1 or 2, got 3"),
        ("moepp_release", {"logit_norm_std": 0.0}, "must be above 0 or None, got 0.0"),
    ],
)
def test_bad_options_are_refused(router_type, option, message):
    from hf_moe.routing.registry import validate_router

    with pytest.raises(ValueError, match=message):
        validate_router(make_config(router_type=router_type, **option))
