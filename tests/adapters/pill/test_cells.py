"""The formulas of PILL's cells, by hand."""

import pytest
import torch
from torch import nn

from hf_moe.adapters.core import Runtime
from hf_moe.adapters.pill import HeadGate, PillConfig, ValueLayer, improved_adapter


def test_improved_adapter_by_hand():
    cell = improved_adapter(2, 1)
    with torch.no_grad():
        cell.gate.weight.copy_(torch.tensor([[1.0, 0.0]]))
        cell.down.weight.copy_(torch.tensor([[0.0, 2.0]]))
        cell.up.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    six = 6 * nn.functional.silu(torch.tensor(1.0))
    got = cell(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(got, torch.stack([six, -six]))
    torch.testing.assert_close(got, torch.tensor([4.386352, -4.386352]))


def test_cells_start_as_the_paper_says(generator):
    torch.manual_seed(0)
    cell = improved_adapter(256, 64)
    assert [name for name, _ in cell.named_parameters()] == ["down.weight", "gate.weight", "up.weight"]
    assert not cell.up.weight.any()
    assert cell.down.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert cell.gate.weight.abs().max() <= 256**-0.5 < cell.gate.weight.abs().max() * 1.01
    x = torch.randn(3, 256, generator=generator)
    assert not cell(x).any() and not HeadGate(256, 4)(x).any()


@pytest.mark.parametrize(
    ("before", "expected"), [(0.0, (1.0, 0.0)), (0.5, (1.924234, 1.848469)), (float("inf"), (3.0, 4.0))]
)
def test_gate_by_hand(before, expected):
    values = nn.Linear(2, 2, bias=False)
    gate = HeadGate(2, 1)
    with torch.no_grad():
        values.weight.copy_(torch.tensor([[2.0, 4.0], [0.0, 8.0]]))  # text (1, 0) -> (2, 0), image (0, 1) -> (4, 8)
        gate.weight.copy_(torch.tensor([[7.0, 30.0 if before == float("inf") else before]]))
    runtime = Runtime()
    runtime.declare(takes=["modality_mask"])
    layer = ValueLayer(values, runtime, width=2, heads=1)
    layer._active_adapter = ["default"]
    layer.update_layer("default", PillConfig())
    layer.cell("gate", "default").weight.data.copy_(gate.weight.data)
    runtime.values = {"modality_mask": torch.tensor([[0, 1]])}
    attended = layer(torch.eye(2)[None]).mean(dim=1)  # uniform attention over a text and an image token
    torch.testing.assert_close(attended, torch.tensor([expected]))


def test_each_head_has_its_own_gate():
    torch.manual_seed(0)
    runtime = Runtime()
    layer = ValueLayer(nn.Linear(3, 6, bias=False), runtime, width=3, heads=2)
    layer._active_adapter = ["default"]
    layer.update_layer("default", PillConfig(init_weights=False))
    runtime.values = {"modality_mask": torch.tensor([[1, 0]])}
    x = torch.randn(1, 2, 3)
    plain, gated = layer.base_layer(x), layer(x)
    gate = torch.tanh(x[0, 0] @ layer.cell("gate", "default").weight.T)
    torch.testing.assert_close(gated[0, 0].view(2, 3), plain[0, 0].view(2, 3) * gate[:, None])
    assert torch.equal(gated[0, 1], plain[0, 1])
