"""A training step needs no more memory than transformers' grouped_mm."""

import pytest
import torch

from hf_moe.experts.benchmark import Geometry, peak_bytes
from hf_moe.experts.benchmark.geometry import make_experts, make_routing
from hf_moe.experts.kernels.workspace import MAX_KEPT_BYTES, Borrowed, Workspace


def peak(path, dtype, tokens):
    geometry = Geometry("tiny", 64, 128, 8, 2)
    experts = make_experts(geometry, dtype)
    experts.config._experts_implementation = path
    hidden, index, weights = make_routing(geometry, tokens, dtype, torch.Generator().manual_seed(0))
    hidden.requires_grad_()
    weights.requires_grad_()
    return peak_bytes(lambda: experts(hidden, index, weights).sum().backward())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["hf_moe", "hf_moe_exact", "hf_moe_bucketed"])
def test_a_training_step_peaks_no_higher_than_with_grouped_mm(path, dtype):
    assert peak(path, dtype, 2048) <= peak("grouped_mm", dtype, 2048)


def test_the_measure_counts_what_lives_at_one_time():
    assert peak_bytes(lambda: torch.zeros(1 << 20)) >= 4 << 20
    assert peak_bytes(lambda: sum(torch.zeros(1 << 20).sum() for _ in range(3))) < 8 << 20


def test_buffers_grow_are_used_again_and_are_bounded():
    workspace = Workspace()
    first = workspace.take("a", (10, 4), torch.float32)
    again = workspace.take("a", (5, 4), torch.bfloat16)
    assert first.shape == (10, 4) and again.shape == (5, 4) and again.dtype == torch.bfloat16
    assert again.data_ptr() == first.data_ptr()
    assert workspace.take("b", (10, 4), torch.float32).data_ptr() != first.data_ptr()
    large = workspace.take("a", (MAX_KEPT_BYTES + 1,), torch.uint8)
    assert large.numel() > MAX_KEPT_BYTES and "a" not in workspace._buffers
    assert workspace.take("b", (10, 4), torch.float32).data_ptr() != first.data_ptr()
    assert workspace.take("empty", (0, 4), torch.float32).shape == (0, 4)
    workspace.release("b", "never taken")
    assert "b" not in workspace._buffers and workspace._buffers
    workspace.clear()
    assert workspace._buffers == {}


def test_borrowed_memory_serves_first_and_the_workspace_then():
    memory = torch.zeros(5, 4)
    room = Borrowed(memory)
    assert room.rows_left(4, 9) == 5 and room.rows_left(4, 3) == 3
    first, second = room.take("a", (2, 4), torch.float32), room.take("b", (3, 4), torch.float32)
    first.fill_(1)
    second.fill_(2)
    assert memory.sum(dim=1).tolist() == [4, 4, 8, 8, 8]
    room.take("c", (1, 4), torch.float32).fill_(3)
    assert memory.sum() == 32 and room.rows_left(4, 9) == 0
    nothing = Borrowed()
    assert nothing.rows_left(4, 9) == 9 and nothing.take("d", (2, 3), torch.bfloat16).shape == (2, 3)
