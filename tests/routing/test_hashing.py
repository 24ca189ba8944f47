"""The hash router: tables, balance, saving, and what it refuses."""

import pytest
import torch

from hf_moe.models.llama import MoeLlamaConfig, MoeLlamaForCausalLM
from hf_moe.routing import RoutingContext, balanced_hash_table, build_router, find_routers, random_hash_table


D, N, V = 16, 4, 50


def make_config(**fields):
    sizes = {"hidden_size": D, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"num_experts": N, "num_experts_per_tok": 1, "vocab_size": V, "router_type": "hash"}
    return MoeLlamaConfig(**{**sizes, **options, **fields})


def test_equal_ids_go_to_the_experts_of_the_table_with_equal_weights(generator):
    router = build_router(make_config(num_experts_per_tok=2), 0)
    ids = torch.tensor([3, 7, 3, 49])
    out = router(torch.randn(4, D, generator=generator), RoutingContext(input_ids=ids))
    assert torch.equal(out.top_k_index.sort().values, router.table[ids].sort().values)
    assert torch.equal(out.top_k_weights, torch.full((4, 2), 0.5))
    assert torch.equal(router.probabilities(out.router_logits).sum(-1), torch.ones(4))


def test_tables_differ_between_layers_and_seeds_and_come_back_from_a_seed():
    tables = [build_router(make_config(router_config={"seed": seed}), layer).table for seed, layer in
              [(0, 0), (0, 0), (0, 1), (5, 0)]]  # fmt: skip
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2]) and not torch.equal(tables[0], tables[3])


def test_random_tables_are_uniform_and_rows_name_different_experts(generator):
    table = random_hash_table(4000, N, 2, generator)
    assert (table[:, 0] != table[:, 1]).all()
    share = table.flatten().bincount(minlength=N) / table.numel()
    torch.testing.assert_close(share, torch.full((N,), 1 / N), atol=0.02, rtol=0)


def test_balanced_tables_even_out_a_skewed_corpus():
    counts = (1000 / torch.arange(1, 301)).long()  # Zipf
    counts[250:] = 0
    table = balanced_hash_table(counts, N)
    load = torch.zeros(N, dtype=torch.long).scatter_add(0, table.flatten(), counts)
    assert load.max() - load.min() <= 4
    pairs = balanced_hash_table(counts, N, top_k=2)
    assert (pairs[:, 0] != pairs[:, 1]).all()


def test_ids_that_never_occur_are_dealt_out_evenly():
    assert balanced_hash_table(torch.zeros(8, dtype=torch.long), N).flatten().bincount().tolist() == [2] * N
    # Expert 0 holds one frequent id, the others two ids each: it gets the first unseen one.
    assert balanced_hash_table(torch.tensor([9, 3, 3, 3, 1, 1, 1, 0]), N).flatten().tolist()[-1] == 0


def test_the_table_is_saved_and_loaded(tmp_path, generator):
    model = MoeLlamaForCausalLM(make_config()).eval()
    balanced = balanced_hash_table(torch.arange(V), N)
    for router in find_routers(model).values():
        router.set_table(balanced)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, V, (2, 5), generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        again = MoeLlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        assert all(torch.equal(router.table, balanced) for router in find_routers(again).values())
    again = MoeLlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_generation_with_a_cache_follows_the_ids(generator):
    model = MoeLlamaForCausalLM(make_config()).eval()
    prompt = torch.randint(3, V, (1, 4), generator=generator)
    ids = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(
        prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False
    )
    assert torch.equal(ids, expected)


def test_embeddings_instead_of_ids_are_refused():
    model = MoeLlamaForCausalLM(make_config())
    with pytest.raises(ValueError, match=r"got no `input_ids`: the model was called with `inputs_embeds`"):
        model(inputs_embeds=torch.zeros(1, 3, D))


@pytest.mark.parametrize("weight_from", ["softmax", "sigmoid"])
def test_the_table_may_choose_and_a_learned_score_weigh(weight_from, generator):
    router = build_router(make_config(num_experts_per_tok=2, router_config={"weight_from": weight_from}), 0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(N, D, generator=generator))
    ids, x = torch.tensor([3, 7, 3, 49]), torch.randn(4, D, generator=generator)
    out = router(x, RoutingContext(input_ids=ids))
    learned = (x @ router.weight.T).gather(-1, out.top_k_index)
    assert torch.equal(out.top_k_index.sort().values, router.table[ids].sort().values)
    torch.testing.assert_close(
        out.top_k_weights, learned.softmax(-1) if weight_from == "softmax" else learned.sigmoid()
    )
    (gradient,) = torch.autograd.grad((out.top_k_weights * torch.tensor([1.0, 2.0])).sum(), router.weight)
    assert gradient.any() and gradient.isfinite().all()
    with pytest.raises(ValueError, match=r"\['weight_from'\]` must be one of .* got 'tanh'"):
        make_config(router_config={"weight_from": "tanh"})


def test_balanced_tables_start_with_equal_token_mass_in_every_layer(generator):
    ids = (torch.rand(4000, generator=generator) ** 2 * V).long()
    model = MoeLlamaForCausalLM(make_config())
    for router in find_routers(model).values():
        router.set_table(balanced_hash_table(ids.bincount(minlength=V), N))
    out = model.eval()(ids.view(20, 200), output_router_logits=True)
    for index in out.router_indices:
        load = index.flatten().bincount(minlength=N)
        assert load.max() - load.min() <= 0.02 * ids.numel()


def test_ids_beyond_the_table_start_over():
    router = build_router(make_config(router_config={"num_buckets": 10}), 0)
    out = [router(torch.zeros(1, D), RoutingContext(input_ids=torch.tensor([i]))).top_k_index for i in (3, 13)]
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(V, 1, dtype=torch.long), r"shape \(50, 2\), got \(50, 1\)"),
        (torch.full((V, 2), N), "from 0 to 3"),
        (torch.zeros(V, 2), "whole numbers"),
        (torch.zeros(V, 2, dtype=torch.long), "twice in one row"),
    ],
)
def test_tables_that_cannot_work_are_refused_and_change_nothing(table, message):
    router = build_router(make_config(num_experts_per_tok=2), 0)
    before = router.table.clone()
    with pytest.raises(ValueError, match=message):
        router.set_table(table)
    assert torch.equal(router.table, before)


def test_bad_values_are_refused_when_the_config_is_made():
    with pytest.raises(ValueError, match=r"\['num_buckets'\]` must be at least 1, got 0"):
        make_config(router_config={"num_buckets": 0})
    with pytest.raises(ValueError, match=r"\['seed'\]` must be at least 0, got -1"):
        make_config(router_config={"seed": -1})
    with pytest.raises(ValueError, match="must be a vector of counts"):
        balanced_hash_table(torch.zeros(2, 2), N)
    with pytest.raises(ValueError, match=r"`top_k` must be between 1 and `num_experts` \(4\), got 5"):
        balanced_hash_table(torch.ones(9), N, top_k=5)
