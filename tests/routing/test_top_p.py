"""Dynamic routing: the paper's examples, what a threshold implies, and the entropy loss in every head and trainer."""

from itertools import pairwise

import pytest
import torch

from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM, MoeLlamaForSequenceClassification
from hf_moe.routing import LayerRouting, LoadBalancer, RoutingContext, build_router


def make_config(num_experts=4, hidden_size=4, fields=None, **options):
    sizes = {"hidden_size": hidden_size, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}
    fields = {"vocab_size": 50, "num_experts": num_experts, **(fields or {})}
    return MoeLlamaConfig(**sizes, **fields, router_type="top_p", router_config=options)


def make_router(num_experts=4, **options):
    """A router whose logits are its input."""
    router = build_router(make_config(num_experts, num_experts, **options), 0).eval()
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


@pytest.mark.parametrize(
    ("probabilities", "number", "entropy"),
    [
        ((0.5, 0.3, 0.15, 0.05), 1, 1.1421),
        ((0.3, 0.3, 0.2, 0.2), 2, 1.3662),
        ((0.25, 0.25, 0.25, 0.25), 2, 1.3863),
        ((0.39, 0.31, 0.2, 0.1), 2, 1.2824),
        ((1 / 16,) * 16, 7, 2.7726),
    ],
)
def test_the_papers_examples(probabilities, number, entropy):
    p = torch.tensor([probabilities])
    router = make_router(len(probabilities), entropy_coef=1.0).train()
    out = router(p.log())
    used = out.top_k_index[0] < len(probabilities)
    assert used.sum() == number
    torch.testing.assert_close(out.top_k_weights[0, :number], p[0].sort(descending=True).values[:number])
    assert out.penalty.item() == pytest.approx(entropy, abs=1e-4)


def test_a_sum_of_exactly_p_is_enough():
    router = make_router()
    assert router.keep(torch.tensor([[0.4, 0.3, 0.2, 0.1]])).tolist() == [[True, False, False, False]]


def test_the_experts_are_the_fewest_that_reach_p(generator):
    logits = torch.randn(300, 4, generator=generator)
    numbers = []
    for p in (0.01, 0.2, 0.4, 0.6, 0.8, 0.99):
        out = make_router(p=p)(logits)
        used = out.top_k_index < 4
        total = out.top_k_weights.sum(-1)
        last = out.top_k_weights.masked_fill(~used, 2.0).min(-1).values
        assert (total >= p - 1e-6).all() and (total - last < p).all()
        numbers.append(used.sum(-1))
    assert all((more >= fewer).all() for fewer, more in pairwise(numbers))
    assert (numbers[0] == 1).all()


def test_p_of_one_is_the_dense_softmax_mixture(generator):
    logits = 20 * torch.randn(300, 16, generator=generator)
    out = make_router(16, p=1.0)(logits)
    assert (out.top_k_index < 16).all()
    dense = torch.zeros(300, 16).scatter(-1, out.top_k_index, out.top_k_weights)
    torch.testing.assert_close(dense, logits.softmax(-1))


def test_a_cap_drops_the_least_probable():
    out = make_router(p=0.9, max_experts=2)(torch.tensor([[3.0, 2.0, 1.9, 1.8]]))
    assert out.top_k_index.tolist() == [[0, 1]]


def test_empty_slots_cost_no_gradient_and_the_block_computes_the_sum(generator):
    model = MoeLlamaForCausalLM(make_config(4, 16, p=0.5, fields={"initializer_range": 0.3})).eval()
    block = model.model.layers[0].mlp
    x = torch.randn(9, 16, generator=generator)
    out = block.gate(x)
    assert 9 < (out.top_k_index < 4).sum() < 36
    expected = torch.zeros(9, 16)
    for expert in range(4):
        alone = torch.full((9, 1), expert)
        weight = (out.top_k_weights * (out.top_k_index == expert)).sum(-1, keepdim=True)
        expected += weight * block.experts(x, alone, torch.ones(9, 1))
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(block(x.unsqueeze(0))[0][0], expected)


@pytest.mark.parametrize("padding", [False, True])
def test_the_entropy_loss_is_a_mean_over_real_tokens_and_layers(padding, generator):
    def loss(coefficient):
        fields = {"router_aux_loss_coef": 0.0, "initializer_range": 0.3}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = MoeLlamaForCausalLM(make_config(4, 16, fields, entropy_coef=coefficient)).train()
        ids = torch.arange(12).view(2, 6) + 3
        mask = torch.ones(2, 6, dtype=torch.long)
        if padding:
            mask[0, :3] = 0
        out = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
        return out, mask.reshape(-1).bool()

    plain, _ = loss(0.0)
    out, real = loss(0.5)
    p = torch.stack([logits.softmax(-1)[real] for logits in out.router_logits])
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(out.loss - plain.loss, 0.5 * entropy)


