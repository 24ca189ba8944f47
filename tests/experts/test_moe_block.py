"""The block: what it adds up, and that its parts see what they should."""

import pytest
import torch
from torch.nn import functional as F

from hf_moe.layers import MoeBlock
from hf_moe.models.gpt2 import MoeGPT2Config
from hf_moe.models.llama import MoeLlamaConfig
from hf_moe.routing import RoutingContext


D, N = 16, 4
ZERO_COMPUTATION = {"num_constant_experts": 2, "num_copy_experts": 1, "num_zero_experts": 1}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def make_block(implementation="eager", config_class=MoeLlamaConfig, **fields) -> MoeBlock:
    sizes = {"hidden_size": D, "moe_intermediate_size": 24, "num_attention_heads": 2, "num_experts": N}
    if config_class is MoeGPT2Config:
        sizes = {"n_embd": D, "moe_intermediate_size": 24, "n_inner": 32, "n_head": 2, "num_experts": N}
    config = config_class(**{**sizes, "initializer_range": 0.4, **fields})
    config._experts_implementation = implementation
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MoeBlock(config, 0).eval()


def feed_forward(dense, x):
    """A gated or plain feed-forward out of the parameters of a `DenseExpert`."""
    state = dense.up_proj(x)
    state = dense.act_fn(dense.gate_proj(x)) * state if hasattr(dense, "gate_proj") else dense.act_fn(state)
    return dense.down_proj(state)


@pytest.fixture
def hidden_states(generator):
    return torch.randn(2, 9, D, generator=generator)


def test_a_plain_block_is_router_and_experts(hidden_states):
    block = make_block()
    output, state = block(hidden_states)
    tokens = hidden_states.view(-1, D)
    _, weights, index, *_ = block.gate(tokens)
    assert output.shape == hidden_states.shape and state is None
    assert torch.equal(output.view(-1, D), block.experts(tokens, index, weights))
    assert set(dict(block.named_children())) == {"gate", "experts"}


@pytest.mark.parametrize("fields", [{}, {"expert_type": "mlp"}, {"mlp_bias": True}], ids=["swiglu", "mlp", "bias"])
def test_shared_experts_are_added(fields, hidden_states):
    block = make_block(num_shared_experts=2, shared_expert_intermediate_size=8, **fields)
    plain = make_block(**fields)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if "shared" not in k})
    assert block.shared_experts.up_proj.weight.shape == (16, D)  # two of width 8
    expected = plain(hidden_states)[0] + feed_forward(block.shared_experts, hidden_states)
    torch.testing.assert_close(block(hidden_states)[0], expected)


def test_shared_gate_weighs_the_shared_experts_by_a_sigmoid(hidden_states):
    block = make_block(num_shared_experts=1, shared_expert_gate=True)
    plain = make_block(num_shared_experts=1)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if "shared_gate" not in k})
    shared = feed_forward(block.shared_experts, hidden_states)
    weight = torch.sigmoid(hidden_states @ block.shared_gate.weight.T)
    torch.testing.assert_close(block(hidden_states)[0], plain(hidden_states)[0] - shared + weight * shared)


def test_shared_experts_equal_qwen2_moes_block(hidden_states):
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=D, num_experts=N, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    )
    config.shared_expert_intermediate_size = 8
    config._experts_implementation = "eager"
    theirs = Qwen2MoeSparseMoeBlock(config)
    block = make_block(num_shared_experts=1, shared_expert_intermediate_size=8, shared_expert_gate=True)
    names = {"shared_experts.": "shared_expert.", "shared_gate.": "shared_expert_gate."}
    state = {}
    for name, value in block.state_dict().items():
        for ours, native in names.items():
            name = name.replace(ours, native)
        state[name] = value
    del state["gate.temperature"]
    theirs.load_state_dict(state)
    output = theirs(hidden_states)
    torch.testing.assert_close(block(hidden_states)[0], output[0] if isinstance(output, tuple) else output)


