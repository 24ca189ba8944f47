"""Reproductions of COMET, SMoE-Dropout and dynamic routing at the tiny preset."""

import pytest
from common.examples import load_example


EXPECTED = {"comet": "active_experts", "smoe_dropout": "k_16", "dynamic_routing": "active_experts"}


@pytest.fixture(scope="module")
def bench():
    harness = load_example("reproductions/harness")
    return harness.Bench(harness.PRESETS["tiny"], seed=0)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_every_arm_trains_and_gives_its_figures(name, bench):
    reproduction = load_example(f"reproductions/{name}").REPRODUCTION
    assert reproduction.name == name
    found = []
    for arm in reproduction.arms.values():
        figures = arm(bench)
        assert 3 < figures[reproduction.metric] < 6
        assert figures["training_teraflops"] > 0 and EXPECTED[name] in figures
        found.append(figures[reproduction.metric])
    assert len(set(found)) == len(found)  # no two arms are the same


def test_p_is_steered_towards_as_many_experts(bench):
    module = load_example("reproductions/dynamic_routing")
    steer = module.SteerP(bench.train_blocks, target=2)
    figures = module.run(bench, [steer], router_type="top_p", router_config={"p": 0.4})
    assert steer.p < 0.4 and figures["active_experts"] < 5
