"""Read-ME's training in two processes, where each step leaves the other part without gradients."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common.tiny_training import third_party_warnings
from safetensors.torch import load_file


pytestmark = [pytest.mark.slow, third_party_warnings]

SCRIPT = Path(__file__).with_name("distributed_read_me.py")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), str(SCRIPT), str(tmp_path)]
    paths = [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert left.pop("world_size").item() == right.pop("world_size").item() == 2
    spec = importlib.util.spec_from_file_location("distributed_read_me", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    wanted = script.train(tmp_path / "one", batch_size=2)
    assert left.keys() == right.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(left[name], right[name]), name
        torch.testing.assert_close(left[name], tensor, atol=2e-6, rtol=1e-4, msg=name)
