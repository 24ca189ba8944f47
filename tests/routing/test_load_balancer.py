import copy
import pickle

import pytest
import torch
from common.toy_moe import SimulatedRanks, ToyMoeConfig, random_routing, toy_dataset, toy_model
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe.routing import BalanceLosses, LayerRouting, LoadBalancer, RoutingContext, build_router
from hf_moe.routing import load_balancer as load_balancer_module
from hf_moe.routing.balance import expert_counts, expert_frequency, load_balance_loss
from hf_moe.routing.load_balancer import BALANCE_MODES


STEP_MODES = [mode for mode in BALANCE_MODES if mode != "micro"]


def value(layer: LayerRouting, frequency) -> torch.Tensor:
    return load_balance_loss(layer.distribution(), frequency, weights=layer.balance_weights)


def classic(layers) -> torch.Tensor:
    return torch.stack([value(x, expert_frequency(x.index, x.logits.shape[-1])) for x in layers]).mean()


@pytest.mark.parametrize("mode", BALANCE_MODES)
def test_every_mode_is_the_classic_loss_with_one_micro_batch_on_one_rank(mode, generator):
    balancer = LoadBalancer([4, 4], mode=mode)
    for _ in range(3):  # the later steps have a previous one
        layers = [random_routing(generator, skew=0.4), random_routing(generator)]
        balancer.begin_step()
        losses = balancer(layers)
        torch.testing.assert_close(losses.aux_loss, classic(layers))
        assert losses.scale.item() == 1.0
        balancer.end_step()


@pytest.mark.parametrize("mode", ["running", "rank", "blend"])
def test_frequency_of_the_last_micro_batch_is_that_of_the_whole_step(mode, generator):
    balancer = LoadBalancer([4], mode=mode)
    balancer.begin_step(4)
    batches = [random_routing(generator, num_tokens=n, skew=0.3) for n in (16, 5, 30, 9)]
    for batch in batches:
        losses = balancer([batch])
    whole = torch.cat([batch.index for batch in batches])
    assert torch.equal(balancer.counts[0], expert_counts(whole, 4))
    assert torch.equal(losses.aux_loss, value(batches[-1], expert_frequency(whole, 4)))
    assert balancer.num_tokens.item() == 60 and balancer.micro_batch.item() == 4


def test_running_is_local_at_the_first_micro_batch(generator):
    balancer = LoadBalancer([4], mode="running")
    balancer.begin_step(2)
    first = random_routing(generator)
    torch.testing.assert_close(balancer([first]).aux_loss, classic([first]))


def test_lagged_uses_the_step_before(generator):
    balancer = LoadBalancer([4], mode="lagged")
    balancer.begin_step(2)
    step = [random_routing(generator, skew=0.5) for _ in range(2)]
    for batch in step:
        balancer([batch])
    balancer.end_step()
    balancer.begin_step(2)
    now = random_routing(generator)
    before = expert_frequency(torch.cat([batch.index for batch in step]), 4)
    torch.testing.assert_close(balancer([now]).aux_loss, value(now, before))


def test_blend_fills_the_missing_part_of_the_step_with_the_step_before(generator):
    balancer = LoadBalancer([4], mode="blend")
    balancer.begin_step(4)
    old = [random_routing(generator, skew=0.5) for _ in range(4)]
    for batch in old:
        balancer([batch])
    balancer.end_step()
    balancer.begin_step(4)
    now = random_routing(generator)
    loss = balancer([now]).aux_loss
    mixed = expert_counts(now.index, 4) + 0.75 * expert_counts(torch.cat([b.index for b in old]), 4)
    torch.testing.assert_close(loss, value(now, mixed / mixed.sum()))


@pytest.mark.parametrize(
    ("mode", "collectives"), [("micro", 0), ("rank", 0), ("running", 3), ("lagged", 1), ("blend", 3)]
)
def test_number_of_collectives_per_step(mode, collectives, generator):
    ranks = SimulatedRanks(2, [4], mode=mode)
    for step in range(1, 3):
        ranks.begin_step(3)
        for _ in range(3):
            ranks([[random_routing(generator)], [random_routing(generator)]])
        ranks.end_step()
        assert ranks.num_collectives == step * collectives


