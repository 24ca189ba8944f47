"""Permutation local search: soft and learned behind any gate, then hard, saved, and never searched again."""

import copy
import itertools
import sys

import pytest
import torch
from common.tiny_training import build, tiny_moe

from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM
from hf_moe.routing import (
    RoutingContext,
    advance_permutation_search,
    build_router,
    find_routers,
    harden_permutations,
    list_routers,
    sinkhorn,
    smooth_step,
)


D, N, T = 16, 4, 12
SEARCH = {"num_steps": 10}
FEW = {"num_steps": 10, "tau_start": 0.02, "tau_end": 0.002, "sweeps_start": 3, "sweeps_end": 6}
#: Gates that are wide open, so that there is something to permute.
WIDE = {
    "comet": {"gamma": 10.0},
    "dselect_k": {"gamma": 10.0},
    "expert_choice": {"fallback": "topk"},  # it refuses to be evaluated without
    "top_p": {"p": 0.9},
}
ROUTERS = [name for name in list_routers() if name not in ("gating_residual", "moepp_release")]


def make_config(router_type="softmax_topk", search=None, fields=None, **options):
    if search is not None:
        options["permutation_search"] = search
    return MoeLlamaConfig(
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        num_experts=N,
        router_type=router_type,
        router_config={**WIDE.get(router_type, {}), **options},
        initializer_range=0.3,
        **(fields or {}),
    )


def make_router(generator, router_type="softmax_topk", search=None, **options):
    router = build_router(make_config(router_type, search, **options), 0)
    with torch.no_grad():
        for name, parameter in router.named_parameters():
            if "permutation" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return router


def twins(generator, router_type, search, **options):
    """A router with a search and the same one without."""
    router = make_router(generator, router_type, search, **options)
    plain = build_router(make_config(router_type, **options), 0)
    plain.load_state_dict({k: v for k, v in router.state_dict().items() if "permutation" not in k})
    return router, plain


def run(router, x):
    ids = torch.arange(len(x)) * 7 % 50
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return router(x, RoutingContext(input_ids=ids))


def dense(out):
    matrix = torch.zeros(out.top_k_index.shape[0], N + 1)
    return matrix.scatter_add(-1, out.top_k_index, out.top_k_weights)[:, :-1]


