"""PR-MoE: sizes of the paper's models, the residual expert, and what its gate does in training and at evaluation."""

import pytest
import torch
from common.model_battery import make_config, make_inputs, make_model, seeded
from torch import nn
from transformers import AutoModelForCausalLM

from hf_moe import MoeBlock, PrMoeConfig, PrMoeForCausalLM
from hf_moe.experts.dense import DenseExpert


D = 16


def expert_parameters(config):
    with torch.device("meta"):
        blocks = PrMoeForCausalLM(config).moe_blocks()
    return sum(parameter.numel() for _, block in blocks for parameter in block.experts.parameters())


# -- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("width", "counts", "billions"),
    [
        (1024, [128] * 12, 12.89),
        (1024, [32] * 10 + [64] * 2, 3.76),
        (1024, [32] * 8 + [64] * 2, 3.22),
        (2048, [128] * 12, 51.6),
        (2048, [64] * 10 + [128] * 2, 30.1),
        (2048, [64] * 8 + [128] * 2, 25.8),
    ],
)
def test_expert_parameters_are_the_papers(width, counts, billions):
    layers = 24 if len(counts) == 12 else 21
    config = PrMoeConfig(n_embd=width, n_layer=layers, num_experts=counts)
    found = expert_parameters(config)
    assert found == sum(counts) * (8 * width**2 + 5 * width)
    assert found / 1e9 == pytest.approx(billions, rel=2e-3)


def test_the_defaults_are_the_papers_350m_base():
    config = PrMoeConfig()
    assert config.num_experts == [32] * 10 + [64] * 2 and config.moe_layer_indices == list(range(1, 24, 2))
    with torch.device("meta"):
        model = PrMoeForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(4.1, abs=0.15)
    assert model.moe_blocks()[0][1].gate.capacity_policy == "random"


def test_the_pyramid_doubles_the_last_layers():
    sizes = {"n_embd": 32, "n_head": 4}
    assert PrMoeConfig.pyramid(4, n_layer=8, **sizes).num_experts == [4, 4, 8, 8]
    assert PrMoeConfig.pyramid(4, 1, n_layer=8, **sizes).num_experts == [4, 4, 4, 8]
    assert PrMoeConfig.pyramid(4, 0, n_layer=4, moe_layers="all", **sizes).num_experts == [4] * 4
    assert PrMoeConfig.pyramid(4, n_layer=8, num_experts_per_tok=2, **sizes).num_experts_per_tok == 2
    assert PrMoeConfig(n_layer=2, **sizes).num_experts == [64]  # no room for more than the last
    with pytest.raises(ValueError, match=r"`wide_layers` must be between 0 and the number of MoE layers \(1\), got 2"):
        PrMoeConfig.pyramid(4, n_layer=2, **sizes)


# -- the residual expert ---------------------------------------------------------------------------------------------
def residual_block(combine="softmax", **fields) -> MoeBlock:
    config = make_config("pr_moe", n_embd=D, n_inner=24, num_experts_per_tok=1, residual_combine=combine, **fields)
    with seeded():
        block = MoeBlock(config, 0).eval()
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
    return block


def parts(block, x):
    """What the experts and the dense branch give by themselves."""
    _, weights, index, *_ = block.gate(x)
    return block.mix(x.flatten(0, 1), index, weights), block.residual_expert(x.flatten(0, 1))


@pytest.fixture
def x(generator):
    return torch.randn(2, 5, D, generator=generator)


def test_a_gate_of_zeros_gives_the_mean(x):
    block = residual_block()
    nn.init.zeros_(block.residual_gate.weight)
    nn.init.zeros_(block.residual_gate.bias)
    experts, dense = parts(block, x)
    torch.testing.assert_close(block(x)[0].flatten(0, 1), (experts + dense) / 2)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.tensor(value)

    def forward(self, tokens, *_):
        return self.value.expand(tokens.shape[0], -1)