@pytest.mark.parametrize("config_class", [MoeLlamaConfig, MoeGPT2Config])
def test_residual_branch_mixes_experts_and_a_dense_expert_by_a_softmax(config_class, hidden_states):
    block = make_block(config_class=config_class, residual_expert=True)
    plain = make_block(config_class=config_class)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if "residual" not in k})
    moe, dense = plain(hidden_states)[0], feed_forward(block.residual_expert, hidden_states)
    c = block.residual_gate(hidden_states).softmax(-1)
    torch.testing.assert_close(c.sum(-1), torch.ones(2, 9))  # c_0 + c_1 = 1
    torch.testing.assert_close(block(hidden_states)[0], c[..., :1] * moe + c[..., 1:] * dense)
    # The dense branch has the width of the dense model's feed-forward, whatever the experts'.
    assert block.residual_expert.up_proj.out_features == block.experts.config.intermediate_width
    for bias, expected in ((torch.tensor([50.0, -50.0]), moe), (torch.tensor([-50.0, 50.0]), dense)):
        torch.nn.init.zeros_(block.residual_gate.weight)
        block.residual_gate.bias.data = bias
        torch.testing.assert_close(block(hidden_states)[0], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("router_type", ["softmax_topk", "sigmoid_topk", "gating_residual"])
def test_zero_computation_experts_join_under_every_router(implementation, router_type, hidden_states):
    block = make_block(implementation, router_type=router_type, **ZERO_COMPUTATION)
    tokens = hidden_states.view(-1, D)
    _, weights, index, *_ = block.gate(tokens)
    matrix = torch.zeros(18, N + 4).scatter_add(-1, index, weights)
    assert matrix[:, :N].any() and matrix[:, N:].any()
    eager = make_block("eager", router_type=router_type, **ZERO_COMPUTATION)
    rows = torch.arange(18)
    ffn = sum(matrix[:, e : e + 1] * eager.experts(tokens, rows[:, None] * 0 + e, torch.ones(18, 1)) for e in range(N))
    constant = 0.0
    for c in range(2):
        a = F.linear(tokens, block.zero_experts.constant_gate[c]).softmax(-1)
        value = a[:, :1] * tokens + a[:, 1:] * block.zero_experts.constants[c]
        constant = constant + matrix[:, N + c, None] * value
    expected = ffn + constant + matrix[:, N + 2, None] * tokens
    torch.testing.assert_close(block(hidden_states)[0].view(-1, D), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fields", [{}, ZERO_COMPUTATION], ids=["plain", "zero_computation"])
def test_padding_gets_exactly_zero_and_keeps_every_parameter_in_the_graph(implementation, fields, hidden_states):
    block = make_block(implementation, **fields).train()
    context = RoutingContext(token_mask=torch.zeros(18, dtype=torch.bool))
    output, _ = block(hidden_states, context)
    assert (output == 0).all()
    output.sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_the_block_hands_the_router_state_on(hidden_states):
    block = make_block(router_type="gating_residual", moe_layers=[0])
    output, state = block(hidden_states, RoutingContext(prev_state=torch.zeros(18, N)))
    assert torch.equal(state, block.gate(hidden_states).router_logits) and output.shape == hidden_states.shape


@pytest.mark.parametrize("fields", [{}, ZERO_COMPUTATION, {"num_shared_experts": 1, "residual_expert": True}], ids=str)
def test_half_precision_stays_half_precision(fields, hidden_states):
    block = make_block("grouped_mm", **fields).to(torch.bfloat16)
    block.gate.float()
    output, _ = block(hidden_states.bfloat16())
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    exact = make_block(**fields)
    torch.testing.assert_close(output.float(), exact(hidden_states)[0], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # inside transformers
def test_the_whole_block_compiles_without_graph_breaks(implementation, hidden_states):
    fields = {**ZERO_COMPUTATION, "num_shared_experts": 1, "residual_expert": True, "expert_capacity_factor": 0.8}
    block = make_block(implementation, router_type="gating_residual", **fields).train()
    context = RoutingContext(token_mask=torch.arange(18) > 2)
    expected, expected_state = block(hidden_states, context)
    try:
        output, state = torch.compile(block, fullgraph=True, backend="aot_eager")(hidden_states, context)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(state, expected_state)
    wanted = torch.autograd.grad(expected.sum(), list(block.parameters()))
    for gradient, reference in zip(torch.autograd.grad(output.sum(), list(block.parameters())), wanted, strict=True):
        torch.testing.assert_close(gradient, reference)