# -- Sinkhorn --------------------------------------------------------------------------------------------------------
def test_sinkhorn_of_the_sheet():
    a = torch.tensor([[0.03, -0.02, 0.01], [0.0, 0.04, -0.01], [-0.02, 0.01, 0.02]])
    soft = sinkhorn(a / 1e-2, 20)
    torch.testing.assert_close(soft.diagonal(), torch.tensor([0.904, 0.904, 0.885]), atol=1.5e-3, rtol=0)
    torch.testing.assert_close(soft.sum(-2), torch.ones(3))
    torch.testing.assert_close(sinkhorn(a / 1e-3, 20), torch.eye(3), atol=5e-4, rtol=0)
    swap = torch.tensor([[0.01, 0.05, 0.0], [0.04, 0.0, 0.01], [0.0, 0.01, 0.03]])
    expected = torch.eye(3)[[1, 0, 2]]
    torch.testing.assert_close(sinkhorn(swap / 1e-3, 20), expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("tau", [1.0, 1e-3, 1e-7])
def test_exact_ties_stay_one_half(tau):
    assert torch.equal(sinkhorn(torch.zeros(2, 2) / tau, 150), torch.full((2, 2), 0.5))


def test_the_coldest_temperature_is_finite_with_its_gradient(generator):
    a = (0.1 * torch.rand(8, 8, generator=generator) - 0.05).requires_grad_()
    soft = sinkhorn(a / 1e-7, 150)
    assert soft.isfinite().all() and ((soft < 1e-6) | (soft > 1 - 1e-3)).float().mean() > 0.9
    assert torch.autograd.grad((soft * torch.randn(8, 8, generator=generator)).sum(), a)[0].isfinite().all()


# -- in a router -----------------------------------------------------------------------------------------------------
def test_a_router_without_a_search_has_nothing_of_it():
    router = build_router(make_config(), 0)
    assert router.permutation is None and set(router.state_dict()) == {"weight", "temperature"}


@pytest.mark.parametrize("router_type", ROUTERS)
def test_while_it_searches_the_weights_are_those_of_the_gate_times_p(router_type, generator):
    router, plain = twins(generator, router_type, FEW)
    x = torch.randn(T, D, generator=generator)
    advance_permutation_search(router, 0)
    out, before = run(router.train(), x), run(plain.train(), x)
    soft = router.permutation.soft()[0]
    expected = dense(before) @ soft
    expected = expected * dense(before).sum(-1, keepdim=True) / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(dense(out), expected, atol=2e-5, rtol=1e-4)
    active = out.top_k_index < N
    assert out.top_k_index.shape == (T, N) and (active[:, 1:] <= active[:, :-1]).all()
    assert not out.top_k_weights[~active].any()
    log_weights = router.permutation.log_weights
    coefficients = torch.randn(T, N, generator=generator)
    (gradient,) = torch.autograd.grad((dense(out) * coefficients).sum(), log_weights, retain_graph=True)
    assert gradient.isfinite().all() and gradient.any()
    assert torch.autograd.grad(out.penalty.mean(), log_weights)[0].any()


@pytest.mark.parametrize("router_type", ROUTERS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_identity_changes_nothing_and_a_permutation_is_a_new_order_of_experts(router_type, training, generator):
    router, plain = twins(generator, router_type, FEW)
    router.train(training), plain.train(training)
    x = torch.randn(T, D, generator=generator)
    before = run(plain, x)
    torch.testing.assert_close(dense(run(router, x)), dense(before), atol=0, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    router.permutation.order.copy_(order)
    router.permutation.finished.fill_(True)
    out = run(router, x)
    assert out.top_k_index.shape == before.top_k_index.shape
    torch.testing.assert_close(out.router_logits, before.router_logits[:, order], atol=0, rtol=0)
    if router_type == "dense_to_sparse" and training:
        return  # its noise is drawn for experts in their new order
    torch.testing.assert_close(dense(out), dense(before)[:, order])
    probabilities = router.probabilities(out.router_logits)
    torch.testing.assert_close(probabilities, plain.probabilities(before.router_logits)[:, order])


def test_permuted_experts_under_a_permutation_are_the_same_model(generator):
    model = MoeLlamaForCausalLM(make_config("sigmoid_topk", SEARCH)).eval()
    ids = torch.randint(0, 50, (2, 6), generator=generator)
    expected = model(ids).logits
    order = torch.tensor([3, 1, 0, 2])
    with torch.no_grad():
        for _, block in model.moe_blocks():
            block.gate.permutation.order.copy_(order)
            for parameter in block.experts.parameters():
                parameter.copy_(parameter[order])  # expert l listens to output order[l]
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("router_type", ["comet", "dselect_k"])
def test_each_tree_may_have_its_own_permutation(router_type, generator):
    router, _ = twins(generator, router_type, {**FEW, "per_tree": True})
    x = torch.randn(T, D, generator=generator)
    search, router.permutation = router.permutation, None
    nodes = (x @ router.node_weight.T + router.node_bias).view(T, 2, -1)
    scores = (x @ router.score_weight.T + router.score_bias).view(T, 2, -1)
    trees, _ = router.gate(smooth_step(nodes, router.gamma), scores)  # (T, J, N)
    router.permutation = search
    advance_permutation_search(router, 0)
    soft = search.soft()
    assert soft.shape == (2, N, N)
    mixed = torch.stack([trees[:, j] @ soft[j] for j in range(2)], dim=1)
    expected = mixed.sum(1) * trees.sum((1, 2))[:, None] / mixed.sum((1, 2))[:, None]
    torch.testing.assert_close(dense(router.train()(x)), expected, atol=2e-5, rtol=1e-4)
    harden_permutations(router)
    expected = sum(trees[:, j, search.order[j]] for j in range(2))
    torch.testing.assert_close(dense(router.eval()(x)), expected)


def test_the_regulariser_is_the_entropy_of_p_and_of_its_rows(generator):
    router = make_router(generator, search={**FEW, "entropy_coef": 0.5}).train()
    advance_permutation_search(router, 0)
    soft = router.permutation.soft()[0]
    rows = soft / soft.sum(-1, keepdim=True)
    expected = 0.5 * sum(torch.special.entr(p).sum() for p in (soft, rows))
    out = router(torch.randn(T, D, generator=generator))
    torch.testing.assert_close(out.penalty, expected.expand(T), atol=1e-4, rtol=1e-3)
    assert router.permutation.penalty(torch.eye(N)[None]).abs() < 1e-4
    assert not build_router(make_config(search={**FEW, "entropy_coef": 0.0}), 0).has_penalty(
        permutation_search={**FEW, "entropy_coef": 0.0}
    )


def test_compiled_equals_eager_while_it_searches(generator):
    router = make_router(generator, search=FEW).train()
    advance_permutation_search(router, 4)
    x = torch.randn(T, D, generator=generator)
    torch._dynamo.reset()
    expected, actual = router(x), torch.compile(router, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    torch.testing.assert_close(dense(actual), dense(expected))
    gradients = [torch.autograd.grad(dense(o)[:, 0].sum(), list(router.parameters())) for o in (expected, actual)]
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference)


def test_gradients_are_the_same_under_checkpointing(generator):
    model = MoeLlamaForCausalLM(make_config("comet", FEW)).train()
    advance_permutation_search(model, 2)
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


def test_half_precision_parameters_are_searched_in_full_precision(generator):
    router = make_router(generator, search=SEARCH).to(torch.bfloat16).train()
    advance_permutation_search(router, 9)
    out = router(torch.randn(T, D, generator=generator).bfloat16())
    assert router.permutation.soft().dtype == torch.float32
    assert out.top_k_weights.dtype == torch.bfloat16 and out.top_k_weights.isfinite().all()


# -- the schedule ----------------------------------------------------------------------------------------------------
def test_temperature_and_sweeps_follow_the_schedule_and_the_search_ends():
    model = MoeLlamaForCausalLM(make_config(search=SEARCH)).train()
    searches = [router.permutation for router in find_routers(model).values()]
    seen = []
    for step in range(12):
        advance_permutation_search(model, step)
        seen.append((searches[1].tau.item(), searches[1].sweeps.item(), searches[1].searching))
    assert [s for _, _, s in seen] == [True] * 10 + [False] * 2
    assert seen[0][:2] == (pytest.approx(1e-3), 20) and seen[10][:2] == (pytest.approx(1e-7), 150)
    assert seen[5][:2] == (pytest.approx(1e-5), 85)
    for search in searches:
        assert search.finished and search.order.sort().values.tolist() == [[0, 1, 2, 3]]
    before = searches[0].order.clone()
    with torch.no_grad():
        searches[0].log_weights.normal_()
    advance_permutation_search(model, 0)  # a new run
    assert not searches[0].searching and torch.equal(searches[0].order, before)


def test_the_assignment_has_the_largest_sum(generator):
    search = make_router(generator, search={**FEW, "sweeps_end": 1, "sweeps_start": 1, "tau_start": 0.02}).permutation
    with torch.no_grad():
        search.log_weights.copy_(0.02 * torch.randn(1, N, N, generator=generator))
    search.advance(0)
    search.harden()
    soft = search.soft()[0]
    sums = {order: sum(soft[m, e] for e, m in enumerate(order)) for order in itertools.permutations(range(N))}
    assert tuple(search.order[0].tolist()) == max(sums, key=sums.get)


def test_evaluation_in_the_middle_uses_the_hard_permutation(generator):
    router = make_router(generator, search=FEW)
    advance_permutation_search(router, 3)
    harden_permutations(router)
    x = torch.randn(T, D, generator=generator)
    out = router.eval()(x)
    assert out.top_k_index.shape == (T, 2) and out.penalty is None
    reference = copy.deepcopy(router)
    reference.permutation = None
    torch.testing.assert_close(out.router_logits, reference(x).router_logits[:, router.permutation.order[0]])


def test_a_scaled_learning_rate_is_a_slower_a(generator):
    """Adam's steps do not depend on the size of gradients, but on that of the parameter."""
    moved = {}
    for scale in (1.0, 0.1):
        search = make_router(generator, search={**FEW, "learning_rate_scale": scale}).permutation.train()
        with torch.no_grad():
            search.log_weights.copy_(torch.linspace(-0.05, 0.05, N * N).view(1, N, N) / scale)
        optimizer = torch.optim.Adam(search.parameters(), lr=1e-3)
        search.advance(0)
        before = search.soft()
        before[0, 0, 1].backward()
        optimizer.step()
        moved[scale] = (search.soft() - before).abs().max().item()
        start = build_router(make_config(search={**FEW, "learning_rate_scale": scale}), 0).permutation.log_weights
        assert 0.03 < scale * start.abs().max() <= 0.05
    assert moved[0.1] == pytest.approx(0.1 * moved[1.0], rel=0.1) and moved[1.0] > 0


def test_a_good_order_is_found(generator):
    """A gate that is given, experts that are given: only the permutation between them is learned."""
    gate = torch.eye(N)[torch.randint(0, N, (64,), generator=generator)]
    wanted = torch.tensor([1, 3, 0, 2])
    target = gate[:, wanted]
    search = make_router(generator, search={**FEW, "num_steps": 150, "tau_start": 0.05}).permutation.train()
    optimizer = torch.optim.Adam(search.parameters(), lr=3e-3)
    for step in range(150):
        search.advance(step)
        optimizer.zero_grad()
        soft = search.soft()
        loss = (search.permute(gate.unsqueeze(1), soft).squeeze(1) - target).square().mean()
        loss.backward()
        optimizer.step()
    search.advance(150)
    assert search.order.tolist() == [wanted.tolist()]


# -- training, saving, resuming --------------------------------------------------------------------------------------
def searching_model(**options):
    search = {"num_steps": 4, "sweeps_start": 3, "sweeps_end": 5, **options}
    return tiny_moe(router_type="comet", router_config={"gamma": 4.0, "permutation_search": search})


def state_of(trainer):
    state = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    state |= {name: tensor.clone() for name, tensor in trainer.model.named_buffers()}
    optimizer = trainer.optimizer.state_dict()["state"]
    return state | {f"optimizer.{i}.{k}": v for i, entry in optimizer.items() for k, v in entry.items()}


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_search_equals_an_uninterrupted_one_bit_by_bit(stop, tmp_path):
    def train(name, resume=None, max_steps=6):
        trainer = build(
            "trainer",
            tmp_path / name,
            searching_model(),
            data=12,
            max_steps=max_steps,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train("whole")
    resumed = train("whole", resume=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    wanted, found = state_of(whole), state_of(resumed)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    for router in find_routers(resumed.model).values():
        assert router.permutation.finished
    assert "router_penalty" in whole.state.log_history[0]


def test_the_permutation_is_saved_and_not_searched_again(tmp_path, generator):
    trainer = build("trainer", tmp_path, searching_model(), data=8, max_steps=4)
    trainer.train()
    model = trainer.model.eval()
    assert all(router.permutation.finished for router in find_routers(model).values())
    model.save_pretrained(tmp_path / "saved")
    again = MoeLlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    saved = again.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    ids = torch.randint(3, 100, (2, 6), generator=generator)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    orders = [router.permutation.order.clone() for router in find_routers(again).values()]
    second = build("trainer", tmp_path / "second", again, data=4, max_steps=2)  # shorter than the search
    second.train()
    for router, order in zip(find_routers(second.model).values(), orders, strict=True):
        assert torch.equal(router.permutation.order, order)


# -- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, "`num_steps` among them"),
        ({"num_steps": 5, "steps": 3}, "must be a dict of"),
        ({"num_steps": 0}, "`num_steps` must be a whole number of steps"),
        ({"num_steps": float("inf")}, "`num_steps` must be a whole number of steps"),
        ({"num_steps": 5, "tau_end": 0.0}, "`tau_end` must be above 0 and finite, got 0.0"),
        ({"num_steps": 5, "learning_rate_scale": 0.0}, "`learning_rate_scale` must be above 0 and finite, got 0.0"),
        ({"num_steps": 5, "sweeps_start": 0}, "`sweeps_start` must be a whole number of at least 1, got 0"),
        ({"num_steps": 5, "entropy_coef": -1.0}, "`entropy_coef` must be at least 0"),
        ({"num_steps": 5, "per_tree": True}, "has `per_tree=True`, but .*has no trees"),
    ],
)
def test_bad_values_are_refused_when_the_config_is_made(search, message):
    with pytest.raises(ValueError, match=message):
        make_config(search=search)


@pytest.mark.parametrize(
    ("options", "fields", "name"),
    [
        ({"selection_bias": True}, {}, "selection_bias"),
        ({"num_expert_groups": 2}, {}, "num_expert_groups"),
        ({}, {"router_bias_update_speed": 0.1}, "router_bias_update_speed"),
        ({}, {"num_zero_experts": 1}, "zero-computation experts"),
    ],
)
def test_what_belongs_to_experts_cannot_be_combined_with_a_search(options, fields, name):
    with pytest.raises(ValueError, match=f"cannot be combined with .*{name}"):
        make_config(search=SEARCH, fields=fields, **options)


def test_a_search_that_outlasts_the_run_is_refused(tmp_path):
    trainer = build("trainer", tmp_path, searching_model(), data=4, max_steps=3)
    with pytest.raises(ValueError, match=r"takes 4 steps, but the run has 3: it would never end. Give `num_steps`"):
        trainer.train()


def test_a_frozen_router_has_nothing_to_search_with():
    model = searching_model().requires_grad_(False)
    with pytest.raises(ValueError, match=r'has nothing to learn: .*modules_to_save=\["gate"\]'):
        advance_permutation_search(model, 0)


def test_without_scipy_the_search_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"needs scipy to train. Run `pip install scipy`"):
        advance_permutation_search(searching_model(), 0)
