"""Ops that look along one dim: sums, extrema, softmax, top-k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..axes import AxisRule, along_dim
from ..dtypes import FLOATS, INTEGERS
from ..ir import Cost, Op, Operands, Sample, moved
from ..types import TensorType, Types, VerifyError
from .shape import axis_of, replaced

_T = TensorType("f32", (4, 6))


def _cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    return Cost(operands["x"].numel, moved(operands, results))


def _reduce_infer(name: str) -> Callable[..., Types]:
    def infer(x: TensorType, *, dim: int, keepdim: bool) -> Types:
        if x.dtype not in FLOATS:
            raise VerifyError(f"{name}: expected a float, found {x}")
        axis = axis_of(name, x, dim)
        kept = (1,) if keepdim else ()
        return (x.with_shape((*x.shape[:axis], *kept, *x.shape[axis + 1 :])),)

    return infer


def _reduce(name: str, torch_op: Callable[..., Any], axes: AxisRule) -> Op:
    def reference(x: torch.Tensor, *, dim: int, keepdim: bool) -> tuple[torch.Tensor]:
        return (torch_op(x, dim=dim, keepdim=keepdim),)

    samples = tuple(Sample((_T,), {"dim": d, "keepdim": k}) for d, k in ((-1, True), (0, False)))
    return Op(name, _reduce_infer(name), reference, _cost, samples, axes=axes)


sum_ = _reduce("sum", torch.sum, along_dim("sum"))
mean = _reduce("mean", torch.mean, along_dim())
amax = _reduce("amax", torch.amax, along_dim())


def _softmax_infer(x: TensorType, *, dim: int) -> Types:
    if x.dtype not in FLOATS:
        raise VerifyError(f"softmax: expected a float, found {x}")
    axis_of("softmax", x, dim)
    return (x,)


def _softmax_reference(x: torch.Tensor, *, dim: int) -> tuple[torch.Tensor]:
    return (torch.softmax(x, dim),)


softmax = Op(
    "softmax",
    _softmax_infer,
    _softmax_reference,
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


def _topk_reference(x: torch.Tensor, *, k: int, dim: int) -> tuple[torch.Tensor, ...]:
    """The k largest in descending order and their indices."""
    return tuple(torch.topk(x, k, dim))


topk = Op(
    "topk",
    _topk_infer,
    _topk_reference,
    _cost,
    (Sample((_T,), {"k": 2, "dim": -1}),),
    axes=along_dim(),
)
