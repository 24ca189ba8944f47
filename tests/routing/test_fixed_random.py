"""SMoE-Dropout: the router stays as it was drawn, k follows its schedule, and any k can be run."""

import pytest
import torch

from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM
from hf_moe.routing import LinearSchedule, apply_schedules, build_router, find_routers, parse_schedules


D, N = 16, 8


def make_config(num_experts_per_tok=2, **options):
    return MoeLlamaConfig(
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        num_experts=N,
        num_experts_per_tok=num_experts_per_tok,
        router_type="fixed_random",
        router_aux_loss_coef=0.0,
        router_config=options,
        initializer_range=0.2,
    )


def set_k(model, k):
    apply_schedules(model, parse_schedules({"k": k}), step=0)


@pytest.mark.parametrize(
    ("start", "step", "k"),
    [
        (8, 0, 8), (8, 25_000, 8), (8, 25_001, 9), (8, 100_000, 10), (8, 200_000, 12), (8, 300_000, 14),
        (8, 399_999, 16), (8, 500_000, 16), (2, 14_285, 2), (2, 14_286, 3), (2, 42_857, 3), (2, 200_000, 9),
    ],
)  # fmt: skip
def test_k_grows_as_in_the_released_code(start, step, k):
    config = make_config()
    config.num_experts = 16
    router = build_router(config, 0)
    holder = torch.nn.ModuleList([router])
    apply_schedules(holder, {"k": LinearSchedule(start, 16, num_steps=400_000)}, step)
    assert router.k.item() == k and router.k.dtype == torch.int64


def test_k_experts_are_active_with_the_softmax_of_their_logits(generator):
    router = build_router(make_config(), 0).eval()
    x = torch.randn(20, D, generator=generator)
    for k in (1, 2, 5, N):
        router.k.fill_(k)
        out = router(x)
        values, index = out.router_logits.topk(k)
        assert torch.equal(out.top_k_index[:, :k], index) and (out.top_k_index[:, k:] == N).all()
        torch.testing.assert_close(out.top_k_weights[:, :k], values.softmax(-1))
        assert not out.top_k_weights[:, k:].any()
    router.k.fill_(1)
    assert torch.equal(router(x).top_k_weights[:, 0], torch.ones(20))


def test_training_leaves_the_router_as_it_was_drawn(generator):
    model = MoeLlamaForCausalLM(make_config()).train().requires_grad_(True)
    before = [(r.weight.clone(), r.bias.clone()) for r in find_routers(model).values()]
    assert not [name for name, _ in model.named_parameters() if ".gate." in name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    ids = torch.randint(0, 50, (2, 6), generator=generator)
    embeddings = model.get_input_embeddings().weight.clone()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for router, (weight, bias) in zip(find_routers(model).values(), before, strict=True):
        assert torch.equal(router.weight, weight) and torch.equal(router.bias, bias)
    assert not torch.equal(model.get_input_embeddings().weight, embeddings)


def test_any_k_can_be_run_and_taken_back(generator):
    model = MoeLlamaForCausalLM(make_config()).eval()
    ids = torch.randint(0, 50, (2, 6), generator=generator)
    logits = {k: (set_k(model, k), model(ids).logits)[1] for k in (2, 1, 5, N)}
    assert not any(torch.allclose(logits[2], logits[k]) for k in (1, 5, N))
    set_k(model, 2)
    assert torch.equal(model(ids).logits, logits[2])


def test_fewer_slots_are_the_same_model(generator):
    model, narrow = MoeLlamaForCausalLM(make_config()), MoeLlamaForCausalLM(make_config(max_experts=3))
    narrow.load_state_dict(model.state_dict())
    ids = torch.randint(0, 50, (2, 6), generator=generator)
    torch.testing.assert_close(narrow.eval()(ids).logits, model.eval()(ids).logits)


def test_the_order_of_experts_does_not_matter(generator):
    model = MoeLlamaForCausalLM(make_config()).eval()
    block = model.model.layers[0].mlp
    x = torch.randn(1, 9, D, generator=generator)
    for k in (3, N):
        block.gate.k.fill_(k)
        expected, _ = block(x)
        order = torch.randperm(N, generator=generator)
        with torch.no_grad():
            for tensor in (block.gate.weight, block.gate.bias, *block.experts.parameters()):
                tensor.copy_(tensor[order])
        torch.testing.assert_close(block(x)[0], expected)


def test_router_and_k_are_saved_and_never_drawn_again(tmp_path, generator):
    model = MoeLlamaForCausalLM(make_config()).eval()
    set_k(model, 5)
    model.save_pretrained(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        again, info = MoeLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(0, 50, (2, 6), generator=generator)
    for name, buffer in model.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer), name
    assert all(router.k == 5 for router in find_routers(again).values())
    # Not bit by bit: loaded tensors may lie at other offsets in memory, and products round by them.
    torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits)


def test_layers_draw_different_routers():
    first, second = find_routers(MoeLlamaForCausalLM(make_config())).values()
    assert not torch.equal(first.weight, second.weight) and first.weight.abs().max() <= D**-0.5


def test_cut_experts_with_a_router_of_zeros_are_the_dense_feed_forward():
    """The sheet's cutting identity: at k = N equal weights 1/N, undone by the scale of the cut experts."""
    from common.upcycling_toys import logit_gap, tiny_dense

    from hf_moe import upcycle
    from hf_moe.upcycling import Split, Zeros

    dense = tiny_dense("llama")
    moe, _ = upcycle(
        dense,
        num_experts=4,
        top_k=4,
        experts=Split(),
        router=Zeros(),
        target="moe_llama",
        router_type="fixed_random",
    )
    for router in find_routers(moe).values():
        router.bias.zero_()
        assert not router.weight.any()
    assert logit_gap(dense, moe) <= 4e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_experts": 1}, r"\['max_experts'\]` must be at least `num_experts_per_tok` \(2\), got 1"),
        (
            {"schedules": {"k": {"type": "linear", "start": 0, "end": 8, "num_steps": 9}}},
            "schedule of `k` reaches 0.0",
        ),
        (
            {"schedules": {"k": {"type": "multi_step", "values": [1, 4, 16], "num_steps": 9}}},
            "schedule of `k` reaches 16, but a token may get 8 experts at most. End",
        ),
        ({"max_experts": 4, "schedules": {"k": 5}}, "reaches 5, but a token may get 4 experts at most"),
        (
            {"schedules": {"k": {"type": "linear", "start": 2, "end": 8, "num_steps": float("inf")}}},
            "the schedule of `k`: `num_steps` must be a whole number of steps",
        ),
    ],
)
def test_bad_values_are_refused_when_the_config_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)
