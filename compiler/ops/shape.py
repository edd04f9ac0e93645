"""Ops that move or select elements and compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..axes import Axes, along_dim, elementwise, permuted, reshaped, rule
from ..dtypes import DTYPES, FLOATS, INTEGERS
from ..ir import Cost, Op, Operands, Sample, free
from ..torch_types import torch_dtype
from ..types import Dim, Shape, TensorType, Types, VerifyError, dim

_T = TensorType("f32", (4, 6))


def axis_of(name: str, x: TensorType, axis: int) -> int:
    """`axis` counted from the left; VerifyError when `x` has no such axis."""
    if not -x.rank <= axis < x.rank:
        raise VerifyError(f"{name}: {x} has no dim {axis}")
    return axis % x.rank


def replaced(shape: Shape, axis: int, size: Dim) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


# ---- view: the same elements in row-major order


def _view_infer(x: TensorType, *, shape: Shape) -> Types:
    result = x.with_shape(shape)
    if result.numel != x.numel:
        raise VerifyError(f"view: {x} has {x.numel} elements, {list(shape)} has {result.numel}")
    return (result,)


view = Op(
    "view",
    _view_infer,
    torch.reshape,
    free,
    (Sample((_T,), {"shape": (2, 2, 6)}),),
    axes=reshaped,
)


# ---- permute


def _permute_infer(x: TensorType, *, dims: tuple[int, ...]) -> Types:
    if sorted(dims) != list(range(x.rank)):
        raise VerifyError(f"permute: {list(dims)} is no permutation of the dims of {x}")
    return (x.with_shape(tuple(x.shape[d] for d in dims)),)


permute = Op(
    "permute",
    _permute_infer,
    torch.permute,
    samples=(Sample((_T,), {"dims": (1, 0)}),),
    axes=permuted,
)


# ---- expand: unit dims repeated


def _expand_infer(x: TensorType, *, shape: Shape) -> Types:
    tail = shape[len(shape) - x.rank :]
    if len(shape) < x.rank or any(a not in (1, b) for a, b in zip(x.shape, tail, strict=True)):
        raise VerifyError(f"expand: {x} does not expand to {list(shape)}")
    return (x.with_shape(shape),)


def _expand_reference(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    return x.expand(shape)


expand = Op(
    "expand",
    _expand_infer,
    _expand_reference,
    samples=(Sample((TensorType("f32", (4, 1)),), {"shape": (2, 4, 3)}),),
    axes=elementwise,
)


# ---- slice and slice_scatter: every step-th index of [start, stop) along one dim


def _length(start: Dim, stop: Dim, step: int) -> Dim:
    return dim(-((start - stop) // step) if step != 1 else stop - start)


def _check_slice(name: str, x: TensorType, axis: int, start: Dim, stop: Dim, step: int) -> int:
    axis = axis_of(name, x, axis)
    # Where symbols leave a gap's sign open, it is taken to be right.
    gaps = [dim(g) for g in (start, stop - start, x.shape[axis] - stop)]
    if step < 1 or any(isinstance(g, int) and g < 0 for g in gaps):
        raise VerifyError(f"{name}: [{start}, {stop}) by {step} is not within dim {axis} of {x}")
    return axis


def _slice_infer(x: TensorType, *, dim: int, start: Dim, stop: Dim, step: int = 1) -> Types:
    axis = _check_slice("slice", x, dim, start, stop, step)
    return (x.with_shape(replaced(x.shape, axis, _length(start, stop, step))),)


def _slice_reference(
    x: torch.Tensor, *, dim: int, start: int, stop: int, step: int = 1
) -> torch.Tensor:
    return x[(slice(None),) * (dim % x.ndim) + (slice(start, stop, step),)]


def picked(index: str = "") -> Callable[..., Cost]:
    """The cost of reading and writing the result, and reading the indices in operand `index`."""

    def cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
        return Cost(0, results[0].nbytes * 2 + (operands[index].nbytes if index else 0))

    return cost


slice_ = Op(
    "slice",
    _slice_infer,
    _slice_reference,
    picked(),
    (
        Sample((_T,), {"dim": 1, "start": 1, "stop": 5}),
        Sample((_T,), {"dim": 1, "start": 0, "stop": 6, "step": 2}),
    ),
    axes=along_dim(),
)


def _slice_scatter_infer(
    x: TensorType, src: TensorType, *, dim: int, start: Dim, stop: Dim, step: int = 1
) -> Types:
    axis = _check_slice("slice_scatter", x, dim, start, stop, step)
    expected = x.with_shape(replaced(x.shape, axis, _length(start, stop, step)))
    if src != expected:
        raise VerifyError(f"slice_scatter: expected a source {expected}, found {src}")
    return (x,)


def _slice_scatter_reference(
    x: torch.Tensor, src: torch.Tensor, *, dim: int, start: int, stop: int, step: int = 1
) -> torch.Tensor:
    return torch.slice_scatter(x, src, dim, start, stop, step)


slice_scatter = Op(
    "slice_scatter",
    _slice_scatter_infer,
    _slice_scatter_reference,
    samples=(Sample((_T, TensorType("f32", (4, 2))), {"dim": 1, "start": 1, "stop": 3}),),
    axes=along_dim(),
)


# ---- cat


def _cat_infer(*xs: TensorType, dim: int) -> Types:
    if not xs:
        raise VerifyError("cat: expected at least one operand")
    axis = axis_of("cat", xs[0], dim)
    for x in xs[1:]:
        same_rank = x.rank == xs[0].rank and x.dtype == xs[0].dtype
        if not same_rank or replaced(x.shape, axis, 0) != replaced(xs[0].shape, axis, 0):
            raise VerifyError(f"cat: {x} differs from {xs[0]} in more than dim {axis}")
    size: Any = sum(x.shape[axis] for x in xs)
    return (xs[0].with_shape(replaced(xs[0].shape, axis, size)),)


def _cat_reference(*xs: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat(xs, dim)


cat = Op(
    "cat",
    _cat_infer,
    _cat_reference,
    samples=(Sample((_T, _T), {"dim": -1}),),
    axes=along_dim(),
)


# ---- tensors out of nothing


def _full_infer(*, value: bool | int | float, shape: Shape, dtype: str) -> Types:
    if dtype not in DTYPES:
        raise VerifyError(f"full: unknown dtype {dtype!r}")
    return (TensorType(dtype, tuple(dim(d) for d in shape)),)


def _full_reference(
    *, value: bool | int | float, shape: tuple[int, ...], dtype: str
) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch_dtype(dtype))


full = Op(
    "full",
    _full_infer,
    _full_reference,
    samples=(
        Sample((), {"value": 2.5, "shape": (2, 3), "dtype": "f32"}),
        Sample((), {"value": True, "shape": (4,), "dtype": "bool"}),
    ),
    axes=elementwise,
)


def _arange_infer(*, start: Dim, stop: Dim, step: int, dtype: str) -> Types:
    if step < 1 or dtype not in (*INTEGERS, *FLOATS):
        raise VerifyError(f"arange: expected a positive step of numbers, found {step} of {dtype}")
    return (TensorType(dtype, (_length(start, stop, step),)),)


def _arange_reference(*, start: int, stop: int, step: int, dtype: str) -> torch.Tensor:
    return torch.arange(start, stop, step, dtype=torch_dtype(dtype))


arange = Op(
    "arange",
    _arange_infer,
    _arange_reference,
    samples=(Sample((), {"start": 0, "stop": 5, "step": 1, "dtype": "i64"}),),
    axes=rule("-> [n]; n whole"),
)


# ---- rows and elements by index


def _take_infer(x: TensorType, rows: TensorType) -> Types:
    if rows.dtype not in ("i32", "i64") or x.rank < 1:
        raise VerifyError(f"take: expected a tensor and i32 or i64 rows, found {x} and {rows}")
    return (x.with_shape((*rows.shape, *x.shape[1:])),)


def _take_reference(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, rows.flatten()).view((*rows.shape, *x.shape[1:]))


def _take_axes(operands: Operands, results: Types, attrs: Mapping[str, Any]) -> Axes:
    index = ",".join(f"n{i}" for i in range(operands["rows"].rank))
    of_rank = rule(f"x[v,*] rows[{index}] -> [{index},*]; v by rows")
    return of_rank(operands, results, attrs)


take = Op(
    "take",
    _take_infer,
    _take_reference,
    picked("rows"),
    (
        Sample((_T, TensorType("i32", (3,))), high=4),
        Sample((TensorType("f32", (8,)), TensorType("i64", (3, 2))), high=8),
    ),
    axes=_take_axes,
)


def _gather_infer(x: TensorType, index: TensorType, *, dim: int) -> Types:
    axis = axis_of("gather", x, dim)
    same = index.rank == x.rank and replaced(index.shape, axis, 0) == replaced(x.shape, axis, 0)
    if index.dtype != "i64" or not same:
        raise VerifyError(
            f"gather: expected i64 indices like {x} but for dim {axis}, found {index}"
        )
    return (x.with_shape(index.shape),)


def _gather_reference(x: torch.Tensor, index: torch.Tensor, *, dim: int) -> torch.Tensor:
    return x.gather(dim, index)


gather = Op(
    "gather",
    _gather_infer,
    _gather_reference,
    samples=(Sample((_T, TensorType("i64", (4, 2))), {"dim": -1}, high=6),),
    axes=along_dim(),
)


def _scatter_infer(x: TensorType, index: TensorType, *, dim: int, value: float) -> Types:
    axis = axis_of("scatter", x, dim)
    same = index.rank == x.rank and replaced(index.shape, axis, 0) == replaced(x.shape, axis, 0)
    if index.dtype != "i64" or not same:
        raise VerifyError(
            f"scatter: expected i64 indices like {x} but for dim {axis}, found {index}"
        )
    return (x,)


def _scatter_reference(
    x: torch.Tensor, index: torch.Tensor, *, dim: int, value: float
) -> torch.Tensor:
    return x.scatter(dim, index, value)


# x with a number at every index[.., i, ..] along one dim.
scatter = Op(
    "scatter",
    _scatter_infer,
    _scatter_reference,
    samples=(Sample((_T, TensorType("i64", (4, 2))), {"dim": -1, "value": 1.5}, high=6),),
    axes=along_dim(),
)
