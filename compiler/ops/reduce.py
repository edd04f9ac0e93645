"""Ops that look along one dim: sums, extrema and where they are, softmax, top-k."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..axes import AxisRule, along_dim
from ..dtypes import FLOATS, INTEGERS
from ..ir import Op, Sample, per_element
from ..types import TensorType, Types, VerifyError
from .pointwise import float_type
from .shape import axis_of, replaced

_T = TensorType("f32", (4, 6))


_cost = per_element(1, "x")


def _reduce_infer(name: str, x: TensorType, *, dim: int, keepdim: bool) -> Types:
    float_type(name, x)
    axis = axis_of(name, x, dim)
    kept = (1,) if keepdim else ()
    return (x.with_shape((*x.shape[:axis], *kept, *x.shape[axis + 1 :])),)


def _reduce(name: str, torch_op: Callable[..., Any], axes: AxisRule) -> Op:
    samples = tuple(Sample((_T,), {"dim": d, "keepdim": k}) for d, k in ((-1, True), (0, False)))
    return Op(name, partial(_reduce_infer, name), torch_op, _cost, samples, axes=axes)


sum_ = _reduce("sum", torch.sum, along_dim("sum"))
mean = _reduce("mean", torch.mean, along_dim())
amax = _reduce("amax", torch.amax, along_dim())


def _argmax_infer(x: TensorType, *, dim: int, keepdim: bool) -> Types:
    if x.dtype not in (*INTEGERS, *FLOATS):
        raise VerifyError(f"argmax: expected numbers in order, found {x}")
    axis = axis_of("argmax", x, dim)
    kept = (1,) if keepdim else ()
    return (TensorType("i64", (*x.shape[:axis], *kept, *x.shape[axis + 1 :])),)


# The index of the largest, of equals the first; NaN is larger than all.
argmax = Op(
    "argmax",
    _argmax_infer,
    torch.argmax,
    _cost,
    tuple(Sample((_T,), {"dim": d, "keepdim": k}) for d, k in ((-1, True), (0, False))),
    axes=along_dim(),
)


def _softmax_infer(x: TensorType, *, dim: int) -> Types:
    axis_of("softmax", x, dim)
    return float_type("softmax", x)


softmax = Op(
    "softmax",
    _softmax_infer,
    torch.softmax,
    _cost,
    (Sample((_T,), {"dim": -1}),),
    axes=along_dim(),
)


def _topk_infer(x: TensorType, *, k: int, dim: int) -> Types:
    if x.dtype not in (*INTEGERS, *FLOATS):
        raise VerifyError(f"topk: expected numbers in order, found {x}")
    axis = axis_of("topk", x, dim)
    size = x.shape[axis]
    if not isinstance(size, int) or not 1 <= k <= size:
        raise VerifyError(f"topk: expected 1 <= k <= dim {axis} of {x}, found k = {k}")
    result = x.with_shape(replaced(x.shape, axis, k))
    return (result, result.with_dtype("i64"))


# The k largest in descending order and their indices.
topk = Op(
    "topk",
    _topk_infer,
    torch.topk,
    _cost,
    (Sample((_T,), {"k": 2, "dim": -1}),),
    axes=along_dim(),
)
