"""Which path runs, where the table lives, and that a broken table is no table."""

import json
import math

import pytest
import torch
from common.expert_banks import EXPERTS, make_bank, make_inputs

from hf_moe.experts.kernels import selection
from hf_moe.experts.kernels.buckets import bucket_rows
from hf_moe.experts.kernels.dispatch import compact_dispatch
from hf_moe.experts.kernels.front import choose_path
from hf_moe.experts.kernels.selection import DEFAULT_TABLE, PATHS, SelectionTable, load_table, save_table


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "default_cache_dir", lambda: tmp_path)
    load_table.cache_clear()
    yield
    load_table.cache_clear()


def path_of(bank, tokens=8, slots=2, grad=False, index=None):
    with torch.set_grad_enabled(grad):
        return choose_path(bank, *make_inputs(tokens, slots, dtype=bank.down_proj.dtype, index=index))


def test_defaults_name_known_paths_and_cover_every_number_of_rows():
    for rules in DEFAULT_TABLE.rules.values():
        limits = [limit for limit, _ in rules]
        assert limits == sorted(limits) and math.isinf(limits[-1])
        assert all(name in PATHS for _, name in rules)


def test_defaults_follow_rows_dtype_and_gradients():
    low, full = make_bank(dtype=torch.bfloat16), make_bank(dtype=torch.float32)
    assert path_of(low, tokens=1) == path_of(full, tokens=1) == "decode"
    assert path_of(low, tokens=500) == "bucketed"
    assert path_of(full, tokens=500) == "exact"
    assert path_of(low, tokens=500, grad=True) == "bucketed"
    assert path_of(full, tokens=8, grad=True) == "grouped_mm"


def test_what_grouped_mm_cannot_do_is_ours():
    assert path_of(make_bank(), tokens=8, grad=True) == "exact"  # float64
    assert path_of(make_bank(dtype=torch.float32), tokens=0, grad=True) == "exact"
    assert path_of(make_bank("activation_with_parameters")) == "composed"


def test_mostly_empty_slots_are_ours():
    bank = make_bank(dtype=torch.float32)
    bank._is_expert_parallel = True
    index = torch.full((40, 4), EXPERTS)
    index[:, 0] = 1
    assert path_of(bank, 40, 4, grad=True, index=index) == "exact"


def test_a_measured_table_is_used_and_survives_a_new_process():
    path = save_table(SelectionTable({"float32/inference": ((2.0, "exact"), (math.inf, "grouped_mm"))}))
    table = load_table()
    assert table.source == str(path)
    assert table.choose(torch.float32, False, 1.0) == "exact"
    assert table.choose(torch.float32, False, 3.0) == "grouped_mm"
    assert table.choose(torch.bfloat16, False, 1.0) == "decode", "what was not measured has its default"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "[]",
        '{"version": 0}',
        json.dumps({"version": 1, "machine": "another", "rules": {}}),
        lambda: json.dumps({"version": 1, "machine": selection.machine(), "rules": {"float32/inference": []}}),
        lambda: json.dumps({"version": 1, "machine": selection.machine(), "rules": {"x": [[None, "no such path"]]}}),
        lambda: json.dumps({"version": 1, "machine": selection.machine(), "rules": {"x": [[4, "exact"]]}}),
    ],
)
def test_a_table_that_cannot_be_used_is_no_table(content):
    path = selection.table_path()
    path.parent.mkdir(parents=True)
    path.write_text(content if isinstance(content, str) else content())
    assert load_table() is DEFAULT_TABLE


def test_buckets_are_few_ordered_and_waste_at_most_an_eighth():
    sizes = [bucket_rows(n) for n in range(1, 8193)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 90
    assert all(n <= size for n, size in enumerate(sizes, start=1))
    assert all(size <= 1.125 * n + 15 for n, size in enumerate(sizes, start=1))
    assert all(bucket_rows(size) == size for size in sizes)


@pytest.mark.parametrize("tokens", [0, 1, 5, 200])
def test_dispatch_is_the_sort_of_the_slots_in_use(tokens):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, EXPERTS + 1, (tokens, 3), generator=generator)
    dispatch = compact_dispatch(index, EXPERTS)
    flat = index.flatten()
    assert dispatch.num_rows == int((flat < EXPERTS).sum())
    start = 0
    for expert, begin, end in dispatch.segments:
        assert begin == start < end
        start = end
        assert (flat[dispatch.slots[begin:end]] == expert).all()
        assert (dispatch.slots[begin:end].diff() > 0).all()
        assert torch.equal(dispatch.tokens[begin:end], dispatch.slots[begin:end] // 3)
    assert start == dispatch.num_rows
    used = (flat < EXPERTS).nonzero()[:, 0]
    assert torch.equal(dispatch.slots[dispatch.rows], used)