@pytest.mark.parametrize("mode", ["running", "lagged", "blend"])
def test_ranks_end_a_step_with_the_counts_of_all_ranks(mode, generator):
    ranks = SimulatedRanks(2, [4], mode=mode)
    ranks.begin_step(2)
    batches = [[[random_routing(generator)], [random_routing(generator)]] for _ in range(2)]
    for batch in batches:
        ranks(batch)
    expected = sum(expert_counts(layers[0].index, 4) for batch in batches for layers in batch)
    for counts in ranks.end_step():
        assert torch.equal(counts[0], expected)
    assert [b.previous_num_tokens.item() for b in ranks.balancers] == [64, 64]


def test_rank_mode_sees_its_own_rank_only(generator):
    ranks = SimulatedRanks(2, [4], mode="rank")
    ranks.begin_step(1)
    left, right = random_routing(generator, skew=1.0), random_routing(generator)
    losses = ranks([[left], [right]])
    torch.testing.assert_close(losses[0].aux_loss, classic([left]))
    torch.testing.assert_close(losses[1].aux_loss, classic([right]))


def gradient_errors(mode, num_steps=6, num_micro_batches=4, world_size=2, num_tokens=64, seed=0):
    """Relative error of the router gradient to that of the exact loss, one domain per micro-batch."""
    generator = torch.Generator().manual_seed(seed)
    centers = 2.0 * torch.randn(num_micro_batches * world_size, 16, generator=generator)
    weight = (0.4 * torch.randn(8, 16, generator=generator)).requires_grad_()
    ranks = SimulatedRanks(world_size, [8], mode=mode)
    errors = []
    for _ in range(num_steps):
        ranks.begin_step(num_micro_batches)
        domains = torch.randperm(len(centers), generator=generator).view(num_micro_batches, world_size)
        total, inputs = 0.0, []
        for micro in domains:
            x = [centers[d] + torch.randn(num_tokens, 16, generator=generator) for d in micro]
            logits = [v @ weight.T for v in x]
            losses = ranks([[LayerRouting(y, y.topk(2).indices)] for y in logits])
            total = total + sum(loss.aux_loss for loss in losses) / (num_micro_batches * world_size)
            inputs += x
        ranks.end_step()
        logits = torch.cat(inputs) @ weight.T
        exact = load_balance_loss(logits.softmax(-1), expert_frequency(logits.topk(2).indices, 8))
        (wanted,), (found,) = (torch.autograd.grad(loss, weight) for loss in (exact, total))
        errors.append(((found - wanted).norm() / wanted.norm()).item())
    return sum(errors[1:]) / (num_steps - 1)  # the first step has no previous one


def test_gradient_error_with_one_domain_per_micro_batch_is_ordered():
    error = {
        mode: sum(gradient_errors(mode, seed=seed) for seed in range(4)) / 4
        for mode in ("micro", "running", "blend", "lagged")
    }
    assert error["micro"] > 1.5 * error["running"]
    assert error["running"] > 1.2 * max(error["blend"], error["lagged"])


def test_layers_are_averaged_not_pooled():
    logits = [torch.tensor([[40.0, 0.0]]).expand(6, 2), torch.tensor([[0.0, 40.0]]).expand(6, 2)]
    layers = [LayerRouting(x, x.topk(1).indices) for x in logits]
    assert LoadBalancer([2, 2])(layers).aux_loss.item() == 2.0
    assert load_balancing_loss_func(tuple(logits), 2, top_k=1).item() == 1.0


def test_layers_may_have_different_numbers_of_experts(generator):
    balancer = LoadBalancer([2, 6], mode="running")
    balancer.begin_step()
    layers = [random_routing(generator, num_experts=2), random_routing(generator, num_experts=6)]
    torch.testing.assert_close(balancer(layers).aux_loss, classic(layers))
    assert balancer.counts.shape == (2, 6) and balancer.counts[0, 2:].sum() == 0


def test_local_fraction_adds_that_part_of_the_micro_batch_loss(generator):
    balancer = LoadBalancer([4], mode="running", local_fraction=0.01)
    balancer.begin_step(2)
    first, second = random_routing(generator, skew=1.0), random_routing(generator)
    balancer([first])
    both = expert_frequency(torch.cat([first.index, second.index]), 4)
    torch.testing.assert_close(balancer([second]).aux_loss, value(second, both) + 0.01 * classic([second]))


