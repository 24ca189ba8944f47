from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from hf_moe.models.moe_plus_plus import MoePlusPlusConfig, MoePlusPlusForCausalLM
from hf_moe.routing import RoutingContext


IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
# Feed-forward, constant, copy and zero experts of `make_model`.
FFN, CONSTANT, COPY, ZERO = slice(0, 4), slice(4, 6), 6, 7


def make_config(**changes):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_experts": 4,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    return MoePlusPlusConfig(**{**sizes, **changes})


def make_model(implementation="eager", **changes):
    """Random weights, the residual maps included, which would start at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MoePlusPlusForCausalLM._from_config(
            make_config(**changes), experts_implementation=implementation, attn_implementation="eager"
        )
    for _, block in model.moe_blocks():
        if block.gate.residual_weight is not None:
            with torch.no_grad():
                block.gate.residual_weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.fixture
def input_ids(generator):
    return torch.randint(1, 64, (2, 9), generator=generator)


def record_gates(model):
    """Fills a list with (prev_state, RouterOutput) of every gate, in the order they run."""
    calls = []
    for _, block in model.moe_blocks():
        block.gate.register_forward_hook(lambda _, args, out: calls.append((args[1].prev_state, out)))
    return calls


# -- the configuration -----------------------------------------------------------------------------------------------
def test_defaults_are_the_papers():
    config = MoePlusPlusConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (12, 768, 2048)
    assert (config.num_experts, config.num_experts_per_tok, config.num_zero_computation_experts) == (8, 2, 4)
    assert (config.num_zero_experts, config.num_copy_experts, config.num_constant_experts) == (1, 1, 2)
    assert (config.router_tau, config.expert_capacity_factor, config.router_aux_loss_coef) == (0.75, 1.1, 0.01)
    assert config.moe_layer_indices == list(range(12))


@pytest.mark.parametrize(("num_experts", "num_constant"), [(8, 1), (16, 2), (32, 6)])
def test_number_of_constant_experts_follows_equation_10(num_experts, num_constant):
    assert MoePlusPlusConfig(num_experts=num_experts, num_constant_experts=None).num_constant_experts == num_constant


def test_zero_computation_experts_add_few_parameters():
    def count(**changes):
        return sum(p.numel() for p in make_model(**changes).parameters())

    plain = count(num_zero_experts=0, num_copy_experts=0, num_constant_experts=0, router_config={"residual": False})
    # per layer: 2 constants of D, 2 gates of 2 D, 4 more router rows of D; N x N residual maps from the second on
    assert count() - plain == 4 * (2 * 32 + 2 * 2 * 32 + 4 * 32) + 3 * 8 * 8


# -- the block -------------------------------------------------------------------------------------------------------
def reference_block(block, x, prev_state):
    """The layer as the paper writes it, a token at a time: (y, G)."""
    gate, experts, zero = block.gate, block.experts, block.zero_experts
    logits = x @ gate.weight.T
    if gate.residual_weight is not None and prev_state is not None:
        logits = logits + prev_state @ gate.residual_weight.T
    rows = []
    for token, p in zip(x, logits.softmax(-1), strict=True):
        outputs = []
        for i in range(experts.num_experts):
            up, gated = (experts.gate_up_proj[i] @ token).flip(0).chunk(2)
            outputs.append(experts.down_proj[i] @ (F.silu(gated.flip(0)) * up.flip(0)))
        for c in range(zero.num_constant):
            a = (zero.constant_gate[c] @ token).softmax(0)
            outputs.append(a[0] * token + a[1] * zero.constants[c])
        outputs += [token] * zero.num_copy + [torch.zeros_like(token)] * zero.num_zero
        rows.append(sum(p[i] * outputs[i] for i in p.topk(gate.top_k).indices))
    return torch.stack(rows), logits


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_block_equals_the_papers_sum(implementation, generator):
    block = make_model(implementation).model.layers[1].mlp
    x = torch.randn(1, 30, 32, generator=generator)
    prev_state = torch.randn(30, 8, generator=generator)
    output, state = block(x, RoutingContext(prev_state=prev_state))
    expected, logits = reference_block(block, x[0], prev_state)
    torch.testing.assert_close(output[0], expected)
    torch.testing.assert_close(state, logits)
    chosen = block.gate(x[0], RoutingContext(prev_state=prev_state)).top_k_index
    for kind in (FFN, CONSTANT, COPY, ZERO):  # the test saw every kind of expert
        assert torch.isin(chosen, torch.arange(8)[kind]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_block_gradients_equal_those_of_the_papers_sum(implementation, generator):
    block = make_model(implementation).model.layers[1].mlp
    x = torch.randn(1, 30, 32, generator=generator, requires_grad=True)
    prev_state = torch.randn(30, 8, generator=generator, requires_grad=True)
    inputs = (x, prev_state, *block.parameters())
    output, _ = block(x, RoutingContext(prev_state=prev_state))
    ours = torch.autograd.grad(output.sin().sum(), inputs)
    theirs = torch.autograd.grad(reference_block(block, x[0], prev_state)[0].sin().sum(), inputs)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_, theirs_, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_and_copy_alone_give_p_copy_times_x_and_no_expert_gradient(implementation, generator):
    block = make_model(implementation, router_config={"bias": True}).model.layers[0].mlp
    with torch.no_grad():
        block.gate.bias[COPY:] = 50.0
    x = torch.randn(1, 12, 32, generator=generator)
    output, logits = block(x)
    p_copy = logits.softmax(-1)[:, COPY, None]
    torch.testing.assert_close(output[0], p_copy * x[0])
    output.sum().backward()
    for parameter in (*block.experts.parameters(), *block.zero_experts.parameters()):
        assert parameter.grad is None or parameter.grad.eq(0).all()
    assert block.gate.weight.grad.ne(0).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scaled_expert_input_reaches_copy_and_constant_experts_too(implementation, generator):
    # The released code multiplies what the experts get, all of them, but not what the router gets.
    x = torch.randn(20, 32, generator=generator)
    plain = make_model(implementation).model.layers[0].mlp
    scaled = make_model(implementation, scale_expert_input=True).model.layers[0].mlp
    _, weights, index, *_ = plain.gate(x)
    torch.testing.assert_close(scaled(x[None])[0][0], plain.mix(2 * x, index, weights))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_compiled_block_equals_eager_in_one_graph(implementation, generator):
    block = make_model(implementation).model.layers[1].mlp
    x = torch.randn(1, 30, 32, generator=generator)
    context = RoutingContext(prev_state=torch.randn(30, 8, generator=generator))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    try:
        for ours, expected in zip(compiled(x, context), block(x, context), strict=True):
            torch.testing.assert_close(ours, expected)
    finally:
        torch._dynamo.reset()


# -- the state -------------------------------------------------------------------------------------------------------
def test_each_layer_gets_the_complete_scores_of_the_one_before(input_ids):
    model = make_model()
    calls = record_gates(model)
    model(input_ids)
    assert calls[0][0] is None
    for (_, before), (prev_state, _) in pairwise(calls):
        assert torch.equal(prev_state, before.router_logits)


@pytest.mark.parametrize(("moe_layers", "first"), [("every:2", 1), ([0, 3], 0), ([2], 2)])
def test_dense_layers_hand_the_state_on_unchanged(moe_layers, first, input_ids):
    model = make_model(moe_layers=moe_layers)
    assert model.model.layers[first].mlp.gate.residual_weight is None
    calls = record_gates(model)
    output = model(input_ids, output_router_logits=True)
    assert len(output.router_logits) == len(calls) == len(model.config.moe_layer_indices)
    assert calls[0][0] is None
    for (_, before), (prev_state, _) in pairwise(calls):
        assert torch.equal(prev_state, before.router_logits)


def test_zero_residual_weights_equal_a_model_without_residuals(input_ids):
    model, plain = make_model(), make_model(router_config={"residual": False})
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing.missing_keys == [] and all("residual_weight" in key for key in missing.unexpected_keys)
    assert not torch.equal(model(input_ids).logits, plain(input_ids).logits)
    for _, block in model.moe_blocks()[1:]:
        torch.nn.init.zeros_(block.gate.residual_weight)
    assert torch.equal(model(input_ids).logits, plain(input_ids).logits)


def test_decoding_with_a_cache_needs_no_stored_state(input_ids):
    model = make_model()
    full = model(input_ids).logits
    cache, steps = None, []
    for position in range(input_ids.shape[1]):
        output = model(input_ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=1e-5)


def test_left_padding_does_not_change_a_row(input_ids):
    model = make_model()
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    padded = model(input_ids.masked_fill(mask == 0, 0), attention_mask=mask).logits[0, 4:]
    torch.testing.assert_close(padded, model(input_ids[:1, 4:]).logits[0], atol=1e-5, rtol=1e-5)


# -- training --------------------------------------------------------------------------------------------------------
def gradients(model, input_ids):
    model.zero_grad()
    output = model(input_ids, labels=input_ids)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradient_checkpointing_gives_the_same_gradients(implementation, input_ids):
    model = make_model(implementation).train()
    loss, plain = gradients(model, input_ids)
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    checkpointed_loss, checkpointed = gradients(model, input_ids)
    assert torch.equal(loss, checkpointed_loss)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    for _, block in model.moe_blocks()[1:]:
        assert block.gate.residual_weight.grad.ne(0).any()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_reentrant_checkpointing_is_refused(method):
    with pytest.raises(ValueError, match="use_reentrant"):
        getattr(make_model(), method)({"use_reentrant": True})


def test_the_first_router_is_trained_through_the_state(input_ids):
    # Its own choice is detached here, so whatever gradient arrives came through W^g of the second layer.
    model = make_model(num_hidden_layers=2, router_aux_loss_coef=0.0).train()
    first = model.model.layers[0].mlp
    mix = first.mix
    first.mix = lambda tokens, index, weights: mix(tokens, index, weights.detach())
    _, with_residual = gradients(model, input_ids)
    assert with_residual["model.layers.0.mlp.gate.weight"].ne(0).any()
    torch.nn.init.zeros_(model.model.layers[1].mlp.gate.residual_weight)
    _, without = gradients(model, input_ids)
    assert without["model.layers.0.mlp.gate.weight"].eq(0).all()


def test_balance_loss_is_the_papers_times_n_over_k_through_the_model(input_ids):
    # The load balancer's convention is N sum eta f P with sum f = 1; the paper's L_b has sum f = K and no N.
    model = make_model(expert_capacity_factor=None).train()
    with torch.no_grad():
        output = model(input_ids, labels=input_ids, output_router_logits=True)
    values = []
    for logits, index in zip(output.router_logits, output.router_indices, strict=True):
        f = F.one_hot(index, 8).sum(1).float().mean(0)
        eta = torch.tensor([1.0] * 4 + [0.75] * 4)
        values.append((eta * f * logits.softmax(-1).mean(0)).sum())
    torch.testing.assert_close(output.aux_loss, torch.stack(values).mean() * 8 / 2)
    model.config.router_aux_loss_coef = 0.0
    with torch.no_grad():
        cross_entropy = model(input_ids, labels=input_ids).loss
    torch.testing.assert_close(output.loss, cross_entropy + 0.01 * output.aux_loss)


def test_capacity_drops_assignments_in_training_only(input_ids):
    tight, dropless = make_model(expert_capacity_factor=0.5), make_model(expert_capacity_factor=None)
    assert torch.equal(tight(input_ids).logits, dropless(input_ids).logits)
    indices = dropless.train()(input_ids, output_router_logits=True).router_indices
    assert all((index < 8).all() for index in indices)
    index = tight.train()(input_ids, output_router_logits=True).router_indices[0]
    counts = F.one_hot(index, 9).sum((0, 1))
    capacity = 0.5 * 36 / (0.75 * 4 + 4)  # 36 assignments; ranks below C stay, so ceil(C) of them
    assert counts[8] > 0
    assert (counts[:4] <= -(-0.75 * capacity // 1)).all() and (counts[4:8] <= -(-capacity // 1)).all()


def test_two_steps_of_training_change_every_parameter(input_ids):
    model = make_model().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_bfloat16_keeps_the_router_in_float32(input_ids, tmp_path):
    make_model().save_pretrained(tmp_path)
    model = MoePlusPlusForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".gate." in name else torch.bfloat16), name
    output = model(input_ids, output_router_logits=True)
    assert output.logits.dtype == torch.bfloat16 and output.router_logits[0].dtype == torch.float32
    assert output.logits.isfinite().all()


def test_saved_and_reloaded_model_gives_the_same_logits(input_ids, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(moe_layers="every:2", router_config={"num_layers_gate": 2, "bias": True})
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is MoePlusPlusForCausalLM
    torch.testing.assert_close(reloaded(input_ids).logits, model(input_ids).logits)
