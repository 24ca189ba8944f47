"""The compiled operator: equal to eager, honest where it cannot be built, silent where it was not asked for."""

import itertools
import math
import sys

import pytest
import torch
from common.expert_banks import EXPERTS, LAYOUTS, make_bank, make_inputs, run, with_implementation

from hf_moe.experts.kernels import compiled, selection
from hf_moe.experts.kernels.epilogue import CompiledSiluGate, compiled_epilogue, known_epilogue
from hf_moe.experts.kernels.front import choose_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_eager(compiled_operator, layout, dtype):
    bank = make_bank(layout, dtype)
    exact = make_bank(layout, dtype).double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for tokens in (0, 1, 3, 40):
        hidden, index, weights = make_inputs(tokens, dtype=dtype)
        with torch.no_grad():
            output = with_implementation(bank, "hf_moe_compiled")(hidden, index, weights)
            again = with_implementation(bank, "hf_moe_compiled")(hidden, index, weights)
            expected = exact(hidden.double(), index, weights.double())
        assert torch.equal(output, again)
        assert (output.double() - expected).norm() <= tolerance * expected.norm()


DTYPES = [torch.float32, torch.bfloat16]

# in units of the largest value: what sums in float32 lose, and a unit in the last place of bfloat16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), [(1, 1), (7, 3), (33, 66), (96, 64), (100, 35), (130, 97), (34, 208)])
def test_any_width_and_any_number_of_rows(compiled_operator, dtype, width, out):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, out, width, generator=generator).to(dtype)
    bias = torch.randn(9, out, generator=generator).to(dtype)
    counts = [1, 2, 3, 19, 55, 15, 46, 48]  # one, a few, some with and without a rest, many
    experts, ends = [0, 1, 3, 4, 5, 6, 7, 8], list(itertools.accumulate(counts))
    rows = torch.randn(ends[-1], width, generator=generator).to(dtype)
    for present in (bias, None):
        output = torch.full((ends[-1], out), math.nan, dtype=dtype)
        torch.ops.hf_moe_compiled.grouped_rows(rows, weight, present, experts, ends, output)
        start = 0
        for expert, end in zip(experts, ends, strict=True):
            expected = rows[start:end].double() @ weight[expert].double().t()
            if present is not None:
                expected += present[expert].double()
            error = (output[start:end].double() - expected).abs().max()
            assert error <= TOLERANCE[dtype] * (1 + expected.abs().max())
            start = end


def test_one_row_and_many_rows_agree_in_the_last_digits(compiled_operator):
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(1, 70, 300, generator=generator), torch.randn(40, 300, generator=generator)
    together, apart = torch.empty(40, 70), torch.empty(40, 70)
    torch.ops.hf_moe_compiled.grouped_rows(rows, weight, None, [0], [40], together)
    for i in range(40):
        torch.ops.hf_moe_compiled.grouped_rows(rows[i : i + 1], weight, None, [0], [1], apart[i : i + 1])
    assert torch.allclose(together, apart, rtol=0, atol=1e-6 * float(apart.abs().max()))


@pytest.fixture(params=DTYPES, ids=str)
def dtype_of_products(request, compiled_operator):
    """A dtype of which this CPU has the products of the backward pass."""
    operators, dtype = torch.ops.hf_moe_compiled, request.param
    if not operators.has_products(dtype):
        with pytest.raises(RuntimeError, match="no product of"):
            operators.product(*(torch.zeros(2, 2, dtype=dtype) for _ in range(3)))
        pytest.skip(f"this CPU has no product of {dtype}")
    return dtype


SIZES = [
    (1, 2, 1),
    (3, 6, 47),
    (8, 32, 48),
    (13, 10, 49),
    (21, 66, 130),
    (17, 200, 64),
    (50, 4500, 20),
    (1100, 30, 70),
]


@pytest.mark.parametrize(("rows", "inner", "out"), SIZES)
def test_products_of_any_size_are_rounded_once(dtype_of_products, rows, inner, out):
    generator, dtype = torch.Generator().manual_seed(0), dtype_of_products
    a, b, c = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, inner), (inner, out), (rows, out))
    )
    ab, ac = (torch.full(shape, math.nan, dtype=dtype) for shape in ((rows, out), (inner, out)))
    torch.ops.hf_moe_compiled.product(a, b, ab)
    torch.ops.hf_moe_compiled.transposed_product(a, c, ac)
    for found, exact, length in ((ab, a.double() @ b.double(), inner), (ac, a.double().t() @ c.double(), rows)):
        # half a unit in the last place of bfloat16, and what sums in float32 lose
        unit = 2**-8 if dtype == torch.bfloat16 else 0.0
        assert ((found.double() - exact).abs() <= exact.abs() * unit + 1e-6 * length**0.5 * 10).all()


