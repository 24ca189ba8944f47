import pytest
import torch
from common.examples import load_example


@pytest.fixture(scope="module")
def bench():
    harness = load_example("reproductions/harness")
    return harness.Bench(harness.PRESETS["tiny"], seed=0)


@pytest.fixture(scope="module")
def read_me():
    return load_example("reproductions/read_me")


@pytest.fixture(scope="module")
def figures(bench, read_me):
    return {name: arm(bench) for name, arm in read_me.REPRODUCTION.arms.items()}


def test_every_arm_is_measured(figures, read_me):
    assert all(0 < row["bits_per_byte"] < 10 for row in figures.values())
    for name in ("per-token router", "Read-ME"):
        assert figures[name]["hits_lru"] <= figures[name]["hits_belady"] <= 1
        assert 0 <= figures[name]["agreement"] <= 1


def test_pruned_models_have_no_choice_and_the_same_active_width(bench, read_me):
    dense = bench.dense_model()
    mixed = bench.train_blocks[:2]
    pruned = read_me.refactored(bench, dense, {"all": mixed, "again": mixed})
    routed = read_me.refactored(bench, dense)
    assert set(pruned.config.expert_sizes) == {0}
    for model in (pruned, routed):
        sizes = zip(model.config.expert_sizes, model.config.shared_sizes, strict=True)
        assert {expert + shared for expert, shared in sizes} == {round(read_me.KEEP * dense.config.intermediate_size)}


@torch.no_grad()
def test_the_per_token_router_sees_one_token(bench, read_me, monkeypatch):
    kept = {}
    monkeypatch.setattr(read_me, "routed", lambda bench, model, dense: kept.update(model=model) or {})
    monkeypatch.setattr(read_me, "trained_dense", lambda bench: bench.dense_model())
    read_me.per_token_router(bench)
    ids = torch.randint(3, 1000, (1, 12), generator=torch.Generator().manual_seed(0))
    together = kept["model"](ids, routing_only=True).router_logits[0]
    alone = kept["model"](ids.T, routing_only=True).router_logits[:, 0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    whole = read_me.refactored(bench, bench.dense_model())
    assert not torch.allclose(whole(ids, routing_only=True).router_logits[0, 1:], alone[1:], atol=1e-4)
