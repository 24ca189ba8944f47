"""Expert choice: even load, who is chosen, and nothing that looks ahead at evaluation."""

import pytest
import torch

from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM
from hf_moe.routing import RoutingContext, build_router


D, N, T = 16, 4, 20


def make_config(num_experts_per_tok=2, fields=None, **options):
    return MoeLlamaConfig(
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        num_experts=N,
        num_experts_per_tok=num_experts_per_tok,
        router_type="expert_choice",
        router_aux_loss_coef=0.0,
        router_config=options,
        initializer_range=0.3,
        **(fields or {}),
    )


def make_router(**options):
    router = build_router(make_config(**options), 0).train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(N, D))
    return router


def counts(index):
    return index.flatten().bincount(minlength=N + 1)[:N].tolist()


@pytest.mark.parametrize(
    ("top_k", "tokens", "per_expert"), [(2, 20, 10), (1, 20, 5), (4, 20, 20), (1, 6, 2), (2, 1, 1)]
)
def test_every_expert_takes_the_same_number_of_tokens(top_k, tokens, per_expert, generator):
    router = make_router(num_experts_per_tok=top_k)
    out = router(3 * torch.randn(tokens, D, generator=generator))
    assert counts(out.top_k_index) == [per_expert] * N  # K T / N, rounded up
    assert out.top_k_index.shape == (tokens, N)


def test_experts_take_those_who_want_them_most_at_the_weight_of_their_wish(generator):
    router = make_router()
    x = torch.randn(T, D, generator=generator)
    out = router(x)
    scores = x[:, :N].softmax(-1)
    best = scores.topk(T * 2 // N, dim=0).indices  # (C, N)
    expected = torch.zeros(T, N).scatter(0, best, scores.gather(0, best))
    weights = torch.zeros(T, N + 1).scatter_add(-1, out.top_k_index, out.top_k_weights)[:, :N]
    torch.testing.assert_close(weights, expected)
    number = (out.top_k_index < N).sum(-1)
    assert number.min() < 2 < number.max() and number.float().mean() == 2


def test_padding_neither_counts_nor_competes(generator):
    x = torch.randn(T, D, generator=generator)
    x[::2] *= 20  # padding would win everywhere
    mask = torch.arange(T) % 2 == 1
    router = make_router()
    out = router(x, RoutingContext(token_mask=mask))
    assert counts(out.top_k_index) == [5] * N
    alone = router(x[mask])
    assert torch.equal(out.top_k_index[mask], alone.top_k_index)
    assert (out.top_k_index[~mask] == N).all()


def test_a_cap_drops_the_smallest_shares():
    router = make_router(num_experts_per_tok=4, max_experts=2)
    out = router(torch.tensor([[3.0, 2.0, 1.0, 0.0]] + [[0.0] * 4] * 3) @ torch.eye(4, D))
    assert out.top_k_index[0].tolist() == [0, 1]


def test_the_fallback_is_the_plain_top_k_router_token_by_token(generator):
    router = make_router(fallback="topk").eval()
    plain_config = make_config()
    plain_config.router_type, plain_config.router_config = "softmax_topk", {"norm_topk_prob": False}
    plain = build_router(plain_config, 0).eval()
    plain.weight.data.copy_(router.weight)
    x = torch.randn(T, D, generator=generator)
    out, expected = router(x), plain(x)
    assert not router.non_causal and router.train().non_causal
    assert torch.equal(out.top_k_index[:, :2], expected.top_k_index) and (out.top_k_index[:, 2:] == N).all()
    torch.testing.assert_close(out.top_k_weights[:, :2], expected.top_k_weights)


def test_an_encoder_may_choose_at_evaluation_as_in_training(generator):
    router = make_router(fallback="expert_choice")
    x = torch.randn(T, D, generator=generator)
    trained = router(x)
    assert torch.equal(router.eval()(x).top_k_index, trained.top_k_index)


@pytest.mark.parametrize("fallback", [None, "topk", "expert_choice"])
def test_generation_and_evaluation_never_look_ahead(fallback, generator):
    options = {} if fallback is None else {"fallback": fallback}
    model = MoeLlamaForCausalLM(make_config(**options))
    ids = torch.randint(3, 50, (1, 6), generator=generator)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with pytest.raises(ValueError, match=r"`generate` cannot work with `router_type='expert_choice'`.*'topk'"):
        model.train().generate(ids, **settings)
    model.eval()
    if fallback == "topk":
        generated = model.generate(ids, **settings)
        assert torch.equal(generated, model.generate(ids, use_cache=False, **settings))
        torch.testing.assert_close(model(generated).logits[:, :6], model(ids).logits)
        return
    with pytest.raises(ValueError, match=r"`generate` cannot work with `router_type='expert_choice'`.*'topk'"):
        model.generate(ids, **settings)
    if fallback is None:
        with pytest.raises(ValueError, match=r"cannot be evaluated or generate with it. Set `router_config=.*'topk'"):
            model(ids)


def test_a_model_learns_with_it_under_checkpointing_too(generator):
    model = MoeLlamaForCausalLM(make_config()).train()
    ids = torch.randint(0, 50, (2, 8), generator=generator)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for with_graph, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, with_graph)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_bad_values_are_refused_when_the_config_is_made():
    with pytest.raises(ValueError, match=r"\['fallback'\]` must be None or one of .* got 'greedy'"):
        make_config(fallback="greedy")
    with pytest.raises(ValueError, match="`expert_capacity_factor` has no meaning with `router_type='expert_choice'`"):
        make_config(fields={"expert_capacity_factor": 1.0})
