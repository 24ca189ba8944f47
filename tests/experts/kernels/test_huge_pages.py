"""Asking for huge pages changes no value, and is skipped where it makes no sense."""

import mmap

import pytest
import torch

from hf_moe.experts.kernels import huge_pages
from hf_moe.experts.kernels.huge_pages import advise_huge_pages


@pytest.fixture
def asked(monkeypatch):
    calls = []
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *call: calls.append(call))
    return calls


def test_whole_pages_inside_a_large_tensor_are_asked_for(asked):
    tensor = torch.empty(5 << 20)
    assert advise_huge_pages(tensor) is tensor
    ((begin, length, advice),) = asked
    assert advice == mmap.MADV_HUGEPAGE and begin % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
    assert tensor.data_ptr() <= begin and begin + length <= tensor.data_ptr() + (20 << 20)
    assert length > (20 << 20) - 2 * mmap.PAGESIZE


@pytest.mark.parametrize(
    "tensor", [torch.empty(100), torch.empty(1 << 30, device="meta"), torch.nn.Parameter(torch.empty(5 << 20))]
)
def test_small_foreign_and_wrapped_tensors_are_left_alone(asked, tensor):
    assert advise_huge_pages(tensor) is tensor
    assert asked == []


def test_the_real_advice_keeps_what_was_written():
    tensor = torch.arange(4 << 20)
    assert torch.equal(advise_huge_pages(tensor), torch.arange(4 << 20))


def test_systems_without_the_advice_do_nothing(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    huge_pages._madvise.cache_clear()
    try:
        assert huge_pages._madvise() is None
        assert advise_huge_pages(torch.ones(5 << 20)).sum() == 5 << 20
    finally:
        huge_pages._madvise.cache_clear()
