"""Kernels that join, gather and reduce along one dim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.ir import Op
from ingot.compiler.ops.hadamard import hadamard
from ingot.compiler.ops.reduce import amax, argmax, mean, softmax, sum_, topk
from ingot.compiler.ops.shape import cat, gather, scatter, slice_scatter
from kernel_checks import Strided, build_everywhere, check_node, run_node

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat(dim: int) -> None:
    parts = []
    for size in (3, 1, 40):
        shape = [2, 3, 40]
        shape[dim] = size
        parts.append(torch.randn(shape).bfloat16())
    check_node(cat, parts, {"dim": dim}, tolerance=1e-9)
    check_node(cat, [Strided(p) for p in parts], {"dim": dim}, tolerance=1e-9)


@pytest.mark.parametrize(("start", "stop", "step"), [(1, 4, 1), (0, 5, 1), (1, 5, 2)])
def test_slice_scatter(start: int, stop: int, step: int) -> None:
    for dim, shape in ((0, (5, 3, 7)), (1, (3, 5, 7)), (-1, (3, 7, 5))):
        x = torch.randn(shape)
        index = [slice(None)] * 3
        index[dim] = slice(start, stop, step)
        src = torch.randn(x[tuple(index)].shape)
        attrs = {"dim": dim, "start": start, "stop": stop, "step": step}
        check_node(slice_scatter, (x, src), attrs, tolerance=1e-9)


REDUCTIONS = (sum_, mean, amax)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", REDUCTIONS, ids=lambda op: op.name)
def test_reductions(op: Op, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, 17).to(dtype)
    for dim in (0, 1, -1):
        for keepdim in (True, False):
            check_node(op, (x,), {"dim": dim, "keepdim": keepdim})
    check_node(op, (Strided(torch.randn(3, 40).to(dtype)),), {"dim": 0, "keepdim": False})
    check_node(op, (torch.randn(9).to(dtype),), {"dim": 0, "keepdim": False})


def test_long_lines_are_reduced_in_blocks() -> None:
    x = torch.randn(2, 9001)
    for op in REDUCTIONS:
        check_node(op, (x,), {"dim": -1, "keepdim": True})
    check_node(softmax, (x,), {"dim": -1})


def test_nan_and_infinities() -> None:
    x = torch.randn(4, 8)
    x[0, 3], x[1, 0], x[2, :] = torch.nan, torch.inf, -torch.inf
    for op in REDUCTIONS:
        check_node(op, (x,), {"dim": -1, "keepdim": False})
    check_node(softmax, (x,), {"dim": -1})


@pytest.mark.parametrize("dtype", FLOATS)
def test_softmax(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 2, 17) * 20).to(dtype)
    for dim in (0, 1, -1):
        check_node(softmax, (x,), {"dim": dim})
    check_node(softmax, (Strided(torch.randn(3, 40).to(dtype)),), {"dim": -1})


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.int64, torch.uint8])
def test_topk(dtype: torch.dtype) -> None:
    places = torch.randperm(3 * 40).view(3, 40)
    x = (places * 2 if dtype == torch.uint8 else places - 50).to(dtype)
    if dtype == torch.int64:
        x = x * 2**40
    for dim, k in ((-1, 6), (0, 2), (1, 40)):
        check_node(topk, (x,), {"k": k, "dim": dim}, tolerance=1e-9)
    check_node(topk, (Strided(x),), {"k": 3, "dim": -1}, tolerance=1e-9)


def test_topk_of_equals_takes_the_first_and_nan_is_the_largest() -> None:
    x = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [-torch.inf, 1.0, torch.nan, -torch.inf, 3.0]])
    (values, indices), _, _ = run_node(topk, (x,), {"k": 5, "dim": -1})
    assert indices.tolist() == [[1, 2, 4, 0, 3], [2, 4, 1, 0, 3]]
    torch.testing.assert_close(values, x.gather(1, indices), equal_nan=True)
    least = torch.full((1, 3), torch.iinfo(torch.int64).min)
    (_, indices), _, _ = run_node(topk, (least,), {"k": 3, "dim": -1})
    assert indices.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.int64, torch.uint8])
def test_argmax(dtype: torch.dtype) -> None:
    x = torch.randint(0, 9, (3, 2, 40)).to(dtype)
    for dim in (0, 1, -1):
        for keepdim in (True, False):
            check_node(argmax, (x,), {"dim": dim, "keepdim": keepdim})
    check_node(argmax, (Strided(x[0]),), {"dim": 0, "keepdim": False})


def test_argmax_of_equals_takes_the_first_and_nan_is_the_largest() -> None:
    x = torch.full((4, 9001), -torch.inf)
    x[1, 7000], x[1, 8000], x[2, 5000:] = 2.0, 2.0, torch.nan
    x[3, 3], x[3, 8500] = -0.0, 0.0
    (found,), _, _ = run_node(argmax, (x,), {"dim": -1, "keepdim": False})
    assert found.tolist() == [0, 7000, 5000, 3]
    least = torch.full((1, 300), torch.iinfo(torch.int64).min)
    (found,), _, _ = run_node(argmax, (least,), {"dim": -1, "keepdim": True})
    assert found.tolist() == [[0]]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.data())
@settings(max_examples=20, deadline=None)
def test_topk_is_a_stable_sort(numbers: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(numbers)))
    x = torch.tensor(numbers)
    (values, indices), _, _ = run_node(topk, (x,), {"k": k, "dim": 0})
    expected = x.sort(descending=True, stable=True)
    assert torch.equal(indices, expected.indices[:k])
    assert torch.equal(values, expected.values[:k])


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        *((op, {"dim": -1, "keepdim": True}) for op in REDUCTIONS),
        (argmax, {"dim": -1, "keepdim": True}),
        (softmax, {"dim": -1}),
        (topk, {"dim": -1, "k": 3}),
        (hadamard, {"block": 32}),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_a_line_does_not_depend_on_the_others(op: Op, attrs: dict[str, Any]) -> None:
    x = torch.randn(5, 160).bfloat16()
    whole, _, _ = run_node(op, (x,), attrs)
    part, _, _ = run_node(op, (x[3:4].clone(),), attrs)
    assert all(torch.equal(a, b[3:4]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_gather(dim: int, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 5, 6) * 9).to(dtype)
    shape = list(x.shape)
    shape[dim] = 3
    index = torch.randint(0, x.shape[dim], shape)
    check_node(gather, (x, index), {"dim": dim}, tolerance=1e-9)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_scatter(dim: int, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 5, 6) * 9).to(dtype)
    shape = list(x.shape)
    shape[dim] = 3
    index = torch.randint(0, x.shape[dim], shape)
    value = 1 if dtype == torch.bool else -3
    check_node(scatter, (x, index), {"dim": dim, "value": value}, tolerance=1e-9)
    check_node(scatter, (Strided(x), index), {"dim": dim, "value": value}, tolerance=1e-9)


def test_infinity_is_scattered_and_no_index_leaves_all_as_it_is() -> None:
    x = torch.randn(3, 300)
    index = torch.randint(0, 300, (3, 200))
    check_node(scatter, (x, index), {"dim": 1, "value": -torch.inf})
    check_node(scatter, (x, index[:, :0]), {"dim": 1, "value": 0.0}, tolerance=1e-9)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block", [1, 2, 16, 32, 128, 1024])
def test_hadamard(block: int, dtype: torch.dtype) -> None:
    check_node(hadamard, (torch.randn(3, 3 * block).to(dtype),), {"block": block})


def test_they_build_for_every_target() -> None:
    x = torch.randn(4, 4096).bfloat16()
    build_everywhere(cat, (x, x.clone()), {"dim": -1})
    build_everywhere(mean, (x,), {"dim": -1, "keepdim": True})
    build_everywhere(amax, (x,), {"dim": 0, "keepdim": True})
    build_everywhere(softmax, (torch.randn(4, 128),), {"dim": -1})
    build_everywhere(topk, (torch.randn(4, 256),), {"k": 8, "dim": -1})
    build_everywhere(argmax, (x,), {"dim": -1, "keepdim": False})
    index = torch.zeros(4, 8, dtype=torch.int64)
    build_everywhere(gather, (x, index), {"dim": -1})
    build_everywhere(scatter, (x, index), {"dim": -1, "value": 1.0})
    build_everywhere(hadamard, (x,), {"block": 32})
