"""Two CPU processes under `accelerate launch` against one process with twice the batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import distributed_training as script
from common.tiny_training import third_party_warnings
from safetensors.torch import load_file


pytestmark = third_party_warnings


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Per rank: world size and logs by case, and a function that loads its tensors of a case."""
    folder = tmp_path_factory.mktemp("ranks")
    # `--cpu` and MULTI_CPU silently start one process; port 0 hangs.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), script.__file__, str(folder)]
    paths = [str(Path(script.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [log["world_size"] for log in logs] == [2, 2]
    return [
        (logs[rank], lambda name, rank=rank: load_file(folder / f"{name}-{rank}.safetensors")) for rank in range(2)
    ]


@pytest.mark.parametrize("name", script.CASES)
def test_both_ranks_have_the_same_weights_and_balance_buffers(ranks, name):
    left, right = (load(name) for _, load in ranks)
    assert left.keys() == right.keys()
    assert any("load_balancer" in key and tensor.any() for key, tensor in left.items())
    for key, tensor in left.items():
        assert torch.equal(right[key], tensor), key


@pytest.mark.parametrize("name", script.CASES)
def test_two_processes_equal_one_with_twice_the_batch(ranks, name, tmp_path):
    (logs, load), _ = ranks
    wanted, wanted_logs = script.train(name, tmp_path, batch_size=4)
    found = load(name)
    assert [log["loss"] for log in logs[name]] == pytest.approx([log["loss"] for log in wanted_logs], abs=2e-6)
    assert len(wanted_logs) == 3 and found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, atol=2e-6, rtol=1e-4, msg=key)
