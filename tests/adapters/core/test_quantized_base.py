"""A base whose weights are integers: adapters beside it work, merging into it is refused."""

import pytest
import torch
from common.toy_adapters import ToyLinearConfig
from peft import get_peft_model
from torch import nn


class Int8Linear(nn.Linear):
    """Weights rounded to 8 bits, one scale per row."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        scale = self.weight.data.abs().amax(1, keepdim=True) / 127
        integers = (self.weight.data / scale).round().to(torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_an_int8_base_is_adapted_but_not_merged():
    torch.manual_seed(0)
    base = nn.Sequential(Int8Linear(8, 6))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = base(x)
    model = get_peft_model(base, ToyLinearConfig(target_modules=["0"]))
    assert torch.equal(model(x), expected)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(NotImplementedError, match="quantised"):
        model.merge_and_unload()
    assert torch.equal(model.unload()(x), expected)