def test_balance_weights_and_probabilities_of_the_router_are_used(generator):
    logits = torch.randn(6, 4, generator=generator)
    weights = torch.tensor([1.0, 1.0, 0.5, 0.5])
    layer = LayerRouting(logits, logits.topk(1).indices, lambda x: x.sigmoid() / x.sigmoid().sum(-1, True), weights)
    p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    expected = load_balance_loss(p, expert_frequency(layer.index, 4), weights=weights)
    torch.testing.assert_close(LoadBalancer([4])([layer]).aux_loss, expected)
    as_tensor = LayerRouting(logits, layer.index, p, weights)
    torch.testing.assert_close(LoadBalancer([4])([as_tensor]).aux_loss, expected)


def test_capacity_does_not_hide_imbalance_from_the_loss(generator):
    config = ToyMoeConfig(num_experts=8)
    config.expert_capacity_factor = 1.0
    router = build_router(config, 0).train()
    router.weight.data.normal_(generator=generator)
    router.weight.data[0] += 1.0
    hidden_states = 1 + torch.randn(64, 16, generator=generator)
    out = router(hidden_states, RoutingContext(token_mask=torch.arange(64) < 60))
    assert (out.top_k_index[:60] == 8).any()  # something was dropped
    layer = LayerRouting.from_router(router, out.router_logits, out.top_k_index)
    mask = torch.arange(64) < 60
    asked = expert_counts(out.router_logits.topk(2).indices, 8, mask)
    balancer = LoadBalancer([8], mode="running")
    balancer.begin_step()
    balancer([layer], mask)
    assert torch.equal(balancer.counts[0], asked) and asked.max() > 15  # 15 is the capacity
    kept = LayerRouting.from_router(router.eval(), out.router_logits, out.top_k_index)
    assert kept.index is out.top_k_index


@pytest.mark.parametrize("mode", STEP_MODES)
def test_only_training_with_gradients_touches_the_buffers(mode, generator):
    balancer = LoadBalancer([4], mode=mode)
    balancer.begin_step(2)
    balancer([random_routing(generator, skew=0.5)])
    before = {name: buffer.clone() for name, buffer in balancer.named_buffers()}
    layer = random_routing(generator)
    with torch.no_grad():
        loss_without_grad = balancer([layer]).aux_loss
    evaluation = balancer.eval()([layer]).aux_loss
    for name, buffer in balancer.named_buffers():
        assert torch.equal(buffer, before[name]), name
    torch.testing.assert_close(evaluation, classic([layer]))
    torch.testing.assert_close(loss_without_grad, classic([layer]))


def test_without_announced_steps_the_loss_is_the_classic_one_and_says_so(generator, monkeypatch):
    said = []
    monkeypatch.setattr(load_balancer_module.logger, "warning_once", said.append)
    balancer = LoadBalancer([4], mode="running")
    for _ in range(2):
        layer = random_routing(generator)
        torch.testing.assert_close(balancer([layer]).aux_loss, classic([layer]))
    assert balancer.counts.sum() == 0
    assert "GlobalBalanceCallback" in said[0] and "'running'" in said[0]


def test_an_aborted_step_leaves_nothing(generator):
    balancer = LoadBalancer([4], mode="running")
    balancer.begin_step(3)
    balancer([random_routing(generator)])
    balancer.begin_step(3)
    assert balancer.counts.sum() == 0 and balancer.micro_batch == 0
    assert balancer.previous_counts.sum() == 0


def test_a_step_without_tokens_keeps_the_previous_one(generator):
    balancer = LoadBalancer([4], mode="lagged")
    balancer.begin_step()
    balancer([random_routing(generator)])
    kept = balancer.end_step().clone()
    balancer.begin_step()
    assert torch.equal(balancer.end_step(), kept) and kept.sum() == 32


def test_after_close_nothing_is_counted(generator):
    balancer = LoadBalancer([4], mode="running")
    balancer.begin_step()
    balancer.close()
    balancer([random_routing(generator)])
    assert balancer.counts.sum() == 0


def test_counters_stay_exact_beyond_float32(generator):
    balancer = LoadBalancer([2], mode="running")
    balancer.begin_step()
    balancer.counts[0, 0] = 2**24
    balancer([LayerRouting(torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 1, dtype=torch.int64))])
    assert balancer.counts[0, 0].item() == 2**24 + 1
    assert balancer.to(torch.bfloat16).counts.dtype == torch.int64


