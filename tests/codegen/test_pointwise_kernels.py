"""Generated kernels: every element-wise op alone, at the ends of numbers and in every dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ingot.compiler.ir import Op
from ingot.compiler.ops import pointwise as ops
from ingot.compiler.ops.glu import ACTIVATIONS, CLAMPED, glu
from ingot.compiler.ops.shape import arange, full
from ingot.compiler.torch_types import torch_dtype
from kernel_checks import ON_DEVICE, Strided, build_everywhere, check_node, run_node

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNARY = sorted(ops.UNARY, key=lambda op: op.name)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("op", UNARY, ids=lambda op: op.name)
def test_one_operand(op: Op, dtype: torch.dtype) -> None:
    x = draw(3, 7, dtype=dtype)
    if op.name in ("log", "sqrt", "rsqrt"):
        x = x.abs() + 0.1
    check_node(op, (x,))


@pytest.mark.parametrize("op", [*UNARY, ops.gelu, ops.clamp], ids=lambda op: op.name)
def test_the_ends_of_the_number_line(op: Op) -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 100.0, -100.0, 1e-30])
    attrs = {"gelu": {"approximate": "tanh"}, "clamp": {"min": -1.0, "max": torch.inf}}
    if op.name in ("sin", "cos", "exp", "expm1"):
        x = x[[0, 1, 4, 7]]
    found, plain, _ = run_node(op, (x,), attrs.get(op.name, {}))
    (expected_,) = plain.reference()
    torch.testing.assert_close(found[0], expected_, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize(
    ("op", "exact"),
    [
        (ops.tanh, torch.tanh),
        (ops.expm1, torch.expm1),
        (ops.softplus, torch.nn.functional.softplus),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_right_to_the_last_bits_near_zero_and_far_out(
    op: Op, exact: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.cat([draw(200).clamp(-4, 4) * 10.0**e for e in range(-8, 2)])
    (found,), _, _ = run_node(op, (x,), {})
    # A GPU's exponential is 2 ** (x · log2 e): half an ulp of that argument, at most 58 here, is
    # 1.9e-6, which times ln 2 is the relative error; the power and its rounding have 3e-7.
    rtol = 2e-6 if ON_DEVICE else 1e-6
    torch.testing.assert_close(found.double(), exact(x.double()), rtol=rtol, atol=1e-37)


@pytest.mark.parametrize("op", [ops.floor, ops.expm1, ops.softplus], ids=lambda op: op.name)
def test_they_build_for_every_target(op: Op) -> None:
    build_everywhere(op, (draw(64, 512, dtype=torch.bfloat16),))
    build_everywhere(op, (draw(8, 48),))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gelu(approximate: str, dtype: torch.dtype) -> None:
    check_node(ops.gelu, (draw(300, dtype=dtype),), {"approximate": approximate})


@pytest.mark.parametrize("dtype", FLOATS)
def test_clamp(dtype: torch.dtype) -> None:
    check_node(ops.clamp, (draw(5, 9, dtype=dtype),), {"min": -0.5, "max": 0.25})
    check_node(ops.clamp, (draw(5, 9, dtype=dtype),), {"min": 0.0, "max": torch.inf})


KINDS = ("bool", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64")


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_cast(kind: str, to: str) -> None:
    x = torch.tensor([0.0, 1.0, 2.6, 5.0, 100.25, 0.1, 1e-5]).to(torch_dtype(kind))
    (found,), _, _ = run_node(ops.cast, (x,), {"dtype": to})
    assert torch.equal(found.to(torch_dtype(to)), x.to(torch_dtype(to)))


def test_cast_to_bf16_rounds_to_the_nearest_even() -> None:
    x = torch.cat([draw(300) * 10.0**e for e in (-20, 0, 20)])
    (found,), _, _ = run_node(ops.cast, (x,), {"dtype": "bf16"})
    assert torch.equal(found, x.bfloat16().float())


PAIRS = (ops.add, ops.sub, ops.mul, ops.div, ops.maximum, ops.minimum)
COMPARED = (ops.lt, ops.le, ops.gt, ops.ge, ops.eq, ops.ne)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("op", PAIRS, ids=lambda op: op.name)
def test_two_operands(op: Op, dtype: torch.dtype) -> None:
    y = draw(7, dtype=dtype)
    y = y + 2 * y.sign()
    check_node(op, (draw(3, 5, 7, dtype=dtype), y))
    check_node(op, (draw(4, 1, dtype=dtype), y))
    check_node(op, (draw(5, 7, dtype=dtype), 0.3))
    check_node(op, (0.3, y))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("op", [o for o in PAIRS if o is not ops.div], ids=lambda op: op.name)
def test_integers_wrap_around(op: Op, dtype: torch.dtype) -> None:
    ends = torch.iinfo(dtype)
    x = torch.tensor([ends.max, ends.min, 3, 100], dtype=dtype)
    check_node(op, (x, torch.tensor([2, 1, 7, 100], dtype=dtype)))
    check_node(op, (x, 3))


@pytest.mark.parametrize("dtype", [torch.int32, *FLOATS])
@pytest.mark.parametrize("op", COMPARED, ids=lambda op: op.name)
def test_comparisons(op: Op, dtype: torch.dtype) -> None:
    x = torch.tensor([-1, 0, 1, 2, 2]).to(dtype)
    check_node(op, (x, torch.tensor([-1, 1, 0, 2, 3]).to(dtype)))
    check_node(op, (x, 2))


def test_a_literal_is_compared_in_the_dtype_of_the_tensor() -> None:
    x = torch.tensor([0.1, 0.2]).bfloat16()
    (found,), _, _ = run_node(ops.eq, (x, 0.1), {})
    assert torch.equal(found, ops.eq.reference(x, 0.1)[0])
    assert found.tolist() == [True, False]


@pytest.mark.parametrize("op", PAIRS[4:], ids=lambda op: op.name)
def test_nan_wins(op: Op) -> None:
    x, y = torch.tensor([torch.nan, 1.0, 2.0]), torch.tensor([1.0, torch.nan, -2.0])
    check_node(op, (x, y))
    check_node(op, (x, 1.5))


@pytest.mark.parametrize("op", [ops.add, ops.mul, ops.eq, ops.ne, ops.logical_and, ops.logical_or])
def test_bools(op: Op) -> None:
    x = torch.tensor([[True, False]] * 3)
    check_node(op, (x, torch.tensor([[True], [False], [True]])))


def test_not() -> None:
    check_node(ops.logical_not, (torch.tensor([True, False, True]),))


@pytest.mark.parametrize("exponent", [2, 3, 0.5, -0.5, -1.0, 1.7, 0.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_powers_of_floats(dtype: torch.dtype, exponent: float) -> None:
    x = draw(50, dtype=dtype).abs() + 0.1
    check_node(ops.pow_, (x, exponent))
    check_node(ops.pow_, (x, torch.full((50,), exponent).to(dtype)))
    check_node(ops.pow_, (2.5, x))


def test_powers_at_the_ends() -> None:
    ends = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0, torch.inf, -torch.inf, torch.nan])
    x, y = (t.flatten().contiguous() for t in torch.meshgrid(ends, ends, indexing="ij"))
    x, y = x[~((x == 0) & (y == -1))], y[~((x == 0) & (y == -1))]
    (found,), _, _ = run_node(ops.pow_, (x, y), {})
    torch.testing.assert_close(found, x**y, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_powers_of_integers(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 2, 3, 5, 7, 11], dtype=dtype)
    y = torch.tensor([0, 5, 6, 3, 1, 2, 9], dtype=dtype)
    check_node(ops.pow_, (x, y))
    check_node(ops.pow_, (x, 3))
    if dtype.is_signed:
        check_node(ops.pow_, (torch.tensor([1, -1, -1, 2, -3], dtype=dtype), y[:5] * 0 - 3))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
def test_where(dtype: torch.dtype) -> None:
    condition = torch.randn(3, 5) > 0
    x, y = (torch.randn(n).mul(9).to(dtype) for n in ((3, 1), (5,)))
    check_node(ops.where, (condition, x, y))
    check_node(ops.where, (condition, x, -torch.inf if dtype.is_floating_point else -3))


@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED])
@pytest.mark.parametrize("dtype", FLOATS)
def test_glu(activation: str, dtype: torch.dtype) -> None:
    attrs = {"alpha": 1.702, "limit": 1.5} if activation == CLAMPED else {}
    pair = (Strided(draw(3, 300, dtype=dtype)), Strided(draw(3, 300, dtype=dtype)))
    check_node(glu, pair, {"activation": activation, **attrs})


@pytest.mark.parametrize("value", [2.5, torch.inf, -0.0, torch.nan])
def test_full(value: float) -> None:
    for dtype in ("f32", "bf16", "f64"):
        check_node(full, (), {"value": value, "shape": (3, 5), "dtype": dtype})
    check_node(full, (), {"value": 7, "shape": (), "dtype": "i64"})
    check_node(full, (), {"value": 1, "shape": (2,), "dtype": "bool"})


@pytest.mark.parametrize("dtype", ["i32", "i64", "f32", "bf16"])
def test_arange(dtype: str) -> None:
    check_node(arange, (), {"start": 3, "stop": 600, "step": 2, "dtype": dtype})


def test_strided_operands_are_read_where_they_lie() -> None:
    x = Strided(draw(3, 4, 40))
    lowered = check_node(ops.add, (x, draw(40)))
    (entry,) = lowered.program.entries
    assert [launch.label.split()[0] for launch in entry.launches] == ["add"]


def test_nothing_is_computed_of_nothing() -> None:
    check_node(ops.add, (draw(0, 3), draw(3)), tolerance=1.0)