def test_it_alone_is_enough_to_have_the_routing_recorded(generator):
    """No balance loss, nothing asked for: the entropy loss still reaches the routers, in checkpointing too."""
    ids = torch.randint(0, 50, (4, 6), generator=generator)
    for cls, labels in [(MoeLlamaForCausalLM, ids), (MoeLlamaForSequenceClassification, ids[:, 0] % 2)]:
        found = []
        for coefficient, checkpointing in [(0.0, False), (5.0, False), (5.0, True)]:
            config = make_config(4, 16, {"router_aux_loss_coef": 0.0, "pad_token_id": 0}, entropy_coef=coefficient)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = cls(config).train()
            if checkpointing:
                with pytest.raises(ValueError, match="would drop the gradient of the router losses"):
                    model.gradient_checkpointing_enable({"use_reentrant": True})
                model.gradient_checkpointing_enable()
            model(ids, labels=labels).loss.backward()
            found.append(model.model.layers[1].mlp.gate.weight.grad)
        assert not torch.allclose(found[0], found[1])
        torch.testing.assert_close(found[1], found[2])


def test_minimising_it_lowers_the_number_of_experts(generator):
    router = build_router(make_config(8, 8, entropy_coef=1.0), 0).train()
    x = torch.randn(200, 8, generator=generator)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.1)
    before = (router(x).top_k_index < 8).sum(-1).float().mean()
    for _ in range(50):
        optimizer.zero_grad()
        router(x).penalty.mean().backward()
        optimizer.step()
    assert (router(x).top_k_index < 8).sum(-1).float().mean() < before - 1


def test_the_same_gradient_for_one_batch_and_its_micro_batches(generator):
    """The penalty is scaled like the other router losses: exact under accumulation, padding included."""
    router = build_router(make_config(4, 4, entropy_coef=0.7), 0).train()
    x = torch.randn(12, 4, generator=generator)
    mask = torch.arange(12) % 5 != 0

    def gradient(parts):
        balancer = LoadBalancer([4])
        balancer.begin_step(num_micro_batches=len(parts), num_tokens=mask.sum())
        total = torch.zeros(())
        for rows in parts:
            out = router(x[rows], RoutingContext(token_mask=mask[rows]))
            layer = LayerRouting.from_router(router, out.router_logits, out.top_k_index, out.penalty)
            total = total + balancer([layer], mask[rows], num_items_in_batch=1).total()
        return torch.autograd.grad(total, router.weight)[0]

    whole = gradient([slice(0, 12)])
    parts = gradient([slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    assert whole.abs().max() > 1e-3


def test_evaluation_has_no_penalty(generator):
    assert make_router().eval()(torch.randn(3, 4, generator=generator)).penalty is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.0}, r"\['p'\]` must be above 0 and at most 1, got 0.0"),
        ({"p": 1.1}, r"\['p'\]` must be above 0 and at most 1, got 1.1"),
        ({"p": -0.4}, r"\['p'\]` must be above 0"),
        ({"schedules": {"p": {"type": "linear", "start": 0.4, "end": 0.0, "num_steps": 5}}}, "reaches 0.0"),
        (
            {"schedules": {"p": {"type": "step", "at": 5, "before": 0.4, "after": 1.5}}},
            "reaches 1.5, but .* at most 1",
        ),
        ({"schedules": {"p": {"type": "linear", "start": 0.4, "end": 0.5, "num_steps": float("inf")}}}, "got inf"),
        ({"entropy_coef": -1.0}, r"\['entropy_coef'\]` must be at least 0 and finite, got -1.0"),
        ({"max_experts": 0}, r"\['max_experts'\]` must be between 1"),
    ],
)
def test_bad_values_are_refused_when_the_config_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_a_moe_trainer_adds_the_entropy_loss_once_and_logs_it(tmp_path):
    from hf_moe.trainers import MoeTrainer, MoeTrainingArguments

    ids = torch.arange(12).view(2, 6) + 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MoeLlamaForCausalLM(make_config(4, 16, {"router_aux_loss_coef": 0.0}, entropy_coef=2.0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = MoeTrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    expected = model.train()(ids, labels=ids).loss.item()
    trainer = MoeTrainer(model, arguments, train_dataset=data)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected, rel=1e-4)
    assert logged["router_penalty"] == pytest.approx(2.0 * torch.tensor(4.0).log().item(), rel=0.05)
