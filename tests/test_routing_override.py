"""Routing overrides: what each selection sends where, on every experts implementation, and that nothing stays behind.

Families one by one: test_view_families.py.
"""

import pytest
import torch
from common.experts_inputs import received_by_experts
from common.tiny_families import tiny_model

import hf_moe
from hf_moe.routing_override import routing_override
from hf_moe.views import moe_layers, record_routing


IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "hf_moe")
# PEFT 0.21 asks transformers for an attribute it has renamed.
peft_asks_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 384, (3, 5), generator=torch.Generator().manual_seed(4))


def model_of(family, implementation=None, **overrides):
    model = tiny_model(family, num_hidden_layers=2, **overrides)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def recorded(model, ids, layer=0, **kwargs):
    with record_routing(model) as recorder:
        model(input_ids=ids, use_cache=False, **kwargs)
    record = recorder.layers[layer]
    return record.router_logits[0], record.top_k_weights[0], record.top_k_index[0]


def traces(model):
    """All that an override might leave on a model."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return hooks, [getattr(view.experts, "_is_expert_parallel", None) for view in moe_layers(model)]


# -- selections -------------------------------------------------------------------------------------------------------
def test_the_function_is_what_the_package_exports():
    assert hf_moe.routing_override is routing_override


def test_ranks_count_in_the_order_of_the_logits(ids):
    model = model_of("mixtral")
    router_logits, _, _ = recorded(model, ids)
    with routing_override(model, [5, 0, 2]):
        _, weights, index = recorded(model, ids)
    order = router_logits.argsort(dim=-1, descending=True)
    assert torch.equal(index, order[:, [5, 0, 2]])
    torch.testing.assert_close(weights, router_logits.gather(-1, index).softmax(-1))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "moe_llama", "moe_plus_plus"])
def test_top_m_is_the_router_with_another_top_k(family, ids):
    model = model_of(family, first_k_dense_replace=0) if family == "deepseek_v3" else model_of(family)
    with routing_override(model, top_m=4):
        overridden = logits(model, ids)
    for view in moe_layers(model):
        view.router.top_k = 4
    torch.testing.assert_close(overridden, logits(model, ids), rtol=1e-5, atol=2e-6)


def test_ranks_within_group_limits_come_before_the_others(ids):
    model = model_of("deepseek_v3", first_k_dense_replace=0, n_group=4, topk_group=2)
    view = moe_layers(model)[0]
    view.router.e_score_correction_bias.copy_(torch.linspace(0, 1, 8)[torch.tensor([3, 0, 6, 1, 7, 4, 2, 5])])
    router_logits, _, native = recorded(model, ids)
    with routing_override(model, range(8)):
        _, weights, index = recorded(model, ids)
    scores = view.scores(router_logits)
    choice = view.choice_scores(scores, router_logits)
    allowed = choice.gather(-1, index) > -torch.inf
    assert torch.equal(allowed, torch.tensor([True] * 4 + [False] * 4).expand(15, 8))
    assert torch.equal(index[:, :2].sort(-1).values, native.sort(-1).values)
    assert (scores.gather(-1, index)[:, 4:].diff(dim=-1) <= 0).all()  # the others by score, not by chance
    assert (weights > 0).all()


def test_random_experts_are_distinct_uniform_and_repeatable(ids):
    model, many = model_of("mixtral"), torch.randint(3, 384, (40, 40), generator=torch.Generator().manual_seed(0))
    draws = []
    for _ in range(2):
        with routing_override(model, random=3, generator=torch.Generator().manual_seed(7)):
            draws.append(recorded(model, many)[2])
    assert torch.equal(*draws) and draws[0].shape == (1600, 3)
    assert (draws[0].sort(dim=-1).values.diff(dim=-1) > 0).all()
    load = draws[0].flatten().bincount(minlength=8) / draws[0].numel()
    assert (load - 1 / 8).abs().max() < 0.02
    with routing_override(model, random=3):
        with record_routing(model) as recorder:
            logits(model, ids)
    first, second = (layer.top_k_index[0] for layer in recorder.layers)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "moe_llama"])
def test_a_threshold_takes_the_experts_that_reach_it_and_always_the_best(family, ids):
    model = model_of(family)
    view = moe_layers(model)[0]
    with torch.no_grad():
        view.router.weight.mul_(30)
    router_logits, _, _ = recorded(model, ids)
    probabilities = view.probabilities(router_logits)
    with routing_override(model, threshold=0.4):
        _, weights, index = recorded(model, ids)
    wanted = probabilities >= 0.4
    wanted |= probabilities == probabilities.max(dim=-1, keepdim=True).values
    dense = torch.zeros_like(probabilities).scatter_add(-1, index.clamp(max=7), weights)
    assert torch.equal(dense > 0, wanted) and set(wanted.sum(-1).tolist()) >= {1}
    kept = probabilities * wanted
    torch.testing.assert_close(dense, kept / kept.sum(-1, keepdim=True))


def test_a_function_may_choose_anything_and_leave_slots_empty(ids):
    model = model_of("mixtral")
    seen = []

    def last_two(view, routing, scores):
        seen.append((view.index, routing.top_k_index.shape, scores.shape))
        index = torch.tensor([[7, 6, 8]]).expand(scores.shape[0], 3)  # 8 of 8: empty
        return torch.tensor([[0.25, 0.5, 9.0]]).expand_as(index), index

    with routing_override(model, fn=last_two):
        _, weights, index = recorded(model, ids)
        found = logits(model, ids)
    assert seen[:2] == [(0, (15, 2), (15, 8)), (1, (15, 2), (15, 8))]
    assert torch.equal(index[0, :2], torch.tensor([7, 6])) and torch.equal(weights[0], torch.tensor([0.25, 0.5, 0]))

    def without_the_empty_slot(view, routing, scores):
        index = torch.tensor([[7, 6]]).expand(scores.shape[0], 2)
        return torch.tensor([[0.25, 0.5]]).expand_as(index), index

    with routing_override(model, fn=without_the_empty_slot):
        torch.testing.assert_close(found, logits(model, ids), rtol=1e-5, atol=2e-6)


def test_renormalised_weights_sum_to_1_where_the_family_does_not(ids):
    model = model_of("qwen3_moe", norm_topk_prob=False)
    with routing_override(model, [1, 3]):
        _, native, _ = recorded(model, ids)
    with routing_override(model, [1, 3], weights="renormalised"):
        _, renormalised, _ = recorded(model, ids)
    assert (native.sum(-1) < 0.9).all()
    torch.testing.assert_close(renormalised, native / native.sum(-1, keepdim=True))


def test_layers_limits_the_override(ids):
    model = model_of("mixtral")
    native = [recorded(model, ids, layer)[2] for layer in (0, 1)]
    with routing_override(model, [7], layers=[1]):
        first, second = (recorded(model, ids, layer)[2] for layer in (0, 1))
    assert torch.equal(first, native[0]) and second.shape == (15, 1)


def test_weights_carry_gradient_to_the_router(ids):
    model = model_of("mixtral")
    with routing_override(model, [1, 2]):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert moe_layers(model)[0].router.weight.grad.abs().sum() > 0


def test_gradients_are_the_same_under_activation_checkpointing(ids):
    gradients = []
    for checkpointing in (False, True):
        model = model_of("mixtral").train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with routing_override(model, random=2):
            torch.manual_seed(0)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(moe_layers(model)[0].router.weight.grad)
    torch.testing.assert_close(*gradients)


# -- rows and empty slots ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "moe_llama"])
def test_rows_equal_separate_forwards(family, implementation, ids):
    model = model_of(family, implementation)
    plain, before = logits(model, ids), traces(model)
    for ranks in ([1], [4, 1, 2]):  # fewer and more slots than the model's own two
        with routing_override(model, ranks):
            whole = logits(model, ids)
        for rows in (slice(1, None), [2, 1], [-1, -2]):
            with routing_override(model, ranks, rows=rows):
                mixed = logits(model, ids)
            torch.testing.assert_close(mixed[:1], plain[:1], rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(mixed[1:], whole[1:], rtol=1e-5, atol=2e-6)
    assert traces(model) == before


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_thresholds_equal_on_every_implementation(implementation, ids):
    model = model_of("mixtral", implementation)
    with torch.no_grad():
        for view in moe_layers(model):
            view.router.weight.mul_(30)
    with routing_override(model, threshold=0.3):
        found = logits(model, ids)
    model.set_experts_implementation("eager")
    with routing_override(model, threshold=0.3):
        torch.testing.assert_close(found, logits(model, ids), rtol=1e-5, atol=2e-6)


def test_padding_slots_are_skipped_where_the_experts_can_and_repeat_an_expert_elsewhere(ids):
    for implementation in IMPLEMENTATIONS:
        model = model_of("mixtral", implementation)
        with routing_override(model, [1], rows=[0]):
            _, received = received_by_experts(model, ids)
            assert moe_layers(model)[0].experts._is_expert_parallel  # grouped_mm reads nothing uninitialised
        index, weights = received[0]
        assert torch.equal(weights[:5], torch.tensor([[1.0, 0.0]]).expand(5, 2))
        if implementation in ("grouped_mm", "hf_moe"):
            assert (index[:5, 1] == 8).all()
        else:
            assert torch.equal(index[:5, 1], index[:5, 0])


def test_gradients_do_not_pass_through_padding_slots(ids):
    # grouped_mm leaves rows of empty slots uninitialised: unmasked, they would reach the gradient
    gradients = []
    for implementation in IMPLEMENTATIONS:
        model = model_of("mixtral", implementation)
        with routing_override(model, [3], rows=[0, 2]):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for others in gradients[1:]:
        for first, other in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-6)


def test_padding_tokens_of_our_models_stay_without_experts(ids):
    model = model_of("moe_llama")
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for kwargs in ({"ranks": [1]}, {"threshold": 0.2}, {"random": 2}, {"ranks": [1], "rows": [1]}):
        with routing_override(model, **kwargs):
            _, weights, index = recorded(model, ids, attention_mask=mask)
        padding = ~mask.bool().flatten()
        assert (index[padding] == 8).all() and not weights[padding].any()
        assert (index[~padding][:, 0] < 8).all()


def test_rows_are_those_of_a_decoding_step_too(ids):
    model = model_of("mixtral")
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with routing_override(model, [6], rows=[1]), record_routing(model) as recorder:
            model(input_ids=ids[:, :1], past_key_values=cache)
    index, weights = recorder.layers[0].top_k_index[0], recorder.layers[0].top_k_weights[0]
    assert index.shape == (3, 2) and (weights[[0, 2]] > 0).all() and weights[1].tolist() == [1.0, 0.0]


# -- nesting and leaving ----------------------------------------------------------------------------------------------
def test_the_inner_override_decides_and_the_outer_one_returns(ids):
    model = model_of("mixtral")
    plain = logits(model, ids)
    with routing_override(model, [1]):
        outer = logits(model, ids)
        with routing_override(model, [0, 1]):
            assert torch.equal(logits(model, ids), plain)
        with routing_override(model, [1], rows=[0]), routing_override(model, [0, 1], rows=slice(1, None)):
            mixed = logits(model, ids)
        assert torch.equal(logits(model, ids), outer)
    assert torch.equal(logits(model, ids), plain)
    torch.testing.assert_close(mixed, torch.cat([outer[:1], plain[1:]]), rtol=1e-5, atol=2e-6)


def test_recorders_inside_see_the_experts_and_outside_the_router(ids):
    model = model_of("mixtral")
    with torch.no_grad(), record_routing(model) as outside, routing_override(model, [1]):
        with record_routing(model) as inside:
            model(input_ids=ids)
    assert inside.layers[0].top_k_index[0].shape == (15, 1) and outside.layers[0].top_k_index[0].shape == (15, 2)
    assert torch.equal(inside.layers[0].top_k_index[0][:, 0], outside.layers[0].top_k_index[0][:, 1])


@pytest.mark.parametrize("family", ["mixtral", "moe_llama"])
def test_nothing_stays_behind_after_an_exception(family):
    model = model_of(family, "grouped_mm")
    before = traces(model)
    with pytest.raises(RuntimeError, match="stop"), routing_override(model, [1], rows=[0]):
        assert traces(model) != before
        raise RuntimeError("stop")
    assert traces(model) == before


def test_an_error_in_the_forward_leaves_nothing_behind(ids):
    model = model_of("mixtral")
    before = traces(model)
    with pytest.raises(ValueError, match=r"`rows` must lie in the batch, which has 3 rows, got \[3\]"):
        with routing_override(model, [1], rows=[3]):
            logits(model, ids)
    with pytest.raises(ValueError, match="`fn` must return weights and index of one shape"):
        with routing_override(model, fn=lambda view, routing, scores: (scores, scores[:3])):
            logits(model, ids)
    assert traces(model) == before


WRONG = [
    ({}, "exactly one of"),
    ({"ranks": [0], "top_m": 1}, r"exactly one of .* got \['ranks', 'top_m'\]"),
    ({"ranks": []}, "`ranks` must name at least one"),
    ({"ranks": [0, 8]}, r"`ranks` must be between 0 and 7: .*mlp has 8 experts. Got \[0, 8\]"),
    ({"ranks": [-1]}, "`ranks` must be between 0 and 7"),
    ({"ranks": [1, 1]}, "`ranks` must be different"),
    ({"ranks": [0.5]}, "`ranks` must be made of integers"),
    ({"top_m": 0}, "`top_m` must be between 1 and 8"),
    ({"top_m": 9}, "`top_m` must be between 1 and 8"),
    ({"random": 0}, "`random` must be between 1 and 8"),
    ({"threshold": 0.0}, "`threshold` is a probability"),
    ({"threshold": 1.0}, "`threshold` is a probability"),
    ({"fn": 3}, "`fn` must be a function"),
    ({"ranks": [0], "weights": "raw"}, "`weights` must be 'native' or 'renormalised', got 'raw'"),
    ({"ranks": [0], "rows": []}, "`rows` must name at least one row"),
    ({"ranks": [0], "layers": [2]}, "`layers` must name different MoE layers by their index, 0 to 1"),
    ({"ranks": [0], "layers": []}, "`layers` must name different"),
    ({"ranks": [0], "generator": torch.Generator()}, "`generator` is for `random` alone"),
]


@pytest.mark.parametrize("kwargs,message", WRONG, ids=[message[:30] for _, message in WRONG])
def test_wrong_arguments_are_refused_before_anything_is_hooked(kwargs, message):
    model = model_of("mixtral")
    before = traces(model)
    with pytest.raises(ValueError, match=message), routing_override(model, **kwargs):
        pass
    assert traces(model) == before


def test_a_dense_model_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="has no MoE layer"), routing_override(tiny_llama, [0]):
        pass


# -- compilation and wrappers -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["mixtral", pytest.param("moe_llama", marks=pytest.mark.slow)])
def test_compiled_models_obey(family, ids):
    model = tiny_model(family, num_hidden_layers=1)
    model.set_experts_implementation("grouped_mm")
    plain = logits(model, ids)
    with routing_override(model, [1], rows=[1]):
        expected = logits(model, ids)
        compiled = torch.compile(model, backend="eager", fullgraph=True)  # inside: hooks become part of the graph
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logits(compiled, ids), plain, rtol=1e-5, atol=2e-6)  # traced again without them
    with routing_override(compiled, [1], rows=[1]):  # compiled earlier
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logits(compiled, ids), plain, rtol=1e-5, atol=2e-6)


@peft_asks_old_name
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
        {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ],
    ids=["attention", "saved router", "router", "experts"],
)
def test_peft_wrappers_change_nothing_about_overrides(lora, ids):
    peft = pytest.importorskip("peft")
    model = model_of("mixtral")
    with routing_override(model, [1]):
        weak = logits(model, ids)
    plain = logits(model, ids)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **lora))  # an adapter of zeros
    before = traces(wrapped)
    with routing_override(wrapped, [1]):
        torch.testing.assert_close(logits(wrapped, ids), weak, rtol=1e-5, atol=2e-6)
    with routing_override(wrapped, [1], rows=[0, 1]):
        mixed = logits(wrapped, ids)
    torch.testing.assert_close(mixed, torch.cat([weak[:2], plain[2:]]), rtol=1e-5, atol=2e-6)
    assert traces(wrapped) == before


@peft_asks_old_name
def test_ranks_follow_a_router_that_lora_changed(ids):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=[], target_parameters=["mlp.gate.weight"], init_lora_weights=False)
    model = peft.get_peft_model(model_of("mixtral"), config)
    router_logits, _, _ = recorded(model, ids)
    with routing_override(model, [2]):
        changed, _, index = recorded(model, ids)
    assert torch.equal(changed, router_logits)
    assert torch.equal(index[:, 0], router_logits.argsort(dim=-1, descending=True)[:, 2])
