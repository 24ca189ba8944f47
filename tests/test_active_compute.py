"""The cost of a token by the experts it uses, against what torch counts."""

import pytest
import torch
from common.tiny_training import tiny_moe
from torch.utils.flop_counter import FlopCounterMode

from hf_moe import MoeLlamaConfig, MoeLlamaForCausalLM, active_compute
from hf_moe.metrics import active_flops
from hf_moe.routing import find_routers


D, N, L, B, S = 32, 8, 2, 2, 16


def make_model(router_type="softmax_topk", fields=None, **options):
    config = MoeLlamaConfig(
        hidden_size=D,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=L,
        num_attention_heads=2,
        vocab_size=64,
        num_experts=N,
        router_type=router_type,
        router_config=options,
        initializer_range=0.2,
        attn_implementation="eager",
        **(fields or {}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MoeLlamaForCausalLM(config).eval()


def counted(model, ids):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    return counter.get_total_flops()


def attention(layers=L):
    """Products of queries, keys and values with each other."""
    return layers * 2 * 2 * B * S * S * D


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize(
    ("router_type", "fields", "options"),
    [
        ("softmax_topk", {}, {}),
        ("softmax_topk", {"num_experts_per_tok": N, "tie_word_embeddings": True}, {}),
        ("softmax_topk", {"moe_layers": [1], "num_shared_experts": 1}, {}),
        ("top_p", {}, {"p": 0.5}),
        ("comet", {"num_experts_per_tok": 1}, {"gamma": 0.3}),
    ],
)
def test_the_figure_is_what_torch_counts(router_type, fields, options, implementation, generator):
    model = make_model(router_type, fields, **options)
    if router_type == "comet":
        with torch.no_grad():
            for router in find_routers(model).values():
                router.node_weight.normal_(generator=generator)
    model.set_experts_implementation(implementation)
    ids = torch.randint(0, 64, (B, S), generator=generator)
    found = active_flops(model, {"input_ids": ids})
    assert found["flops"] == pytest.approx(counted(model, ids) - attention(), rel=1e-9)
    assert found["flops_per_token"] == found["flops"] / (B * S)
    if router_type in ("top_p", "comet"):
        assert 1 < found["active_experts"] < N - 1 and found["flops_share"] < 1
    else:
        assert found["active_experts"] == model.config.num_experts_per_tok


def test_padding_is_left_out(generator):
    model = make_model("top_p", p=0.5)
    ids = torch.randint(0, 64, (B, S), generator=generator)
    mask = torch.ones(B, S, dtype=torch.long)
    mask[1, : S // 2] = 0
    padded = active_flops(model, {"input_ids": ids, "attention_mask": mask})
    alone = [active_flops(model, {"input_ids": row}) for row in (ids[:1], ids[1:, S // 2 :])]
    # Rotary positions are relative, so the second row is routed as if it stood alone.
    assert padded["flops"] == pytest.approx(sum(part["flops"] for part in alone), rel=1e-6)


def test_experts_without_a_feed_forward_cost_nothing(generator):
    model = tiny_moe("moe_plus_plus", num_zero_experts=1, num_copy_experts=1, num_constant_experts=1)
    compute = active_compute(model)
    assert compute.num_experts == (4, 4)
    ids = torch.randint(3, 100, (B, S), generator=generator)
    assert active_flops(model, {"input_ids": ids})["active_experts"] < 2


def test_training_costs_three_times_as_much_and_layers_may_differ():
    compute = active_compute(make_model())
    assert compute.per_expert == (3 * 24 * D,) * L
    assert compute.flops(2, num_tokens=10, training=True) == 3 * compute.flops((2, 2), num_tokens=10)
    assert compute.weights((1, 3)) == compute.weights(2) == compute.always + 4 * 3 * 24 * D
    with pytest.raises(ValueError, match=r"`active_experts` must be a number or one per MoE layer \(2\), got 3"):
        compute.weights([1, 2, 3])