def test_the_mean_of_two_known_outputs():
    block = residual_block()
    nn.init.zeros_(block.residual_gate.weight)
    nn.init.zeros_(block.residual_gate.bias)
    rest = [0.0] * (D - 2)
    block.residual_expert, block.mix = Constant([3.0, -1.0, *rest]), Constant([1.0, 2.0, *rest]).forward
    assert block(torch.randn(1, 1, D))[0].flatten()[:2].tolist() == [2.0, 0.5]


def test_a_closed_gate_leaves_the_dense_branch_exactly(x):
    block = residual_block()
    with torch.no_grad():
        block.residual_gate.weight.zero_()
        block.residual_gate.bias.copy_(torch.tensor([-torch.inf, 0.0]))
    assert torch.equal(block(x)[0].flatten(0, 1), parts(block, x)[1])


def test_experts_and_branch_of_the_same_weights_are_one_feed_forward(x):
    block = residual_block()
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            linear = getattr(block.residual_expert, name)
            getattr(block.experts, name).copy_(linear.weight.expand(4, -1, -1))
            getattr(block.experts, f"{name}_bias").copy_(linear.bias.expand(4, -1))
    c = block.residual_gate(x).softmax(-1)
    p = block.gate(x).top_k_weights.view(2, 5, 1)  # of top-1, not renormalised
    assert p.max() < 0.99
    torch.testing.assert_close(block(x)[0], (c[..., :1] * p + c[..., 1:]) * block.residual_expert(x))


def test_the_sum_has_no_gate_and_adds(x):
    block = residual_block("sum")
    assert block.residual_gate is None
    experts, dense = parts(block, x)
    torch.testing.assert_close(block(x)[0].flatten(0, 1), experts + dense)


def test_another_combination_is_refused():
    with pytest.raises(ValueError, match=r"`residual_combine` must be one of \['softmax', 'sum'\], got 'mean'"):
        make_config("pr_moe", residual_combine="mean")


# -- the gate --------------------------------------------------------------------------------------------------------
def test_tokens_are_dropped_at_random_in_training_and_never_at_evaluation():
    model = make_model("pr_moe", num_experts_per_tok=1, expert_capacity_factor=1.0, num_experts=2)
    inputs = make_inputs()
    assert all((index < 2).all() for index in model(**inputs, output_router_logits=True).router_indices)
    model.train()
    with seeded():
        runs = [model(**inputs, output_router_logits=True).router_indices[0] for _ in range(4)]
    assert all((index < 2).sum(0) <= 16 and torch.bincount(index[index < 2]).max() <= 8 for index in runs)
    assert any(not torch.equal(runs[0], other) for other in runs[1:])


def test_a_token_alone_is_as_in_a_batch():
    model = make_model("pr_moe", num_experts_per_tok=1, num_experts=[4, 8])
    inputs = make_inputs()
    together = model(**inputs).logits
    alone = torch.cat([model(input_ids=row[None]).logits for row in inputs["input_ids"]])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_weights_of_the_default_gate_are_the_probabilities():
    model = make_model("pr_moe", num_experts_per_tok=1)
    router, x = model.moe_blocks()[0][1].gate, torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    out = router(x)
    torch.testing.assert_close(out.top_k_weights, out.router_logits.softmax(-1).max(-1, keepdim=True).values)


# -- the whole -------------------------------------------------------------------------------------------------------
def test_a_pyramid_learns_saves_and_reloads(tmp_path):
    config = make_config("pr_moe", n_layer=4, moe_layers="every:2", num_experts=[2, 4], expert_capacity_factor=1.0)
    with seeded():
        model = PrMoeForCausalLM(config).train()
        inputs = make_inputs(batch=4, sequence=16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_experts == [2, 4] and again.config.residual_combine == "softmax"
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_it_is_finite_in_bfloat16():
    model = make_model("pr_moe", num_experts=[2, 4], expert_capacity_factor=1.0).to(torch.bfloat16).train()
    inputs = make_inputs()
    outputs = model(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    assert outputs.loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_dense_branch_has_the_form_of_an_expert():
    block = residual_block()
    assert isinstance(block.residual_expert, DenseExpert)
    own = sum(p.numel() for p in block.residual_expert.parameters())
    assert own * 4 == sum(p.numel() for p in block.experts.parameters())