@pytest.mark.parametrize("dtype_of_products", [torch.float32], indirect=True)
def test_float32_products_are_as_exact_as_those_of_torch(dtype_of_products):
    generator = torch.Generator().manual_seed(0)
    for length in (256, 1024, 3584):
        a, b = torch.randn(64, length, generator=generator), torch.randn(length, 96, generator=generator)
        exact, ours, rows, turned = a.double() @ b.double(), *(torch.empty(64, 96) for _ in range(3))
        torch.ops.hf_moe_compiled.product(a, b, ours)
        torch.ops.hf_moe_compiled.grouped_rows(a, b.t().contiguous()[None], None, [0], [64], rows)
        torch.ops.hf_moe_compiled.transposed_product(a.t().contiguous(), b, turned)
        limit = 1.2 * (a @ b - exact).norm()
        for found in (ours, rows, turned):
            assert (found - exact).norm() <= limit, length


def test_products_take_rows_of_larger_matrices(dtype_of_products):
    generator = torch.Generator().manual_seed(0)
    products = torch.ops.hf_moe_compiled
    large, b = torch.randn(9, 40, generator=generator), torch.randn(12, 20, generator=generator)
    large, b = large.to(dtype_of_products), b.to(dtype_of_products)
    a, c = large[:, :12], large[:, 12:32]
    ab, ac = large.new_zeros(9, 64), large.new_zeros(12, 64)
    products.product(a, b, ab[:, 8:28])
    products.transposed_product(a, c, ac[:, 8:28])
    dense_ab, dense_ac = large.new_zeros(9, 20), large.new_zeros(12, 20)
    products.product(a.contiguous(), b, dense_ab)
    products.transposed_product(a.contiguous(), c.contiguous(), dense_ac)
    for wide, dense in ((ab, dense_ab), (ac, dense_ac)):
        assert torch.equal(wide[:, 8:28], dense)
        assert not wide[:, :8].any() and not wide[:, 28:].any(), "nothing beside the result is written"


def test_the_number_of_threads_changes_nothing(dtype_of_products):
    generator, products = torch.Generator().manual_seed(0), torch.ops.hf_moe_compiled
    a, b = torch.randn(40, 300, generator=generator), torch.randn(300, 600, generator=generator)
    a, b = a.to(dtype_of_products), b.to(dtype_of_products)
    stacked = b.t().contiguous()[None]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            ab, rows, turned = a.new_empty(40, 600), a.new_empty(40, 600), a.new_empty(300, 300)
            products.product(a, b, ab)
            products.grouped_rows(a, stacked, None, [0], [40], rows)
            products.transposed_product(a, a, turned)
            found.append((ab, rows, turned))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (3, 33), (40, 64)])
def test_the_compiled_gate_is_that_of_torch(dtype_of_products, rows, width):
    generator, dtype = torch.Generator().manual_seed(0), dtype_of_products
    epilogue = known_epilogue(torch.nn.SiLU(), gated=True)
    ours = compiled_epilogue(epilogue, dtype)
    assert type(ours) is CompiledSiluGate
    projected = (4 * torch.randn(rows, 2 * width, generator=generator)).to(dtype)
    grad = torch.randn(rows, width, generator=generator).to(dtype)
    exact, out = projected.double(), torch.full((rows, width), math.nan, dtype=dtype)
    expected = epilogue.forward(exact, torch.empty(rows, width, dtype=torch.float64))
    epilogue.backward(exact, grad.double(), torch.empty(rows, width, dtype=torch.float64))
    ours.forward(projected, out)
    ours.backward(projected, grad, grad)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(projected.double(), exact, **tolerance)


def test_the_compiled_gate_at_the_ends_of_the_numbers(dtype_of_products):
    projected = torch.tensor([[math.nan, math.inf, 200.0, -200.0, 0.0] + [1.0] * 5], dtype=dtype_of_products)
    out = torch.empty(1, 5, dtype=dtype_of_products)
    torch.ops.hf_moe_compiled.silu_gate(projected, out)
    assert out[0, 0].isnan() and out[0, 1:3].tolist() == [math.inf, 200.0] and out[0, 4] == 0
    assert -1e-30 < out[0, 3] <= 0
    with pytest.raises(RuntimeError, match="shapes"):
        torch.ops.hf_moe_compiled.silu_gate(projected, out[:, :4].contiguous())
    with pytest.raises(RuntimeError, match="dtypes"):
        torch.ops.hf_moe_compiled.silu_gate_backward(projected, out.double())


def test_other_activations_stay_with_torch(compiled_operator):
    for function, gated in ((torch.nn.GELU(), True), (torch.nn.SiLU(), False)):
        epilogue = known_epilogue(function, gated)
        assert compiled_epilogue(epilogue, torch.float32) is epilogue
    silu = known_epilogue(torch.nn.SiLU(), True)
    assert compiled_epilogue(silu, torch.float16) is silu


def test_loops_run_on_all_threads(compiled_operator):
    if not compiled._threads():
        pytest.skip("not this compiler")
    library = compiled.build_compiled().read_bytes()
    assert b"GOMP_parallel" in library
    assert b"libgomp.so" not in library, "the threads are torch's"


