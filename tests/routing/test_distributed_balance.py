import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common.toy_moe import toy_dataset, toy_model

from hf_moe.routing.load_balancer import BALANCE_MODES


pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("distributed_balance.py")
NUM_MICRO_BATCHES = 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "only_on_rank_0").mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), str(SCRIPT), str(folder)]
    paths = [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_ran(reports):
    assert [report["world_size"] for report in reports] == [2, 2]


@pytest.mark.parametrize("mode", BALANCE_MODES)
def test_buffers_biases_and_gradients_are_equal_on_both_ranks(reports, mode):
    left, right = (report[mode] for report in reports)
    assert len(left) == 2
    for a, b in zip(left, right, strict=True):
        assert a["counts"] == b["counts"]
        assert a["num_tokens"] == b["num_tokens"] > 0
        assert a["biases"] == b["biases"]
        assert a["gate_gradient"] == b["gate_gradient"]


@pytest.mark.parametrize("mode", BALANCE_MODES)
def test_counts_are_those_of_all_micro_batches_and_ranks(reports, mode):
    # 16 rows are two steps of 2 rows x 2 micro-batches x 2 ranks: the whole dataset, in any order.
    tokens = sum(int(row["attention_mask"].sum()) for row in toy_dataset(16, pad=True))
    steps = reports[0][mode]
    assert sum(step["num_tokens"] for step in steps) == tokens
    assert all(sum(row) == 2 * step["num_tokens"] for step in steps for row in step["counts"])


@pytest.mark.parametrize(
    ("mode", "collectives"),
    # In `micro` and `rank` the one collective is for the selection bias.
    [("micro", 1), ("rank", 1), ("lagged", 1), ("running", NUM_MICRO_BATCHES), ("blend", NUM_MICRO_BATCHES)],
)
def test_number_of_collectives_per_step(reports, mode, collectives):
    for report in reports:
        assert [step["collectives"] for step in report[mode]] == [collectives] * 2
        assert [step["micro_batches"] for step in report[mode]] == [NUM_MICRO_BATCHES] * 2


@pytest.mark.parametrize("average_tokens", [True, False])
def test_gradient_is_that_of_the_same_batch_on_one_process(reports, average_tokens):
    row = toy_dataset(1)[0]
    batch = {key: torch.stack([value] * 8) for key, value in row.items()}
    model = toy_model(router_type="sigmoid_topk").train()
    model(**batch).loss.backward()
    (step,) = reports[0][f"average_tokens={average_tokens}"]
    for layer, found in zip(model.layers, step["gate_gradient"], strict=True):
        torch.testing.assert_close(torch.tensor(found), layer.gate.weight.grad, atol=1e-7, rtol=1e-5)


def test_gradient_is_exact_for_unequal_micro_batches_with_the_frequencies_of_the_step_before(reports):
    rows = toy_dataset(8, pad=True)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    model = toy_model(router_type="sigmoid_topk", balance_mode="lagged", coefficient=1.0).train()
    model.load_balancer.previous_counts.copy_(torch.tensor([[5, 1, 1, 1], [2, 1, 1, 4]]))  # as in the script
    model.load_balancer.previous_num_tokens.fill_(1)
    model.load_balancer.begin_step(num_micro_batches=2)  # 1 would use the counts of this batch
    model(**batch).loss.backward()
    (step,) = reports[0]["uneven"]
    for layer, found in zip(model.layers, step["gate_gradient"], strict=True):
        torch.testing.assert_close(torch.tensor(found), layer.gate.weight.grad, atol=1e-7, rtol=1e-5)


def test_statistics_are_summed(reports):
    own = [torch.tensor(report["own_counts"]) for report in reports]
    for report in reports:
        assert torch.equal(torch.tensor(report["reduced_counts"]), own[0] + own[1])


def test_counters_of_rank_0_reach_a_rank_without_the_file(reports):
    assert reports[0]["restored"] == reports[1]["restored"] == [[3] * 4] * 2


def test_the_sum_over_ranks_compiles_without_graph_break(reports):
    own = [torch.tensor(report["own_counts"]) for report in reports]
    for report in reports:
        assert torch.equal(torch.tensor(report["compiled_counts"]), own[0] + own[1])
