"""What every router must do. A new router enters by registration alone; add it to `OPTIONS` to test its options.

Shapes: T tokens, D hidden, N experts (all, zero-computation ones included), K per token.
"""

import copy
import pickle

import pytest
import torch

from hf_moe.models.llama import MoeLlamaConfig
from hf_moe.routing import BaseRouter, RouterOutput, RoutingContext, build_router, list_routers
from hf_moe.routing.hashing import random_hash_table
from hf_moe.routing.registry import router_class


T, D, N, K = 24, 16, 8, 2

# Router -> its variants: (name, router_config, config fields). Every router is also tried without options.
OPTIONS: dict[str, list[tuple[str, dict, dict]]] = {
    "softmax_topk": [
        ("plain_weights", {"norm_topk_prob": False}, {}),
        ("scaled", {"routed_scaling_factor": 2.5, "temperature": 0.5}, {}),
        ("biased", {"selection_bias": True}, {}),
        ("gaussian", {"noise": "gaussian", "noise_std": 0.5}, {}),
        ("jitter", {"noise": "jitter", "noise_std": 0.1}, {}),
        ("gumbel", {"noise": "gumbel", "temperature": 2.0}, {}),
        ("gumbel_second", {"noise": "gumbel_second", "balance_first_choice": True}, {}),
        ("capacity_renormalised", {"norm_survivors": True, "min_capacity": 2}, {"expert_capacity_factor": 0.5}),
        ("grouped", {"num_expert_groups": 4, "top_k_groups": 2}, {}),
        ("capacity_order", {}, {"expert_capacity_factor": 0.75}),
        ("capacity_score", {"capacity_policy": "score"}, {"expert_capacity_factor": 0.75}),
        ("capacity_random", {"capacity_policy": "random"}, {"expert_capacity_factor": 0.75}),
        ("top_1", {"norm_topk_prob": False}, {"num_experts_per_tok": 1}),
        ("everyone", {}, {"num_experts_per_tok": N}),
        ("bias_trained", {}, {"router_bias_update_speed": 0.001}),
    ],
    "sigmoid_topk": [
        ("plain_weights", {"norm_topk_prob": False}, {}),
        ("deepseek", {"selection_bias": True, "num_expert_groups": 4, "top_k_groups": 2}, {}),
        ("capacity_biased", {"selection_bias": True}, {"expert_capacity_factor": 0.5}),
        ("gaussian", {"noise": "gaussian", "noise_std": 0.5}, {}),
    ],
    "gating_residual": [
        ("two_layers", {"num_layers_gate": 2, "bias": True}, {}),
        ("no_residual", {"residual": False}, {}),
        ("renormalised", {"norm_topk_prob": True, "temperature": 2.0}, {}),
        ("capacity", {}, {"expert_capacity_factor": 0.75, "router_tau": 0.75}),
    ],
    "moepp_release": [
        ("mixtral_gating", {"mixtral_gating": True}, {}),
        ("normed_logits", {"logit_norm_std": 1.0, "num_layers_gate": 2}, {}),
        ("capacity", {}, {"expert_capacity_factor": 0.75, "router_tau": 0.75}),
    ],
}
OPTIONS["activation"] = [
    ("gelu", {"activation": "gelu", "temperature": 0.5}, {}),
    ("sigmoid_fixed", {"activation": "sigmoid", "learn_temperature": False, "noise": "gaussian"}, {}),
    ("linear", {"activation": "linear", "selection_bias": True}, {"expert_capacity_factor": 0.75}),
    ("everyone", {"temperature": 1.0}, {"num_experts_per_tok": N}),
]
OPTIONS["dense_to_sparse"] = [
    ("gumbel_weights", {"weight_from": "gumbel", "threshold": 0.05, "norm_topk_prob": True}, {}),
    ("batch", {"selection": "batch", "temperature": 0.5, "threshold": 0.05}, {}),
    ("capped", {"max_experts": 3}, {"expert_capacity_factor": 0.75, "num_experts_per_tok": 1}),
]
OPTIONS["top_p"] = [
    ("many", {"p": 0.9, "max_experts": 5, "norm_topk_prob": True}, {}),
    ("everyone", {"p": 1.0, "entropy_coef": 0.0, "temperature": 2.0}, {}),
    ("capacity", {"capacity_policy": "score"}, {"expert_capacity_factor": 0.75}),
]
OPTIONS["fixed_random"] = [
    ("capped", {"max_experts": 3, "norm_topk_prob": False}, {}),
    ("everyone", {}, {"num_experts_per_tok": N}),
    ("top_1", {}, {"num_experts_per_tok": 1, "expert_capacity_factor": 0.75}),
]
OPTIONS["comet"] = [
    ("wide", {"gamma": 4.0, "entropy_coef": 0.0}, {"expert_capacity_factor": 0.75}),
    ("capped", {"gamma": 3.0, "max_experts": 3, "norm_topk_prob": True}, {"num_experts_per_tok": 3}),
    ("saturated", {"gamma": 0.05}, {}),
]
OPTIONS["dselect_k"] = [
    ("wide", {"gamma": 4.0, "entropy_coef": 0.0}, {"expert_capacity_factor": 0.75}),
    ("three", {"gamma": 3.0}, {"num_experts_per_tok": 3}),
]
OPTIONS["expert_choice"] = [
    ("all_tokens", {"fallback": "expert_choice"}, {}),
    ("capped", {"fallback": "expert_choice", "max_experts": 3, "norm_topk_prob": True}, {"num_experts_per_tok": 3}),
    ("everyone", {"fallback": "topk", "temperature": 2.0}, {"num_experts_per_tok": N}),
]
OPTIONS["hash"] = [
    ("seeded", {"seed": 3, "num_buckets": 50, "routed_scaling_factor": 2.0}, {}),
    ("capacity", {}, {"expert_capacity_factor": 0.75}),
    ("top_1", {}, {"num_experts_per_tok": 1}),
    ("softmax", {"weight_from": "softmax"}, {}),
    ("sigmoid", {"weight_from": "sigmoid", "temperature": 2.0}, {"num_experts_per_tok": 1}),
]
# What a router cannot be evaluated without.
NEEDED = {"expert_choice": {"fallback": "topk"}}
# These routers tell zero-computation experts from others, so they get some among their N.
MIXED = {"num_experts": N - 4, "num_constant_experts": 2, "num_copy_experts": 1, "num_zero_experts": 1}
FIELDS = {"gating_residual": MIXED, "moepp_release": MIXED}
# From this index on, a chosen expert may have weight 0: the zero expert of the released MoE++ routing.
SILENT = {"moepp_release": N - 1}
# Nothing in these routers is learned, nor do they look at hidden states.
CONSTANT = {"hash"}
# Nothing in these is learned either, but hidden states are.
FROZEN = {"fixed_random"}
# They draw random numbers in training without being told to.
NOISY = {"dense_to_sparse"}


