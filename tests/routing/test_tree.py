"""COMET and DSelect-k: the sheets' numbers, sparsity after saturation, regularisers, saving."""

import pytest
import torch

from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM
from hf_moe.routing import build_router, find_routers, smooth_step
from hf_moe.routing.tree import leaf_order


D = 8


def make_config(router_type="comet", num_experts=4, num_experts_per_tok=1, hidden_size=D, **options):
    return MoeLlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        vocab_size=50,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        router_type=router_type,
        router_config=options,
        router_aux_loss_coef=0.0,
    )


def randomized(generator, *args, **kwargs):
    router = build_router(make_config(*args, **kwargs), 0).train()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router


def as_matrix(out, num_experts):
    matrix = torch.zeros(out.top_k_index.shape[0], num_experts + 1)
    return matrix.scatter_add(-1, out.top_k_index, out.top_k_weights)[:, :-1]


def test_the_smooth_step():
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 3.0])
    expected = torch.tensor([0.5, 0.683594, 0.84375, 0.957031, 1.0, 1.0])
    torch.testing.assert_close(smooth_step(t, 2.0), expected)
    torch.testing.assert_close(smooth_step(-t, 2.0), 1 - expected)
    t = torch.linspace(-2, 2, 41).requires_grad_()
    (slope,) = torch.autograd.grad(smooth_step(t, 2.0).sum(), t)
    assert not slope[t.detach().abs() >= 1].any() and (slope[t.detach().abs() < 0.99] > 0).all()


def test_leaves_from_left_to_right():
    assert leaf_order(1) == [0] and leaf_order(2) == [1, 2]
    assert leaf_order(3) == [3, 4, 2]
    assert leaf_order(5) == [7, 8, 4, 5, 6]
    assert leaf_order(6) == [7, 8, 9, 10, 5, 6]
    assert leaf_order(9) == [15, 16, 8, 9, 10, 11, 12, 13, 14]
    assert leaf_order(8) == list(range(7, 15))


def test_comets_weights_by_hand():
    router = build_router(make_config(entropy_coef=1.0), 0).train()
    with torch.no_grad():
        router.node_weight.zero_()
        router.score_weight.zero_()
        router.node_bias.copy_(torch.tensor([0.25, -0.5, 0.1]))
        router.score_bias.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5]))
    out = router(torch.zeros(1, D))
    v = torch.tensor([0.0, 0.84375, 0.10125, 0.0550])
    torch.testing.assert_close(router.leaves(torch.tensor([[[0.84375, 0.0, 0.648]]]))[0, 0], v)
    expected = torch.tensor([[0, 0.9472, 0.0154, 0.0374]])
    torch.testing.assert_close(as_matrix(out, 4), expected, atol=1e-4, rtol=0)
    assert out.top_k_index.tolist() == [[1, 3, 2, 4]]  # expert 0 is left out
    assert out.penalty.item() == pytest.approx(-(v[1:] * v[1:].log()).sum().item(), abs=1e-4)


@pytest.mark.parametrize("num_experts", [2, 3, 5, 6, 8, 9])
def test_leaves_are_products_along_the_paths(num_experts, generator):
    router = build_router(make_config(num_experts=num_experts, num_experts_per_tok=2), 0)
    steps = torch.rand(4, 2, num_experts - 1, generator=generator)
    leaves = router.leaves(steps)
    torch.testing.assert_close(leaves.sum(-1), torch.ones(4, 2))
    for position, node in enumerate(leaf_order(num_experts)):
        expected = torch.ones(4, 2)
        while node:
            parent = (node - 1) // 2
            left = steps[..., parent]
            expected = expected * (left if node == 2 * parent + 1 else 1 - left)
            node = parent
        torch.testing.assert_close(leaves[..., position], expected)


def test_one_softmax_over_all_leaves_of_all_trees(generator):
    router = randomized(generator, num_experts=5, num_experts_per_tok=3, gamma=20.0)
    x = torch.randn(6, D, generator=generator)
    steps = smooth_step((x @ router.node_weight.T + router.node_bias).view(6, 3, 4), 20.0)
    scores = (x @ router.score_weight.T + router.score_bias).view(6, 3, 5)
    joint = (scores + router.leaves(steps).log()).flatten(1).softmax(-1).view(6, 3, 5)
    out = router(x)
    torch.testing.assert_close(as_matrix(out, 5), joint.sum(1))
    torch.testing.assert_close(router.probabilities(out.router_logits), joint.sum(1))


def test_equal_scores_and_one_tree_leave_the_leaves(generator):
    router = randomized(generator, gamma=10.0)
    router.score_weight.data.zero_()
    router.score_bias.data.fill_(3.0)
    g, leaves = router.compute_gate(torch.randn(7, D, generator=generator))
    torch.testing.assert_close(g, leaves[:, 0])


@pytest.mark.parametrize("router_type", ["comet", "dselect_k"])
def test_a_narrow_step_leaves_at_most_k_experts_and_no_entropy(router_type, generator):
    x = torch.randn(100, D, generator=generator)
    wide = randomized(generator, router_type, 8, 2, gamma=50.0, entropy_coef=1.0)
    assert ((wide(x).top_k_index < 8).sum(-1) == 8).all() and (wide(x).penalty > 0.5).all()
    narrow = randomized(generator, router_type, 8, 2, gamma=1e-6, entropy_coef=1.0)
    out = narrow(x)
    number = (out.top_k_index < 8).sum(-1)
    assert number.max() == 2 and number.min() >= 1
    torch.testing.assert_close(out.top_k_weights.sum(-1), torch.ones(100))
    assert out.penalty.abs().max() < 1e-4


