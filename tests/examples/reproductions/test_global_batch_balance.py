import pytest
import torch
from common.examples import load_example


@pytest.fixture(scope="module")
def module():
    return load_example("reproductions/global_batch_balance")


@pytest.fixture(scope="module")
def bench():
    harness = load_example("reproductions/harness")
    return harness.Bench(harness.PRESETS["tiny"], seed=0)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_each_micro_batch_is_of_one_domain_and_each_step_has_all(module, bench, micro_batch):
    blocks = module.sorted_blocks(bench, micro_batch)
    domains = [{tuple(row) for row in rows.tolist()} for rows in bench.domains.values()]
    for step in range(3):
        rows = blocks[step * 5 * micro_batch :][: 5 * micro_batch].view(5, micro_batch, -1)
        for micro, domain in zip(rows, domains, strict=True):
            assert all(tuple(row) in domain for row in micro.tolist())
    assert len(blocks) % (5 * micro_batch) == 0  # so that this holds when the text starts again


def test_the_load_is_of_each_domain(module, bench):
    model = bench.language_model(num_experts=4, num_experts_per_tok=2)
    loads = module.expert_load(bench, model)
    assert loads.shape == (5, 2, 4)
    torch.testing.assert_close(loads.sum(-1), torch.ones(5, 2))
    assert not torch.equal(loads[0], loads[1])


def test_every_arm_runs(module, bench):
    figures = {name: arm(bench) for name, arm in module.REPRODUCTION.arms.items()}
    losses = [row["bits_per_byte"] for row in figures.values()]
    assert len(set(losses)) == len(losses) and all(0 < loss < 10 for loss in losses)
    assert all(0 < row["distance_of_domains"] < 1 <= row["busiest_expert"] for row in figures.values())