def cases():
    for router_type in list_routers():
        for name, options, fields in [("default", NEEDED.get(router_type, {}), {}), *OPTIONS.get(router_type, [])]:
            yield pytest.param((router_type, options, fields), id=f"{router_type}-{name}")


def make_config(router_type="softmax_topk", router_config=None, **fields) -> MoeLlamaConfig:
    sizes = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    fields = {"num_experts": N, "num_experts_per_tok": K, **FIELDS.get(router_type, {}), **fields}
    return MoeLlamaConfig(**sizes, router_type=router_type, router_config=router_config or {}, **fields)


def make_router(case, seed=0) -> BaseRouter:
    """A router of the second MoE layer with random weights and, where it has one, a random selection bias."""
    router_type, options, fields = case
    router = build_router(make_config(router_type, options, **fields), layer_idx=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            bias.copy_(torch.randn(bias.shape, generator=generator))
        if hasattr(router, "table"):
            router.set_table(random_hash_table(len(router.table), N, router.top_k, generator))
    return router.eval()


def make_inputs(tokens=T, seed=1, dtype=torch.float32) -> tuple[torch.Tensor, RoutingContext]:
    """Two sequences; the first third of each is padding."""
    generator = torch.Generator().manual_seed(seed)
    sequence = tokens // 2
    hidden_states = 2 * torch.randn(tokens, D, generator=generator)
    mask = (torch.arange(sequence) >= sequence // 3).repeat(2)
    state = torch.randn(tokens, N, generator=generator)
    input_ids = torch.randint(0, 100, (tokens,), generator=generator)
    return hidden_states.to(dtype), RoutingContext(input_ids, mask, 2, sequence, state)


def take(context: RoutingContext, rows) -> RoutingContext:
    """The context of some of the tokens."""
    return context._replace(
        input_ids=context.input_ids[rows],
        token_mask=context.token_mask[rows],
        prev_state=context.prev_state[rows],
        batch_size=1,
        sequence_length=len(context.input_ids[rows]),
    )


def run(router, hidden_states, context, seed=2) -> RouterOutput:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return router(hidden_states, context)


def dense(out: RouterOutput, num_experts=N) -> torch.Tensor:
    """Weights as a matrix (T, N)."""
    weights = torch.zeros(out.top_k_index.shape[0], num_experts + 1, dtype=out.top_k_weights.dtype)
    return weights.scatter_add(-1, out.top_k_index, out.top_k_weights)[:, :-1]


def assert_same(actual: RouterOutput, expected: RouterOutput, rows=slice(None), **tolerance):
    for field in RouterOutput._fields:
        a, e = getattr(actual, field), getattr(expected, field)
        assert (a is None) == (e is None), field
        if a is not None:
            torch.testing.assert_close(a[rows], e[rows], msg=lambda text, field=field: f"{field}: {text}", **tolerance)


EXACT = {"rtol": 0, "atol": 0}
every_router = pytest.mark.parametrize("case", list(cases()))
both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@pytest.fixture(autouse=True)
def _no_compiled_code_is_left():
    yield
    torch._dynamo.reset()


# -- the output contract ---------------------------------------------------------------------------------------------
@every_router
@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_output_has_the_shapes_and_dtypes_of_the_contract(case, training, dtype):
    router = make_router(case).train(training)
    for tokens in (T, 2, 0):
        hidden_states, context = make_inputs(tokens, dtype=dtype)
        out = run(router, hidden_states, context)
        assert isinstance(out, RouterOutput)
        assert out.router_logits.shape == (tokens, N) and out.router_logits.dtype == torch.float32
        assert out.top_k_weights.shape == (tokens, router.num_slots) and out.top_k_weights.dtype == dtype
        assert out.top_k_index.shape == (tokens, router.num_slots) and out.top_k_index.dtype == torch.int64
        assert out.router_logits.isfinite().all() and out.top_k_weights.isfinite().all()
        assert (out.state is not None) == router.carries_state
        assert out.state is None or out.state.shape[0] == tokens


@every_router
@both_modes
def test_empty_slots_are_index_n_with_weight_zero_after_the_active_ones(case, training):
    router = make_router(case).train(training)
    out = run(router, *make_inputs())
    active = out.top_k_index < N
    assert out.top_k_index.min() >= 0 and out.top_k_index.max() <= N
    assert (out.top_k_weights[~active] == 0).all()
    silent = active & (out.top_k_index >= SILENT.get(case[0], N))  # chosen, and weigh nothing by design
    assert (out.top_k_weights[active & ~silent] > 0).all() and (out.top_k_weights[silent] >= 0).all()
    assert (active[:, 1:] <= active[:, :-1]).all()
    assert (out.top_k_weights[:, 1:] <= out.top_k_weights[:, :-1]).all()
    chosen = torch.zeros(T, N + 1, dtype=torch.int64).scatter_add(-1, out.top_k_index, active.long())
    assert chosen.max() == 1  # no expert twice in one token's list


@every_router
@both_modes
def test_padding_tokens_get_empty_slots_only(case, training):
    hidden_states, context = make_inputs()
    out = run(make_router(case).train(training), hidden_states, context)
    padding = ~context.token_mask
    assert (out.top_k_index[padding] == N).all() and (out.top_k_weights[padding] == 0).all()
    assert (out.top_k_index[context.token_mask] < N).any()


@every_router
@both_modes
def test_what_stands_in_padding_changes_nothing_for_real_tokens(case, training):
    router = make_router(case).train(training)
    hidden_states, context = make_inputs()
    real = context.token_mask
    other, other_context = make_inputs(seed=7)
    changed = torch.where(real[:, None], hidden_states, other)
    changed_context = context._replace(
        input_ids=torch.where(real, context.input_ids, other_context.input_ids),
        prev_state=torch.where(real[:, None], context.prev_state, other_context.prev_state),
    )
    assert_same(run(router, changed, changed_context), run(router, hidden_states, context), rows=real, **EXACT)


@every_router
@both_modes
def test_removing_the_padding_changes_nothing_for_real_tokens(case, training):
    if training and (case[0] in NOISY or case[1].get("noise") or case[1].get("capacity_policy") == "random"):
        pytest.skip("draws random numbers for padding tokens too")
    router = make_router(case).train(training)
    hidden_states, context = make_inputs()
    real = context.token_mask
    padded = run(router, hidden_states, context)
    kept = RouterOutput(*(None if field is None else field[real] for field in padded))
    assert_same(run(router, hidden_states[real], take(context, real)), kept)


# -- determinism -----------------------------------------------------------------------------------------------------
@every_router
def test_eval_is_deterministic(case):
    router = make_router(case)
    hidden_states, context = make_inputs()
    assert_same(run(router, hidden_states, context, seed=3), run(router, hidden_states, context, seed=4), **EXACT)


@every_router
def test_a_token_is_routed_alike_alone_and_in_a_batch(case):
    router = make_router(case)
    if router.non_causal:
        pytest.skip("routes depend on other tokens by design")
    hidden_states, context = make_inputs()
    whole = run(router, hidden_states, context)
    for row in (5, T - 1):
        alone = run(router, hidden_states[row : row + 1], take(context, slice(row, row + 1)))
        assert_same(alone, RouterOutput(*(None if field is None else field[row : row + 1] for field in whole)))


@every_router
@both_modes
def test_three_dimensional_and_non_contiguous_inputs_are_read_alike(case, training):
    router = make_router(case).train(training)
    hidden_states, context = make_inputs()
    if training and (case[0] in NOISY or case[1].get("noise")):
        pytest.skip("random numbers are drawn in the order of memory")
    expected = run(router, hidden_states, context)
    assert_same(run(router, hidden_states.view(2, T // 2, D), context), expected, **EXACT)
    strided = hidden_states.T.contiguous().T
    mask = torch.stack([context.token_mask, ~context.token_mask], dim=-1)[:, 0]
    assert not strided.is_contiguous() and not mask.is_contiguous()
    assert_same(run(router, strided, context._replace(token_mask=mask)), expected)


@every_router
def test_no_context_means_no_padding(case):
    router = make_router(case)
    hidden_states, _ = make_inputs()
    if router.needs_input_ids:
        with pytest.raises(ValueError, match="Call it with `input_ids`"):
            run(router, hidden_states, None)
        return
    explicit = run(router, hidden_states, RoutingContext(token_mask=torch.ones(T, dtype=torch.bool)))
    assert_same(run(router, hidden_states, None), explicit)


# -- precision -------------------------------------------------------------------------------------------------------
@every_router
def test_half_precision_input_is_routed_in_full_precision(case):
    router = make_router(case)
    hidden_states, context = make_inputs(dtype=torch.bfloat16)
    out = run(router, hidden_states, context)
    full = run(router, hidden_states.float(), context)
    assert torch.equal(out.router_logits, full.router_logits) and torch.equal(out.top_k_index, full.top_k_index)
    assert torch.equal(out.top_k_weights, full.top_k_weights.bfloat16())


@every_router
def test_autocast_does_not_reach_the_scores(case):
    router = make_router(case)
    hidden_states, context = make_inputs()
    expected = run(router, hidden_states, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(router, hidden_states, context), expected, **EXACT)


@every_router
def test_half_precision_parameters_still_give_full_precision_logits(case):
    router = make_router(case).to(torch.bfloat16)
    hidden_states, context = make_inputs(dtype=torch.bfloat16)
    out = run(router, hidden_states, context)
    assert out.router_logits.dtype == torch.float32 and out.top_k_weights.dtype == torch.bfloat16


# -- gradients -------------------------------------------------------------------------------------------------------
def gradients(router, out, hidden_states, weight_seed=5):
    """Of the output weights (as a matrix, so that slot order does not matter), for input and parameters."""
    coefficients = torch.randn(hidden_states.shape[0], N, generator=torch.Generator().manual_seed(weight_seed))
    inputs = [hidden_states, *router.parameters()]
    assert out.top_k_weights.requires_grad == (router.router_type not in CONSTANT or router.learns)
    if not out.top_k_weights.requires_grad:
        return ()
    return torch.autograd.grad((dense(out) * coefficients).sum(), inputs, allow_unused=True)


@every_router
@both_modes
def test_gradients_are_finite_and_reach_every_parameter(case, training):
    router = make_router(case).train(training)
    hidden_states, context = make_inputs()
    hidden_states.requires_grad_()
    out = run(router, hidden_states, context)
    found = gradients(router, out, hidden_states)
    for gradient in found:
        assert gradient is not None and gradient.isfinite().all()
    # One renormalised weight of one expert is constant; everywhere else something must flow.
    if found and ((getattr(router, "k", router.top_k)) > 1 or not router.norm_topk_prob):
        assert all(gradient.any() for gradient in found)
        assert not found[0][~context.token_mask].any()


@every_router
@both_modes
def test_logits_have_a_gradient_for_the_losses(case, training):
    router = make_router(case).train(training)
    hidden_states, context = make_inputs()
    out = run(router, hidden_states, context)
    probabilities = router.probabilities(out.router_logits)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(T))
    assert probabilities.shape == (T, N) and (probabilities >= 0).all()
    coefficients = torch.randn(T, N, generator=torch.Generator().manual_seed(5))
    if case[0] in CONSTANT | FROZEN and not getattr(router, "learns", False):
        assert not list(router.parameters()) and not probabilities.requires_grad
        return
    for gradient in torch.autograd.grad((probabilities * coefficients).sum(), list(router.parameters())):
        assert gradient.isfinite().all() and gradient.any()


@every_router
@both_modes
def test_gradients_reach_weights_through_unbiased_scores_only(case, training):
    router = make_router(case).train(training)
    if type(router).forward is not BaseRouter.forward or router.capacity_factor is not None:
        pytest.skip("drops slots, or has a pipeline of its own")
    hidden_states, context = make_inputs()
    context = context._replace(token_mask=None)
    hidden_states.requires_grad_()
    generator = torch.Generator().manual_seed(9)
    push = (3 * torch.randn(T, N, generator=generator)).requires_grad_()
    chosen = []
    choice_scores, select = router.choice_scores, router.select
    router.choice_scores = lambda scores, logits: choice_scores(scores, logits) + push
    router.select = lambda scores: chosen.append(select(scores)) or chosen[-1]
    out = run(router, hidden_states, context)

    weights = router.weigh(router.scores(out.router_logits), chosen[0])
    reference = RouterOutput(out.router_logits, weights, chosen[0], None)
    torch.testing.assert_close(dense(out), dense(reference))
    expected = gradients(router, reference, hidden_states)
    # Retaining is not needed: both graphs are consumed once, they share only the logits.
    out = run(router, hidden_states, context)
    for actual, wanted in zip(gradients(router, out, hidden_states), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert push.grad is None and not out.top_k_index.is_floating_point()


@every_router
def test_a_constant_added_to_the_selection_bias_changes_nothing(case):
    router = make_router(case)
    if getattr(router, "e_score_correction_bias", None) is None:
        pytest.skip("has no selection bias")
    inputs = make_inputs()
    expected = run(router, *inputs)
    router.e_score_correction_bias += 0.5
    assert_same(run(router, *inputs), expected, **EXACT)
    router.e_score_correction_bias[3] = 100.0
    changed = run(router, *inputs)
    real = inputs[1].token_mask
    assert (changed.top_k_index[real] == 3).any(-1).all()  # everybody chooses expert 3 now
    assert torch.equal(changed.router_logits, expected.router_logits)
    assert torch.equal(router.probabilities(changed.router_logits), router.probabilities(expected.router_logits))


# -- saving, copying, compiling --------------------------------------------------------------------------------------
@every_router
def test_state_dict_round_trip_gives_the_same_router(case):
    router = make_router(case)
    for name in ("temperature", "noise_std"):  # what schedules write is part of the checkpoint
        if hasattr(router, name):
            getattr(router, name).fill_(0.7)
    other = make_router(case, seed=11)
    inputs = make_inputs()
    assert not torch.equal(run(other, *inputs).router_logits, run(router, *inputs).router_logits)
    other.load_state_dict(router.state_dict(), strict=True)
    assert_same(run(other, *inputs), run(router, *inputs), **EXACT)
    assert other.temperature == 0.7 if hasattr(router, "temperature") else True


@every_router
def test_deep_copies_and_pickles_are_the_same_router(case):
    router, inputs = make_router(case), make_inputs()
    expected = run(router, *inputs)
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert_same(run(twin, *inputs), expected, **EXACT)


@every_router
def test_compiled_equals_eager(case):
    router = make_router(case).train()  # capacity and noise are code paths of training only
    hidden_states, context = make_inputs()
    hidden_states.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    expected = run(router, hidden_states, context)
    actual = run(compiled, hidden_states, context)
    assert_same(actual, expected)
    wanted = gradients(router, expected, hidden_states)
    for gradient, reference in zip(gradients(router, actual, hidden_states), wanted, strict=True):
        torch.testing.assert_close(gradient, reference)


@every_router
def test_initial_values_are_finite_and_used_again_on_reset(case):
    router_type, options, fields = case
    router = build_router(make_config(router_type, options, **fields), layer_idx=1)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    router.reset_parameters()
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        assert tensor.isfinite().all(), name
    assert run(router, *make_inputs()).router_logits.isfinite().all()


# -- what is refused when the config is made -------------------------------------------------------------------------
def test_every_entry_of_the_table_is_a_registered_router():
    assert set(OPTIONS) <= set(list_routers()) and set(FIELDS) <= set(list_routers())


@pytest.mark.parametrize("router_type", list_routers())
def test_unknown_options_are_refused_with_the_nearest_name(router_type):
    with pytest.raises(ValueError, match=r"`router_config` has 'temprature'.*It takes \[.*Did you mean 'temperature'"):
        make_config(router_type, {"temprature": 2.0})


@pytest.mark.parametrize("router_type", list_routers())
@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", 0.0), ("temperature", -1.0), ("temperature", "hot"), ("capacity_policy", "first")],
)
def test_bad_values_of_common_options_are_refused(router_type, option, value):
    with pytest.raises(ValueError, match=rf"`router_config\['{option}'\]` must be .*{value}"):
        make_config(router_type, {option: value})


def test_unknown_routers_are_refused_with_the_nearest_name():
    with pytest.raises(
        ValueError, match=r"`router_type='softmax_top'` .*Choose one of \[.*Did you mean 'softmax_topk'"
    ):
        make_config("softmax_top")
    with pytest.raises(ValueError, match="`router_type='zzz'` is not a known router"):
        router_class("zzz")


@pytest.mark.parametrize(
    ("router_type", "options", "message"),
    [
        ("softmax_topk", {"temperature": True}, r"\['temperature'\]` must be of type float, got True"),
        ("softmax_topk", {"norm_topk_prob": 1}, r"\['norm_topk_prob'\]` must be of type bool, got 1"),
        ("softmax_topk", {"top_k_groups": "2"}, r"\['top_k_groups'\]` must be of type int \| None, got '2'"),
        ("softmax_topk", {"noise": "pink"}, r"\['noise'\]` must be one of .*'gumbel_second'\], got 'pink'"),
        ("softmax_topk", {"noise": "gaussian", "noise_std": -0.1}, r"\['noise_std'\]` must be .* got -0.1"),
        ("softmax_topk", {"noise": "jitter", "noise_std": 1.0}, r"\['noise_std'\]` must be .* got 1.0"),
        ("softmax_topk", {"num_expert_groups": 3}, r"\['num_expert_groups'\]` must divide .* \(8\), got 3"),
        ("softmax_topk", {"num_expert_groups": 0}, r"\['num_expert_groups'\]` must divide .* got 0"),
        ("sigmoid_topk", {"num_expert_groups": 4, "top_k_groups": 5}, r"\['top_k_groups'\]` must be .* got 5"),
        ("sigmoid_topk", {"num_expert_groups": 8, "top_k_groups": 1}, r"leave at least `num_experts_per_tok` \(2\)"),
        ("gating_residual", {"num_layers_gate": 3}, r"\['num_layers_gate'\]` must be 1 or 2, got 3"),
        ("moepp_release", {"logit_norm_std": 0.0}, r"\['logit_norm_std'\]` must be above 0 or None, got 0.0"),
    ],
)
def test_bad_values_are_refused_when_the_config_is_made(router_type, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(router_type, options)
