import pytest
import torch

from hf_moe.quantization.mote.packing import pack, packed_rows, unpack


T = torch.tensor([[1, 0, -1], [0, -1, 1], [-1, 1, 0], [1, 1, -1]], dtype=torch.int8)


def test_two_bits_are_laid_out_as_transformers_lays_out_bitnet():
    packed = pack(T)
    # The byte of a column is the sum of (weight + 1) 4^block, one row to a block here.
    assert packed.tolist() == [[134, 161, 24]] and packed.dtype == torch.uint8


def test_five_trits_fit_a_byte():
    assert pack(torch.tensor([[1], [0], [-1], [0], [-1]]), "base3").tolist() == [[32]]
    assert pack(torch.ones(5, 1, dtype=torch.int8), "base3").item() == 3**5 - 1


@pytest.mark.parametrize("packing", ["2bit", "base3"])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 10, 17])
def test_unpacking_returns_what_was_packed(packing, rows):
    codes = torch.randint(-1, 2, (3, rows, 7), generator=torch.Generator().manual_seed(rows), dtype=torch.int8)
    packed = pack(codes, packing)
    assert packed.shape == (3, packed_rows(rows, packing), 7)
    assert torch.equal(unpack(packed, rows, packing), codes)