def test_saturated_steps_get_exactly_no_gradient_and_zeros_lose_none(generator):
    router = randomized(generator, num_experts=8, num_experts_per_tok=2, gamma=3.0)
    x = torch.randn(20, D, generator=generator)
    coefficients = torch.randn(20, 8, generator=generator)
    out = router(x)
    assert 0 < (out.top_k_index == 8).sum() < 160
    sparse = torch.autograd.grad((as_matrix(out, 8) * coefficients).sum(), list(router.parameters()))
    g, _ = router.compute_gate(x)
    dense = torch.autograd.grad((g * coefficients).sum(), list(router.parameters()))
    for ours, reference in zip(sparse, dense, strict=True):
        torch.testing.assert_close(ours, reference)
    with torch.no_grad():
        router.node_bias[3] = 100.0
        router.node_weight[3] = 0.0
    out = router(x)
    gradient = torch.autograd.grad((as_matrix(out, 8) * coefficients).sum() + out.penalty.sum(), router.node_weight)[0]
    assert not gradient[3].any() and gradient.any()


def test_extreme_scores_do_not_overflow(generator):
    router = randomized(generator, num_experts=8, num_experts_per_tok=2, gamma=1.0)
    with torch.no_grad():
        router.score_weight.mul_(1000)
    x = torch.randn(50, D, generator=generator, requires_grad=True)
    out = router(x)
    torch.testing.assert_close(out.top_k_weights.sum(-1), torch.ones(50))
    for gradient in torch.autograd.grad(as_matrix(out, 8).square().sum(), [x, *router.parameters()]):
        assert gradient.isfinite().all()


def test_dselects_weights_by_hand():
    router = build_router(make_config("dselect_k", num_experts_per_tok=2), 0).train()
    with torch.no_grad():
        router.node_weight.zero_()
        router.score_weight.zero_()
        router.node_bias.copy_(torch.tensor([0.25, -0.5, 0.5, 0.1]))
        router.score_bias.copy_(torch.tensor([0.3, -0.2]))
    g, selectors = router.compute_gate(torch.zeros(1, D))
    expected = torch.tensor([[0.15625, 0, 0.84375, 0], [0, 0, 0.352, 0.648]])
    torch.testing.assert_close(selectors[0], expected)
    torch.testing.assert_close(g[0], torch.tensor([0.0973, 0, 0.6581, 0.2446]), atol=1e-4, rtol=0)
    assert router(torch.zeros(1, D)).top_k_index.tolist() == [[2, 3, 0, 4]]


def test_codes_without_an_expert_are_missing_and_cost_something(generator):
    router = randomized(generator, "dselect_k", 5, 2, gamma=20.0, entropy_coef=0.0, validity_coef=0.5)
    x = torch.randn(30, D, generator=generator)
    out = router(x)
    _, selectors = router.compute_gate(x)
    assert selectors.shape == (30, 2, 5) and (out.top_k_weights.sum(-1) < 1).all()
    torch.testing.assert_close(out.penalty, 0.5 * (1 / (selectors.sum(-1) + 1e-6)).sum(-1))
    full = randomized(generator, "dselect_k", 8, 2, gamma=20.0, entropy_coef=0.0, validity_coef=0.5)
    assert not full(x).penalty.any()


@pytest.mark.parametrize("router_type", ["comet", "dselect_k"])
def test_the_entropy_makes_the_gate_sparse(router_type, generator):
    router = build_router(make_config(router_type, 8, 2, entropy_coef=1.0), 0).train()
    x = torch.randn(64, D, generator=generator)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    assert (router(x).top_k_index < 8).all()
    for _ in range(100):
        optimizer.zero_grad()
        router(x).penalty.mean().backward()
        optimizer.step()
    assert (router(x).top_k_index < 8).sum(-1).float().mean() < 3


@pytest.mark.parametrize("router_type", ["comet", "dselect_k"])
def test_models_train_under_checkpointing_and_reload(router_type, tmp_path, generator):
    model = MoeLlamaForCausalLM(make_config(router_type, 4, 2, gamma=0.5, entropy_coef=1.0)).train()
    ids = torch.randint(0, 50, (2, 6), generator=generator)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for with_graph, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, with_graph)
    out = model(ids, labels=ids, output_router_logits=True)
    penalties = [router(torch.zeros(1, D)).penalty is not None for router in find_routers(model).values()]
    assert all(penalties) and len(out.router_logits) == 2
    model.eval().save_pretrained(tmp_path)
    again, info = MoeLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # Not bit by bit: loaded tensors may lie at other offsets in memory, and products round by them.
    torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits)


def test_nodes_start_in_the_middle_of_their_step():
    router = build_router(make_config(num_experts=8, gamma=5.0), 0)
    assert router.node_weight.abs().max() <= 0.05 and router.score_weight.abs().max() <= 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, r"\['gamma'\]` must be above 0 and finite, got 0.0"),
        ({"entropy_coef": -1.0}, r"\['entropy_coef'\]` must be at least 0 and finite, got -1.0"),
        ({"schedules": {"entropy_coef": -1.0}}, "the schedule of `entropy_coef` reaches -1.0"),
        ({"num_experts": 1}, "needs at least 2 experts"),
        ({"router_type": "dselect_k", "validity_coef": -1.0}, r"\['validity_coef'\]` must be at least 0"),
        ({"router_type": "dselect_k", "max_experts": 9}, r"\['max_experts'\]` must be between 1"),
    ],
)
def test_bad_values_are_refused_when_the_config_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)
