"""Dynamic routing as a model type: its layers, how many experts tokens get, and its entropy loss."""

from itertools import pairwise

import pytest
import torch
from common.model_battery import make_config, make_inputs, make_model, seeded
from torch.nn import functional as F

from hf_moe import DynamicMoeConfig, DynamicMoeForCausalLM


P = {"entropy_coef": 0.0}


def experts_per_token(model, **inputs):
    outputs = model(**(inputs or make_inputs()), output_router_logits=True)
    return [(index < model.config.num_experts).sum(-1) for index in outputs.router_indices]


def test_the_defaults_are_the_released_codes():
    config = DynamicMoeConfig(num_hidden_layers=6)
    assert config.moe_layer_indices == [0, 2, 4] and config.router_type == "top_p" and config.num_experts == 16
    assert config.moe_intermediate_size == config.intermediate_size and config.has_router_penalty
    with torch.device("meta"):
        model = DynamicMoeForCausalLM(make_config("dynamic_moe", num_hidden_layers=3, moe_layers="every:2:0"))
    assert [name for name, _ in model.moe_blocks()] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert model.moe_blocks()[0][1].gate.initial_p == 0.4


def test_tokens_get_more_experts_the_larger_p_is():
    numbers = []
    for p in (1e-6, 0.4, 0.7, 1.0):
        used = experts_per_token(make_model("dynamic_moe", router_config={"p": p, **P}))
        numbers.append([layer.float().mean().item() for layer in used])
    assert numbers[0] == [1.0, 1.0] and numbers[-1] == [4.0, 4.0]
    assert all(few <= more for row in zip(*numbers, strict=True) for few, more in pairwise(row))
    assert numbers[1] != numbers[2]


def test_a_token_gets_the_same_experts_alone_and_in_a_batch():
    model = make_model("dynamic_moe")
    inputs = make_inputs()
    together = experts_per_token(model, **inputs)
    for row in range(2):
        alone = experts_per_token(model, input_ids=inputs["input_ids"][row : row + 1])
        assert all(torch.equal(a, b[8 * row : 8 * row + 8]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_the_entropy_is_in_the_loss(coefficient):
    config = {"entropy_coef": coefficient}
    model = make_model("dynamic_moe", router_config=config, router_aux_loss_coef=0.0).train()
    inputs = make_inputs()
    outputs = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    own = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    entropy = torch.stack([torch.special.entr(logits.softmax(-1)).sum(-1).mean() for logits in outputs.router_logits])
    torch.testing.assert_close(outputs.loss, own + coefficient * entropy.mean())


def test_a_strong_entropy_loss_makes_tokens_use_fewer_experts():
    counts = {}
    for coefficient in (0.0, 1.0):
        with seeded():
            model = make_model("dynamic_moe", router_config={"p": 0.7, "entropy_coef": coefficient}).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            inputs = make_inputs(batch=4)
            for _ in range(15):
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        counts[coefficient] = sum(layer.sum().item() for layer in experts_per_token(model.eval(), **inputs))
    assert counts[1.0] < counts[0.0]
