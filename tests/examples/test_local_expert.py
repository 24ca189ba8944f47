import json

import pytest
import torch
from common.examples import load_example


@pytest.mark.slow
def test_local_expert_example_runs_at_its_smallest(tmp_path):
    example = load_example("local_expert")
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(600, 1, 32, 32, generator=generator), torch.arange(600) % 10
    table = example.main(["--preset", "test", "--output", str(tmp_path)], data=data)
    assert set(table) == set(example.METHODS)
    assert table["local, gate on features"]["added_parameters"] == 850 + 85
    assert json.loads((tmp_path / "local_expert.json").read_text())["table"] == table
    assert (tmp_path / "local_expert.png").stat().st_size > 1000
