"""The dense-to-sparse gate of EvoMoE: who is active at which temperature, weights, phases, evaluation."""

import pytest
import torch

from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM
from hf_moe.routing import (
    RoutingContext,
    apply_schedules,
    build_router,
    expert_frequency,
    find_routers,
    load_balance_loss,
    parse_schedules,
)


def make_config(num_experts=4, hidden_size=4, num_experts_per_tok=1, **options):
    return MoeLlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        vocab_size=50,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        router_type="dense_to_sparse",
        router_config=options,
    )


def make_router(num_experts=4, **options):
    """A router whose logits are its input."""
    router = build_router(make_config(num_experts, max(num_experts, 2), **options), 0).train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts, router.hidden_size))
    return router


def run(router, hidden_states, context=None, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return router(hidden_states, context)


def active(out, num_experts=4):
    return (out.top_k_index < num_experts).sum(-1)


@pytest.mark.parametrize(("temperature", "size"), [(2.0, 3.00), (0.3, 2.09)])
def test_the_temperature_changes_how_many_are_active_but_not_who_wins(temperature, size):
    router = make_router(3, temperature=temperature, weight_from="gumbel")
    logits = torch.tensor([1.0, 0.0, -1.0])
    out = run(router, logits.expand(200_000, 3))
    winners = out.top_k_index[:, 0].bincount(minlength=3) / 200_000
    torch.testing.assert_close(winners, logits.softmax(-1), atol=0.005, rtol=0)
    assert active(out, 3).float().mean().item() == pytest.approx(size, abs=0.01)


@pytest.mark.parametrize(("temperature", "size"), [(2.0, 4), (1.0, 4), (0.5, 4), (0.3, 3)])
def test_without_noise_the_threshold_alone_decides(temperature, size):
    router = make_router(temperature=temperature, gumbel=False)
    out = router(torch.tensor([[2.0, 1.0, 0.0, -1.0]]))
    assert active(out).item() == size
    torch.testing.assert_close(out.top_k_weights[0, :size], out.router_logits.softmax(-1)[0, :size])


def test_gumbel_weights_are_the_shares_above_the_threshold():
    router = make_router(temperature=0.5, threshold=0.05, weight_from="gumbel")
    out = run(router, torch.randn(500, 4, generator=torch.Generator().manual_seed(1)))
    number = active(out)
    assert number.min() == 1 and number.max() > 2
    assert (out.top_k_weights.sum(-1) >= 1 - (4 - number) * 0.05 - 1e-6).all()
    used = out.top_k_index < 4
    assert (out.top_k_weights[used] > 0.05).all() and (out.top_k_weights[~used] == 0).all()


def test_the_hard_phase_samples_the_best_and_softmax_weighs_it():
    router = make_router(temperature=2.0)
    router.hard.fill_(1)
    logits = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    out = run(router, logits)
    assert (active(out) == 1).all()
    assert not torch.equal(out.top_k_index[:, 0], logits.argmax(-1))
    torch.testing.assert_close(out.top_k_weights[:, :1], logits.softmax(-1).gather(-1, out.top_k_index[:, :1]))


def test_evaluation_is_the_plain_top_k_router(generator):
    router = build_router(make_config(8, 16, 2), 0).eval()
    plain_config = make_config(8, 16, 2)
    plain_config.router_type, plain_config.router_config = "softmax_topk", {"norm_topk_prob": False}
    plain = build_router(plain_config, 0).eval()
    plain.weight.data.copy_(router.weight)
    x = 10 * torch.randn(30, 16, generator=generator)
    out, expected = router(x), plain(x)
    assert torch.equal(out.top_k_index, expected.top_k_index)
    torch.testing.assert_close(out.top_k_weights, expected.top_k_weights)


def test_one_expert_gets_everything():
    out = run(make_router(1), torch.randn(5, 2, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(out.top_k_weights, torch.ones(5, 1)) and (out.top_k_index == 0).all()
    balance = load_balance_loss(out.router_logits.softmax(-1), expert_frequency(out.top_k_index, 1))
    assert balance == 1.0


def test_the_batch_variant_gives_all_tokens_the_mean_number_and_leaves_out_padding():
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0]] * 3 + [[0.0, 0.0, 0.0, 0.0]] * 2)  # |A| = 1 and 4
    router = make_router(gumbel=False, temperature=0.5, selection="batch")
    assert active(router(logits)).tolist() == [2] * 5  # floor(11 / 5)
    mask = torch.tensor([True, False, False, True, True])
    assert active(router(logits, RoutingContext(token_mask=mask))).tolist() == [3, 0, 0, 3, 3]  # floor(9 / 3)
    wide = make_router(gumbel=False, temperature=0.5, selection="batch", num_experts_per_tok=4)
    assert active(wide(logits)).tolist() == [4] * 5


