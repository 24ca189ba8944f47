"""The activation gate: its formula, which of its parameters can be told apart, temperatures learned and scheduled."""

import pytest
import torch
from torch.nn import functional as F

from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM
from hf_moe.routing import apply_schedules, build_router, find_routers, parse_schedules


D, N = 8, 4


def make_config(num_experts_per_tok=N, **options):
    return MoeLlamaConfig(
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        num_experts=N,
        num_experts_per_tok=num_experts_per_tok,
        router_type="activation",
        router_config=options,
    )


def make_router(generator, **options):
    router = build_router(make_config(**options), 0).eval()
    with torch.no_grad():
        router.weight.copy_(torch.randn(N, D, generator=generator))
        router.bias.copy_(torch.randn(N, generator=generator))
    return router


def as_matrix(out):
    return torch.zeros(out.top_k_index.shape[0], N).scatter(-1, out.top_k_index, out.top_k_weights)


@pytest.mark.parametrize(
    ("name", "function"), [("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("gelu", F.gelu), ("relu", F.relu)]
)
def test_the_gate_is_the_softmax_of_activated_scores(name, function, generator):
    router = make_router(generator, activation=name, temperature=0.5)
    if router.log_temperature is not None:
        router.log_temperature.data.fill_(0.7)
    temperature = 0.5 * (1.0 if name == "relu" else torch.tensor(0.7).exp())
    x = torch.randn(20, D, generator=generator)
    expected = ((function(x @ router.weight.T) + router.bias) / temperature).softmax(-1)
    torch.testing.assert_close(as_matrix(router(x)), expected)


@pytest.mark.parametrize("name", ["linear", "relu", "sigmoid", "tanh", "gelu"])
def test_only_curved_activations_tell_a_temperature_from_a_scale(name, generator):
    router = make_router(generator, activation=name, temperature=0.8)
    x = torch.randn(200, D, generator=generator)
    before = as_matrix(router(x)).log()
    with torch.no_grad():
        for tensor in (router.weight, router.bias, router.temperature):
            tensor.mul_(3)
    change = (as_matrix(router(x)).log() - before).abs().max()
    assert change < 1e-4 if name in ("linear", "relu") else change > 0.05


def test_a_low_temperature_is_the_best_expert_alone(generator):
    router = make_router(generator, activation="gelu", temperature=1e-4)
    x = torch.randn(20, D, generator=generator)
    out = router(x)
    assert torch.equal(out.top_k_index[:, 0], out.router_logits.argmax(-1))
    torch.testing.assert_close(out.top_k_weights[:, 0], torch.ones(20), atol=1e-3, rtol=0)


def test_the_temperature_is_learned(generator):
    """Gradient steps find the temperature of a teacher with the same weights."""
    router = make_router(generator, temperature=1.0)
    x = torch.randn(300, D, generator=generator)
    teacher = (router(x).router_logits.detach() / 0.4).softmax(-1)
    optimizer = torch.optim.Adam([router.log_temperature], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -(teacher * as_matrix(router(x)).log()).sum(-1).mean()
        loss.backward()
        optimizer.step()
    assert router.log_temperature.exp().item() == pytest.approx(0.4, abs=0.01)


def test_it_is_learned_where_it_can_be_and_nothing_else_writes_it():
    falling = {"temperature": {"type": "exponential", "start": 2.0, "end": 0.3, "num_steps": 100}}
    for options, learned in [
        ({}, True),
        ({"activation": "linear"}, False),
        ({"schedules": falling}, False),
        ({"learn_temperature": False}, False),
    ]:
        assert (build_router(make_config(**options), 0).log_temperature is not None) == learned
    with pytest.raises(ValueError, match=r"`router_config\['schedules'\]` writes the temperature"):
        make_config(schedules=falling, learn_temperature=True)
    for name in ("relu", "linear"):
        with pytest.raises(ValueError, match=rf"cannot work with `activation='{name}'`"):
            make_config(activation=name, learn_temperature=True)
    with pytest.raises(ValueError, match=r"\['activation'\]` must be one of .* got 'swish'"):
        make_config(activation="swish")


def test_a_scheduled_temperature_reaches_every_layer(generator):
    falling = {"temperature": {"type": "exponential", "start": 2.0, "end": 0.3, "num_steps": 100}}
    model = MoeLlamaForCausalLM(make_config(schedules=falling, num_experts_per_tok=2))
    for step, temperature in [(0, 2.0), (50, 0.6**0.5), (100, 0.3), (500, 0.3)]:
        apply_schedules(model, parse_schedules(falling), step)
        for router in find_routers(model).values():
            assert router.temperature.item() == pytest.approx(temperature)


@pytest.mark.parametrize(
    "schedule",
    [
        {"type": "linear", "start": 2.0, "end": 0.0, "num_steps": 10},
        {"type": "exponential", "start": 2.0, "end": 0.5, "num_steps": float("inf")},
        {"type": "linear", "start": 2.0, "end": 0.5, "num_steps": 0},
        {"type": "linear", "start": 2.0, "end": 0.5, "num_steps": -1},
        -1.0,
    ],
    ids=str,
)
def test_temperatures_that_reach_zero_and_schedules_that_never_end_are_refused(schedule):
    with pytest.raises(ValueError, match="the schedule of `temperature`"):
        make_config(schedules={"temperature": schedule})


def test_the_learned_temperature_is_saved(tmp_path, generator):
    model = MoeLlamaForCausalLM(make_config(num_experts_per_tok=2)).eval()
    with torch.no_grad():
        for router in find_routers(model).values():
            router.log_temperature.fill_(-1.0)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 50, (2, 5), generator=generator)
    again = MoeLlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