def test_the_sum_over_ranks_runs_between_begin_and_finish(generator):
    ranks = SimulatedRanks(2, [4], mode="running")
    ranks.begin_step()
    pending = [b.begin([random_routing(generator)]) for b in ranks.balancers]
    assert ranks.num_collectives == 1  # started
    assert all(b.counts.sum() == 0 for b in ranks.balancers)  # nobody waited yet
    for p in pending:
        p.finish()
    assert [b.counts.sum().item() for b in ranks.balancers] == [64, 64]


def test_buffers_are_not_saved_unless_asked_for():
    assert not LoadBalancer([4], mode="running").state_dict()
    assert "counts" in LoadBalancer([4], mode="running", persistent=True).state_dict()


def test_process_group_and_reduction_under_way_are_not_copied():
    balancer = LoadBalancer([4], mode="lagged")
    handle = balancer.process_group = balancer._reduction = (
        x for x in ()
    )  # like a handle, it can be neither copied nor pickled
    for twin in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert twin.process_group is None and twin._reduction is None and twin.mode == "lagged"
    assert balancer.process_group is handle and balancer._reduction is handle


def test_reset_parameters_clears_uninitialised_memory():
    with torch.device("meta"):
        balancer = LoadBalancer([4])
    balancer = balancer.to_empty(device="cpu")
    balancer.counts.fill_(7)
    balancer.reset_parameters()
    assert all(buffer.sum() == 0 for buffer in balancer.buffers())


def test_z_loss_is_computed_where_asked_for(generator):
    layers = [random_routing(generator), random_routing(generator)]
    assert LoadBalancer([4, 4])(layers).z_loss is None
    expected = torch.stack([x.logits.logsumexp(-1).square().mean() for x in layers]).mean()
    torch.testing.assert_close(LoadBalancer([4, 4], z_loss=True)(layers).z_loss, expected)


def test_total_is_the_scaled_sum():
    losses = BalanceLosses(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(0.5))
    assert losses.total(0.1, 0.01).item() == pytest.approx(0.5 * (0.2 + 0.03))
    assert losses._replace(z_loss=None).total(0.1, 0.01).item() == pytest.approx(0.1)


def test_compiled_with_fullgraph_equals_eager(generator):
    layers = [random_routing(generator), random_routing(generator)]
    mask = torch.arange(16) < 11
    eager, compiled = (LoadBalancer([4, 4], mode="running", z_loss=True) for _ in range(2))
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for balancer, call in ((eager, eager), (compiled, run)):
        balancer.begin_step(2)
        for _ in range(2):
            balancer.losses = call(layers, mask, labels=torch.ones(2, 8), num_items_in_batch=torch.tensor(28))
    for a, b in zip(eager.losses, compiled.losses, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(eager.counts, compiled.counts)


def test_activation_checkpointing_changes_neither_buffers_nor_gradients():
    found = []
    rows = toy_dataset(8, pad=True)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    for checkpointing in (False, True):
        model = toy_model(balance_mode="running").train()
        model.checkpointing = checkpointing
        model.load_balancer.begin_step()
        model(**batch).loss.backward()
        counts = model.load_balancer.counts.clone()
        found.append((counts, [p.grad for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].sum() > 0
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": []}, "`num_experts` must hold the number of experts of each MoE layer"),
        ({"num_experts": [4, 0]}, "`num_experts` must hold"),
        ({"num_experts": [4], "mode": "global"}, "`balance_mode` must be one of .*'lagged'.*, got 'global'"),
        ({"num_experts": [4], "local_fraction": 1.5}, "`balance_local_fraction` must be between 0 and 1, got 1.5"),
        ({"num_experts": [4], "bias_update_speed": -1.0}, "`router_bias_update_speed` must be at least 0, got -1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoadBalancer(**arguments)


def test_wrong_layers_and_accumulation_are_refused(generator):
    balancer = LoadBalancer([4, 4])
    with pytest.raises(ValueError, match=r"`layers` has the numbers of experts \[4\].*built for \[4, 4\]"):
        balancer([random_routing(generator)])
    with pytest.raises(ValueError, match="`num_micro_batches` must be at least 1, got 0"):
        balancer.begin_step(0)