def test_many_experts_scale_the_threshold():
    router = build_router(make_config(2000, 8), 0).train()
    router.weight.data.zero_()
    assert (active(router.eval()(torch.ones(2, 8)), 2000) == 1).all()
    router.train().gumbel = False
    assert (active(router(torch.ones(2, 8)), 2000) == 2000).all()  # shares of 1/2000 are below 0.001


def test_a_router_of_zeros_over_copies_computes_the_one_expert():
    """The first forward of the second phase is the last one of the first."""
    config = make_config(4, 16, temperature=2.0, weight_from="gumbel", threshold=0.0)
    config.initializer_range = 0.3
    model = MoeLlamaForCausalLM(config)
    block = model.model.layers[0].mlp
    with torch.no_grad():
        block.gate.weight.zero_()
        for parameter in block.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    x = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))
    expected, _ = block.eval()(x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        actual, _ = block.train()(x)
    torch.testing.assert_close(actual, expected * 4)  # evaluation: one expert of weight 1/4


SCHEDULES = {
    "temperature": {"type": "exponential", "start": 2.0, "end": 0.3, "num_steps": 100},
    "hard": {"type": "step", "at": 120},
}


def test_the_phases_are_scheduled_and_survive_saving(tmp_path):
    model = MoeLlamaForCausalLM(make_config(schedules=SCHEDULES))
    for step, temperature, hard in [(0, 2.0, 0), (50, 0.7746, 0), (100, 0.3, 0), (119, 0.3, 0), (120, 0.3, 1)]:
        apply_schedules(model, parse_schedules(SCHEDULES), step)
        for router in find_routers(model).values():
            assert router.temperature.item() == pytest.approx(temperature, abs=1e-4) and router.hard.item() == hard
    model.save_pretrained(tmp_path)
    for router in find_routers(MoeLlamaForCausalLM.from_pretrained(tmp_path)).values():
        assert router.temperature.item() == pytest.approx(0.3) and router.hard.item() == 1


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_training_gives_the_same_gradients_under_checkpointing(implementation, generator):
    model = MoeLlamaForCausalLM(make_config(4, 16, temperature=0.5, threshold=0.1)).train()
    model.set_experts_implementation(implementation)
    ids = torch.randint(0, 50, (2, 6), generator=generator)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for with_graph, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, with_graph)
    assert found[0][-1].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, r"\['threshold'\]` must be at least 0 and below 1, got 1.0"),
        ({"threshold": -0.1}, r"\['threshold'\]` must be at least 0"),
        ({"weight_from": "logits"}, r"\['weight_from'\]` must be one of .* got 'logits'"),
        ({"selection": "expert"}, r"\['selection'\]` must be one of .* got 'expert'"),
        ({"max_experts": 9}, r"\['max_experts'\]` must be between 1 and the number of experts \(4\), got 9"),
        ({"max_experts": 1, "num_experts_per_tok": 2}, r"at least `num_experts_per_tok` \(2\), got 1"),
        ({"schedules": {"hard": {"type": "step", "at": -1}}}, "the schedule of `hard`: `at` must be a whole number"),
        ({"schedules": {"temperature": {**SCHEDULES["temperature"], "end": 0.0}}}, "the schedule of `temperature`"),
    ],
)
def test_bad_values_are_refused_when_the_config_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_a_speed_for_biases_it_does_not_have_is_refused():
    with pytest.raises(ValueError, match="`router_bias_update_speed` has no selection bias to move"):
        MoeLlamaConfig(router_type="dense_to_sparse", router_bias_update_speed=0.01)
