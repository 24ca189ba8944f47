"""Expert banks under every implementation against the definition: y_t = sum_e w_te E_e(x_t).

Shapes: T tokens, D hidden, I intermediate, N experts, K per token.
"""

import pytest
import torch
from torch.nn import functional as F

from hf_moe.experts import StackedExperts, build_experts, list_experts, register_experts
from hf_moe.experts.registry import EXPERTS, experts_class
from hf_moe.models.llama import MoeLlamaConfig


D, INNER, N, K = 16, 24, 4, 2
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 3e-2}}

every_bank = pytest.mark.parametrize("expert_type", list_experts())
# Rounding makes another function, whose gradient is not its own derivative: see test_ternary.py.
unrounded_bank = pytest.mark.parametrize("expert_type", [name for name in list_experts() if name != "ternary"])
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def make_config(expert_type="swiglu", implementation="eager", **fields):
    sizes = {"hidden_size": D, "moe_intermediate_size": INNER, "num_experts": N, "num_attention_heads": 2}
    config = MoeLlamaConfig(**{**sizes, "expert_type": expert_type, **fields})
    config._experts_implementation = implementation
    return config


def make_bank(expert_type, implementation, dtype=torch.float32, **fields) -> StackedExperts:
    """The same values for every implementation; biases are not zero."""
    bank = build_experts(make_config(expert_type, implementation, **fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bank.parameters():
            scale = 0.5 if parameter.dim() == 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return bank.to(dtype)


def reference(bank, hidden_states, index, weights) -> torch.Tensor:
    """Every expert on every token, weighed by the matrix of weights."""
    matrix = weights.new_zeros(index.shape[0], N + 1).scatter_add(-1, index, weights)[:, :-1]  # (T, N)
    total = torch.zeros_like(hidden_states)
    for e in range(N):
        name = "gate_up_proj" if bank.gated else "up_proj"
        bias = getattr(bank, f"{name}_bias", None)
        state = F.linear(hidden_states, getattr(bank, name)[e], None if bias is None else bias[e])
        if bank.gated:
            gate, up = state[:, : state.shape[-1] // 2], state[:, state.shape[-1] // 2 :]
            state = bank.act_fn(gate) * up
        else:
            state = bank.act_fn(state)
        bias = getattr(bank, "down_proj_bias", None)
        state = F.linear(state, bank.down_proj[e], None if bias is None else bias[e])
        total = total + matrix[:, e : e + 1] * state
    return total


def routing(kind, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`index, weights` of the kind a router may produce."""
    tokens = {"no_tokens": 0, "one_token": 1}.get(kind, 21)
    slots = N if kind == "fully_dense" else 3 if kind == "three_slots" else K
    index = torch.rand(tokens, N, generator=generator).topk(slots).indices
    weights = torch.rand(tokens, slots, generator=generator).sort(descending=True).values
    if kind == "empty_slots":  # as top-p gives them: some tokens with one slot, some with none
        active = torch.randint(0, slots + 1, (tokens, 1), generator=generator)
        empty = torch.arange(slots) >= active
        index, weights = index.masked_fill(empty, N), weights.masked_fill(empty, 0.0)
    elif kind == "all_empty":
        index, weights = torch.full_like(index, N), torch.zeros_like(weights)
    elif kind == "repeated_expert":
        index[::2, 1] = index[::2, 0]
    elif kind == "one_expert_only":
        index = torch.where(index == index, 2, index)
        index[:, 1], weights[:, 1] = N, 0.0
    elif kind == "empty_first":  # the contract sorts empty slots last; the kernels must not need it
        index[:, 0], weights[:, 0] = N, 0.0
    return index, weights


KINDS = (
    "random",
    "three_slots",
    "empty_slots",
    "empty_first",
    "all_empty",
    "fully_dense",
    "repeated_expert",
    "one_expert_only",
    "no_tokens",
    "one_token",
)


def run(function, bank, hidden_states, index, weights):
    """Output and its gradients for input, weights and parameters."""
    hidden_states, weights = hidden_states.detach().requires_grad_(), weights.detach().requires_grad_()
    output = function(hidden_states, index, weights)
    coefficients = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    inputs = [hidden_states, weights, *bank.parameters()]
    gradients = torch.autograd.grad((output * coefficients).sum(), inputs, allow_unused=True)
    names = ["hidden_states", "top_k_weights", *dict(bank.named_parameters())]
    return output, dict(zip(names, gradients, strict=True))


def assert_equals_reference(bank, hidden_states, index, weights, call=None):
    dtype = hidden_states.dtype
    output, gradients = run(bank if call is None else call, bank, hidden_states, index, weights)
    assert output.dtype == dtype and output.shape == hidden_states.shape
    exact = make_bank(bank.expert_type, "eager")
    exact.load_state_dict(bank.state_dict())
    exact = exact.double()

    def definition(*args):
        return reference(exact, *args)

    expected, wanted = run(definition, exact, hidden_states.double(), index, weights.double())
    torch.testing.assert_close(output.double(), expected, **TOLERANCE[dtype])
    for name, gradient in gradients.items():
        if gradient is None and not (index < N).any():
            continue  # as good as zeros here; that parameters stay in the graph has a test of its own
        assert gradient.isfinite().all(), name
        # Sums over many tokens: their rounding errors are relative to the largest entry.
        largest = max([1.0, *wanted[name].abs().flatten().tolist()])
        tolerance = {**TOLERANCE[dtype], "atol": largest * TOLERANCE[dtype]["atol"]}
        if name == "top_k_weights":
            # The weight of an empty slot is a constant 0 made by the router: no gradient may reach it.
            assert not gradient[index == N].any()
        torch.testing.assert_close(
            gradient.double(), wanted[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(autouse=True)
def _no_compiled_code_is_left():
    yield
    torch._dynamo.reset()


# -- values and gradients --------------------------------------------------------------------------------------------
@unrounded_bank
@every_implementation
@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_definition(expert_type, implementation, dtype, kind, generator):
    bank = make_bank(expert_type, implementation, dtype)
    index, weights = routing(kind, generator)
    hidden_states = torch.randn(index.shape[0], D, generator=generator).to(dtype)
    assert_equals_reference(bank, hidden_states, index, weights.to(dtype))


@every_bank
@every_implementation
@every_dtype
def test_nothing_routed_gives_exactly_zero_and_zero_gradients(expert_type, implementation, dtype, generator):
    bank = make_bank(expert_type, implementation, dtype)
    index, weights = routing("all_empty", generator)
    hidden_states = torch.randn(index.shape[0], D, generator=generator).to(dtype)
    output = bank(hidden_states, index, weights.to(dtype))
    assert (output == 0).all() and output.requires_grad  # in the graph: DDP must see every parameter used
    output.sum().backward()
    for name, parameter in bank.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    with torch.no_grad():
        assert (bank(hidden_states, index, weights.to(dtype)) == 0).all()


@every_bank
@every_implementation
def test_large_values_of_tokens_without_experts_change_nothing(expert_type, implementation, generator):
    bank = make_bank(expert_type, implementation)
    index, weights = routing("empty_slots", generator)
    hidden_states = torch.randn(index.shape[0], D, generator=generator)
    unrouted = (index == N).all(-1)
    assert unrouted.any() and not unrouted.all()
    expected, wanted = run(bank, bank, hidden_states, index, weights)
    hidden_states[unrouted] = 1e4
    output, gradients = run(bank, bank, hidden_states, index, weights)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name])


@every_bank
@every_implementation
def test_order_of_slots_and_added_empty_slots_change_nothing(expert_type, implementation, generator):
    bank = make_bank(expert_type, implementation)
    index, weights = routing("three_slots", generator)
    hidden_states = torch.randn(index.shape[0], D, generator=generator)
    expected, wanted = run(bank, bank, hidden_states, index, weights)
    padded_index = F.pad(index, (0, 2), value=N)
    padded_weights = F.pad(weights, (0, 2))
    order = torch.tensor([3, 1, 4, 0, 2])
    for columns, slots in ((torch.tensor([2, 0, 1]), 3), (torch.arange(5), 5), (order, 5)):
        output, gradients = run(
            bank, bank, hidden_states, padded_index[:, columns].contiguous(), padded_weights[:, columns]
        )
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        gradients["top_k_weights"] = gradients["top_k_weights"][:, columns.argsort()][:, :3]
        assert slots == len(columns)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=2e-6)


@every_bank
@every_implementation
def test_non_contiguous_inputs_are_read_correctly(expert_type, implementation, generator):
    bank = make_bank(expert_type, implementation)
    index, weights = routing("random", generator)
    hidden_states = torch.randn(index.shape[0], D, generator=generator)
    strided = [tensor.T.contiguous().T for tensor in (hidden_states, index, weights)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    torch.testing.assert_close(bank(*strided), bank(hidden_states, index, weights))


@every_implementation
def test_inputs_are_not_changed_in_place(implementation, generator):
    bank = make_bank("swiglu_bias", implementation)
    inputs = (torch.randn(21, D, generator=generator), *routing("empty_slots", generator))
    before = [tensor.clone() for tensor in inputs]
    bank(*inputs)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


@unrounded_bank
def test_eager_gradients_pass_gradcheck(expert_type, generator):
    bank = make_bank(expert_type, "eager", torch.float64, hidden_size=4, moe_intermediate_size=3)
    index, weights = routing("empty_slots", generator)
    index, weights = index[:6], weights[:6].double().requires_grad_()
    hidden_states = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*bank.named_parameters(), strict=True)
    assert (index == N).any() and (index < N).any()

    def function(hidden_states, weights, *values):
        # A weight of an empty slot is a constant 0, so it may not vary here either.
        masked = weights.masked_fill(index == N, 0.0)
        arguments = (hidden_states, index, masked)
        return torch.func.functional_call(bank, dict(zip(names, values, strict=True)), arguments)

    assert torch.autograd.gradcheck(function, (hidden_states, weights, *parameters))


@unrounded_bank
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@every_dtype
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # inside transformers
def test_compiles_without_graph_breaks(expert_type, implementation, dtype, generator):
    bank = make_bank(expert_type, implementation, dtype)
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager")
    for kind in ("empty_slots", "all_empty"):
        index, weights = routing(kind, generator)
        hidden_states = torch.randn(index.shape[0], D, generator=generator).to(dtype)
        assert_equals_reference(bank, hidden_states, index, weights.to(dtype), call=compiled)


@every_implementation
def test_autocast_runs_the_experts_in_half_precision(implementation, generator):
    bank = make_bank("swiglu", implementation)
    index, weights = routing("empty_slots", generator)
    hidden_states = torch.randn(index.shape[0], D, generator=generator)
    expected = bank(hidden_states, index, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, gradients = run(bank, bank, hidden_states, index, weights)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=3e-2, check_dtype=False)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@every_implementation
def test_one_expert_is_a_dense_feed_forward(implementation, generator):
    bank = make_bank("swiglu", implementation, num_experts=1, num_experts_per_tok=1)
    hidden_states = torch.randn(9, D, generator=generator)
    index, weights = torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1)
    index[4:6], weights[4:6] = 1, 0.0
    gate, up = F.linear(hidden_states, bank.gate_up_proj[0]).chunk(2, dim=-1)
    expected = F.linear(bank.act_fn(gate) * up, bank.down_proj[0])
    expected[4:6] = 0.0
    torch.testing.assert_close(bank(hidden_states, index, weights), expected)


# -- names, shapes, registry -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("expert_type", "shapes"),
    [
        ("swiglu", {"gate_up_proj": (N, 2 * INNER, D), "down_proj": (N, D, INNER)}),
        ("mlp", {"up_proj": (N, INNER, D), "down_proj": (N, D, INNER)}),
        (
            "swiglu_bias",
            {
                "gate_up_proj": (N, 2 * INNER, D),
                "down_proj": (N, D, INNER),
                "gate_up_proj_bias": (N, 2 * INNER),
                "down_proj_bias": (N, D),
            },
        ),
        (
            "mlp_bias",
            {
                "up_proj": (N, INNER, D),
                "down_proj": (N, D, INNER),
                "up_proj_bias": (N, INNER),
                "down_proj_bias": (N, D),
            },
        ),
    ],
)
def test_parameters_have_the_names_that_plans_quantizers_and_peft_look_for(expert_type, shapes):
    bank = build_experts(make_config(expert_type))
    assert {name: tuple(parameter.shape) for name, parameter in bank.named_parameters()} == shapes
    assert isinstance(bank, experts_class(expert_type)) and bank.expert_type == expert_type


@every_bank
def test_initial_values_follow_the_config(expert_type):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bank = build_experts(make_config(expert_type, initializer_range=0.3))
    for name, parameter in bank.named_parameters():
        if name.endswith("_bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.3, rel=0.1)


def test_activation_is_the_configs():
    assert type(build_experts(make_config(hidden_act="gelu")).act_fn) is not type(build_experts(make_config()).act_fn)


def test_unknown_banks_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"`expert_type='swigl'` .* Choose one of \[.*Did you mean 'swiglu'"):
        make_config("swigl")


def test_banks_of_users_are_looked_up_like_ours():
    experts_class("mlp")

    @register_experts("test_negated")
    class NegatedExperts(experts_class("mlp")):
        """-E(x)."""

        def forward(self, *args):
            return -super().forward(*args)

    try:
        assert "test_negated" in list_experts()
        bank = make_bank("test_negated", "eager")
        index, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
        plain = make_bank("mlp", "eager")
        assert torch.equal(bank(torch.ones(3, D), index, weights), -plain(torch.ones(3, D), index, weights))
        with pytest.raises(ValueError, match="`expert_type='mlp'` is already taken by MlpExperts"):
            register_experts("mlp")(NegatedExperts)
    finally:
        del EXPERTS["test_negated"]
