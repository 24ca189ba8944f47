import math

import pytest
from common.examples import load_example
from common.tiny_training import third_party_warnings


pytestmark = third_party_warnings


@pytest.fixture(scope="module")
def evomoe():
    return load_example("reproductions/evomoe")


@pytest.fixture(scope="module")
def bench():
    harness = load_example("reproductions/harness")
    return harness.Bench(harness.PRESETS["tiny"], seed=0)


def test_every_arm_ends_with_one_expert_per_token(evomoe, bench):
    rows = {name: arm(bench) for name, arm in evomoe.REPRODUCTION.arms.items()}
    assert len({row["bits_per_byte"] for row in rows.values()}) == len(rows)  # no two arms are the same
    for row in rows.values():
        assert math.isfinite(row["bits_per_byte"]) and 1 / evomoe.NUM_EXPERTS <= row["busiest"] <= 1
    assert rows["Switch"]["experts_in_training"] == rows["copies, Switch times N"]["experts_in_training"] == 1
    assert rows["EvoMoE"]["experts_in_training"] > 1  # the dense part of its second phase


def test_copies_behind_a_scaled_switch_start_as_experts_of_full_size(evomoe, bench):
    args = evomoe.CopiesArguments("unused", max_steps=10, num_experts=4, use_cpu=True, bf16=False)
    fields = args.router_fields()
    assert fields["router_type"] == "softmax_topk" and fields["router_config"]["routed_scaling_factor"] == 4.0
    assert (args.diversify, args.gate_start) == ("copy", "fresh")
