"""Two processes share the texts of a routing report and log what one would have logged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("distributed_report.py")


@pytest.mark.slow
def test_both_ranks_log_what_one_process_finds(tmp_path, tiny_tokenizer_dir):
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "tokenizer")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    for found in ranks[0].values():  # more texts than processes, and fewer
        assert found["counts"] == found["expected_counts"]
        assert found["coactivation"] == found["expected_coactivation"]
        assert {key: found["logged"][key] for key in found["expected"]} == pytest.approx(found["expected"])
        assert found["logged"]["selection_shift"] > 0
    assert {"report.md", "shift.md"} <= {path.name for path in (tmp_path / "run" / "routing").iterdir()}
