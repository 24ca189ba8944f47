"""The top-k routers against transformers' own, on copied weights."""

import pytest
import torch
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hf_moe.models.llama import MoeLlamaConfig
from hf_moe.routing import LinearRouter, RoutingContext, build_router, list_routers, register_router
from hf_moe.routing.registry import ROUTERS, router_class


T, D, N, K = 40, 16, 8, 2


def make_router(router_type="softmax_topk", num_experts_per_tok=K, **options):
    config = MoeLlamaConfig(
        hidden_size=D,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_experts=N,
        num_experts_per_tok=num_experts_per_tok,
        router_type=router_type,
        router_config=options,
    )
    return build_router(config, 0).eval()


def copy_weights(source, router, generator):
    with torch.no_grad():
        source.weight.copy_(torch.randn(N, D, generator=generator))
        router.weight.copy_(source.weight)


def as_matrix(index, weights):
    return torch.zeros(index.shape[0], N + 1).scatter_add(-1, index, weights.float())[:, :-1]


@pytest.fixture
def hidden_states(generator):
    return torch.randn(T, D, generator=generator)


def test_softmax_router_is_mixtrals(hidden_states, generator):
    theirs = MixtralTopKRouter(MixtralConfig(hidden_size=D, num_local_experts=N, num_experts_per_tok=K))
    ours = make_router()
    copy_weights(theirs, ours, generator)
    logits, weights, index = theirs(hidden_states)
    out = ours(hidden_states)
    assert torch.equal(out.router_logits, logits) and torch.equal(out.top_k_index, index)
    torch.testing.assert_close(out.top_k_weights, weights)


@pytest.mark.parametrize("renormalised", [False, True])
def test_softmax_router_is_qwen3s(renormalised, hidden_states, generator):
    config = Qwen3MoeConfig(hidden_size=D, num_experts=N, num_experts_per_tok=K, norm_topk_prob=renormalised)
    theirs, ours = Qwen3MoeTopKRouter(config), make_router(norm_topk_prob=renormalised)
    copy_weights(theirs, ours, generator)
    logits, weights, index = theirs(hidden_states)
    out = ours(hidden_states)
    assert torch.equal(out.router_logits, logits) and torch.equal(out.top_k_index, index)
    torch.testing.assert_close(out.top_k_weights, weights)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_sigmoid_router_is_deepseeks(groups, renormalised, biased, hidden_states, generator):
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=D,
            n_routed_experts=N,
            num_experts_per_tok=K,
            n_group=groups[0],
            topk_group=groups[1],
            norm_topk_prob=renormalised,
            routed_scaling_factor=2.5,
        )
    )
    ours = make_router(
        "sigmoid_topk",
        selection_bias=True,
        num_expert_groups=groups[0],
        top_k_groups=groups[1],
        norm_topk_prob=renormalised,
        routed_scaling_factor=2.5,
    )
    copy_weights(theirs, ours, generator)
    if biased:
        theirs.e_score_correction_bias.copy_(torch.randn(N, generator=generator))
        ours.e_score_correction_bias.copy_(theirs.e_score_correction_bias)
    logits, weights, index = theirs(hidden_states)
    out = ours(hidden_states)
    assert torch.equal(out.router_logits, logits)
    torch.testing.assert_close(as_matrix(out.top_k_index, out.top_k_weights), as_matrix(index, weights))


def test_groups_limit_the_choice_to_the_best_ones(generator):
    router = make_router(num_experts_per_tok=4, num_expert_groups=4, top_k_groups=2)
    copy_weights(router, router, generator)
    out = router(torch.randn(T, D, generator=generator))
    groups = out.top_k_index // (N // 4)
    assert all(len(set(row.tolist())) <= 2 for row in groups)
    # The sum of its two best scores decides a group; here groups have two experts, so the sum of both.
    kept = router.scores(out.router_logits).unflatten(-1, (4, 2)).sum(-1).topk(2).indices
    assert torch.equal(groups.sort().values[:, ::2], kept.sort().values)


def test_renormalised_softmax_is_softmax_over_the_chosen_logits(hidden_states, generator):
    router = make_router()
    copy_weights(router, router, generator)
    out = router(hidden_states)
    chosen = out.router_logits.gather(-1, out.top_k_index)
    torch.testing.assert_close(out.top_k_weights, chosen.softmax(-1))