def test_products_refuse_what_they_cannot_read(dtype_of_products):
    products, dtype = torch.ops.hf_moe_compiled, dtype_of_products
    a, b, out = (torch.zeros(shape, dtype=dtype) for shape in ((2, 4), (4, 6), (2, 6)))
    wrong = [(a, b[:2], out), (a, b, out[:1]), (a.double(), b, out), (a, b.double(), out), (a.t(), a, b)]
    if dtype == torch.bfloat16:
        wrong.append((a[:, :3], b[:3], out))  # numbers are read in pairs
    for arguments in wrong:
        with pytest.raises(RuntimeError):
            products.product(*arguments)
    with pytest.raises(RuntimeError):
        products.transposed_product(a, b, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_as_exact_as_those_of_torch(compiled_operator, layout, dtype):
    inputs = make_inputs(200, dtype=dtype)
    exact = run(make_bank(layout, dtype).double(), *(t.double() if t.is_floating_point() else t for t in inputs))

    def results(implementation):
        return run(with_implementation(make_bank(layout, dtype), implementation), *inputs)

    ours, again, theirs = results("hf_moe_compiled"), results("hf_moe_compiled"), results("hf_moe_exact")
    for name, value in ours.items():
        assert torch.equal(value, again[name]), name
        scale = exact[name].norm()
        error, other = ((found.double() - exact[name]).norm() / scale for found in (value, theirs[name]))
        assert error <= 1.4 * other, (name, float(error), float(other))


def test_many_rows_without_gradients_are_those_of_the_training_forward(compiled_operator):
    bank = make_bank(dtype=torch.bfloat16, implementation="hf_moe_compiled")
    hidden, index, weights = make_inputs(1200, dtype=torch.bfloat16)
    trained = bank(hidden, index, weights)
    assert trained.requires_grad
    with torch.no_grad():
        assert torch.equal(bank(hidden, index, weights), trained)


def test_wrong_arguments_are_refused(compiled_operator):
    rows, weight, out = torch.zeros(2, 4), torch.zeros(3, 5, 4), torch.zeros(2, 5)
    for experts, ends in ([[3], [2]], [[0], [3]], [[-1], [1]], [[0, 1], [2]]):
        with pytest.raises(RuntimeError):
            torch.ops.hf_moe_compiled.grouped_rows(rows, weight, None, experts, ends, out)
    with pytest.raises(RuntimeError, match="dtypes"):
        torch.ops.hf_moe_compiled.grouped_rows(rows.double(), weight, None, [0], [1], out)


def test_empty_slots_cost_nothing_and_give_nothing(compiled_operator):
    bank = make_bank(dtype=torch.float32, implementation="hf_moe_compiled")
    hidden, index, weights = make_inputs(dtype=torch.float32)
    with torch.no_grad():
        assert not bank(hidden, torch.full_like(index, EXPERTS), torch.zeros_like(weights)).any()


def test_the_automatic_choice_uses_it_only_where_the_table_says_so(compiled_operator, monkeypatch):
    bank, inputs = make_bank(dtype=torch.float32), make_inputs(dtype=torch.float32)
    with torch.no_grad():
        assert choose_path(bank, *inputs) != "compiled"
        table = selection.SelectionTable({"float32/inference": ((math.inf, "compiled"),)})
        monkeypatch.setattr("hf_moe.experts.kernels.front.load_table", lambda: table)
        assert choose_path(bank, *inputs) == "compiled"
        assert choose_path(make_bank("transposed", torch.float32), *inputs) == "decode"


def test_without_a_compiler_the_error_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path / "absent")
    with pytest.raises(ImportError, match=r'needs a C\+\+ compiler.*experts_implementation="hf_moe"'):
        compiled.build_compiled()
    assert not (tmp_path / "absent").exists()


def test_nothing_is_built_unless_it_was_asked_for(run_python):
    code = """
import torch, hf_moe
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
config = MixtralConfig(hidden_size=16, intermediate_size=32, num_local_experts=4)
config._experts_implementation = "hf_moe"
with torch.no_grad():
    MixtralExperts(config)(torch.zeros(1, 16), torch.zeros(1, 2).long(), torch.zeros(1, 2))
print(hasattr(torch.ops.hf_moe_compiled, "grouped_rows"))
"""
    result = run_python(code, env={"HF_HOME": "."})
    assert result.stdout.split()[-1:] == ["False"], result.stderr


def test_a_failed_build_leaves_nothing_behind(monkeypatch, tmp_path):
    from torch.utils import cpp_extension

    def fail(**kwargs):
        raise RuntimeError("Error building extension")

    monkeypatch.setattr(compiled, "compiler", lambda: sys.executable)
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path / "key")
    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.raises(ImportError, match="could not be built"):
        compiled.build_compiled()
    assert list(tmp_path.iterdir()) == []