def test_temperature_divides_the_logits_and_is_read_at_every_call(hidden_states, generator):
    router = make_router(temperature=2.0)
    copy_weights(router, router, generator)
    plain = make_router()
    plain.load_state_dict(router.state_dict() | {"temperature": torch.tensor(1.0)})
    torch.testing.assert_close(router(hidden_states).top_k_weights, plain(hidden_states / 2).top_k_weights)
    router.temperature.fill_(1.0)  # what a schedule does
    torch.testing.assert_close(router(hidden_states).top_k_weights, plain(hidden_states).top_k_weights)


def test_probabilities_are_before_any_bias(hidden_states):
    router = make_router("sigmoid_topk", selection_bias=True)
    logits = torch.tensor([[2.0, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    scores = logits.sigmoid()
    router.e_score_correction_bias.fill_(7.0)
    torch.testing.assert_close(router.probabilities(logits), scores / scores.sum())
    softmax = make_router(temperature=0.5)
    torch.testing.assert_close(softmax.probabilities(logits), (logits / 0.5).softmax(-1))


def test_noise_enters_the_choice_in_training_only_and_never_the_weights(hidden_states, generator):
    router = make_router(noise="gaussian", noise_std=3.0, norm_topk_prob=False)
    copy_weights(router, router, generator)
    quiet = router(hidden_states)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = router.train()(hidden_states)
    assert not torch.equal(as_matrix(*noisy[2:0:-1]), as_matrix(*quiet[2:0:-1]))
    assert torch.equal(noisy.router_logits, quiet.router_logits)
    scores = router.scores(noisy.router_logits)
    torch.testing.assert_close(noisy.top_k_weights, scores.gather(-1, noisy.top_k_index))
    router.noise_std.zero_()
    assert torch.equal(router(hidden_states).top_k_index, quiet.top_k_index)


def test_jitter_multiplies_the_routers_input_within_its_bounds(generator):
    router = make_router(noise="jitter", noise_std=0.25).train()
    with torch.no_grad():  # the logits show the router's input
        router.weight.copy_(torch.eye(N, D))
    hidden_states = torch.full((500, D), 4.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logits = router(hidden_states).router_logits
    assert logits.min() >= 3.0 and logits.max() <= 5.0
    assert logits.min() < 3.01 and logits.max() > 4.99
    assert torch.equal(hidden_states, torch.full((500, D), 4.0))  # never in place
    assert torch.equal(router.eval()(hidden_states).router_logits, torch.full((500, N), 4.0))


def test_selection_bias_exists_where_something_trains_it():
    assert make_router().e_score_correction_bias is None
    config = MoeLlamaConfig(hidden_size=D, num_attention_heads=2, router_bias_update_speed=0.001)
    assert build_router(config, 0).e_score_correction_bias.dtype == torch.float32


def test_routers_of_users_are_looked_up_like_ours():
    @register_router("test_last_experts")
    class LastExpertsRouter(LinearRouter):
        """Prefers experts with a large index."""

        def __init__(self, config, layer_idx, *, slope: float = 1.0, **kwargs):
            super().__init__(config, layer_idx, **kwargs)
            self.slope = slope

        def choice_scores(self, scores, router_logits):
            return self.slope * torch.arange(self.num_experts, device=scores.device).expand_as(scores)

        @property
        def choice_differs_from_scores(self):
            return True

    try:
        router = make_router("test_last_experts", slope=2.0, temperature=0.5)
        out = router(torch.ones(3, D), RoutingContext())
        assert router.router_type == "test_last_experts" and "test_last_experts" in list_routers()
        assert torch.equal(out.top_k_index.sort().values, torch.tensor([[N - 2, N - 1]]).expand(3, 2))
        assert (out.top_k_weights[:, 0] >= out.top_k_weights[:, 1]).all()
        with pytest.raises(ValueError, match=r"\['slope'\]` must be of type float, got 'up'"):
            make_router("test_last_experts", slope="up")
        with pytest.raises(ValueError, match=r"`router_type='test_last_experts'` is already taken by .*LastExperts"):
            register_router("test_last_experts")(type("Other", (LinearRouter,), {}))
    finally:
        del ROUTERS["test_last_experts"]


def test_names_of_ours_are_taken():
    router_class("softmax_topk")
    with pytest.raises(ValueError, match="already taken by SoftmaxTopKRouter; choose another name"):
        register_router("softmax_topk")(type("Other", (LinearRouter,), {}))
