"""What follows the sums of every GEMM: bias, gated activation, residual, and the store."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...kernel_query import KernelQuery, Ref
from ..rowwise.norms import row_step
from .activations import activated, gated


class Epilogue(NamedTuple):
    """y = activation(sums + bias) + residual, rows STEP and RESIDUAL_STEP elements apart.

    What is not there is None. A GATED activation takes two sums, gate and up, whose biases lie N
    apart. A ROUNDED one takes them in y's dtype.
    """

    y: Any
    bias: Any
    residual: Any
    STEP: Any
    RESIDUAL_STEP: Any
    ACTIVATION: Any
    GATED: Any
    ALPHA: Any
    LIMIT: Any
    ROUNDED: Any


def epilogue_of(
    query: KernelQuery,
    y: Ref,
    step: int,
    *,
    bias: Ref | None = None,
    activation: str | None = None,
    gated: bool = False,
    rounded: bool = False,
    residual: bool = False,
) -> Epilogue:
    """The epilogue that stores in `y`; the node's residual, if it has one, where `residual`. Its
    rows must lie in one step (see `residual_declined`)."""
    added = query.operand("residual") if residual else None
    return Epilogue(
        y,
        bias,
        query.ref("residual") if residual else None,
        step,
        (row_step(added) or 0) if added else 0,
        activation,
        gated,
        float(query.attrs.get("alpha", 0.0)) if activation else 0.0,
        float(query.attrs.get("limit", 0.0)) if activation else 0.0,
        rounded,
    )


@triton.jit
def activate(epilogue, total, up, row, inside_columns, N: tl.constexpr):
    """Sums `total` (and `up`, where GATED), f32 in any layout, with bias and activation; `row`, the
    row of the weight, and the mask `inside_columns` broadcast to their shape."""
    if epilogue.bias is not None:
        total += tl.load(epilogue.bias + row, mask=inside_columns, other=0.0).to(tl.float32)
        if epilogue.GATED:
            added = tl.load(epilogue.bias + row + N, mask=inside_columns, other=0.0)
            up += added.to(tl.float32)
    if epilogue.ROUNDED:
        total = total.to(epilogue.y.dtype.element_ty).to(tl.float32)
        if epilogue.GATED:
            up = up.to(epilogue.y.dtype.element_ty).to(tl.float32)
    if epilogue.GATED:
        total = gated(total, up, epilogue.ACTIVATION, epilogue.ALPHA, epilogue.LIMIT)
    elif epilogue.ACTIVATION is not None:
        total = activated(total, epilogue.ACTIVATION)
    return total


@triton.jit
def finish(epilogue, y, total, up, token, column, row, inside_columns, inside, N: tl.constexpr):
    """Store `activate` of the sums, and the residual, in rows `token` and columns `column` of y."""
    total = activate(epilogue, total, up, row, inside_columns, N)
    place = token.to(tl.int64)
    if epilogue.residual is not None:
        at = epilogue.residual + place * epilogue.RESIDUAL_STEP + column
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    to = y + place * epilogue.STEP + column
    tl.store(to, total.to(y.dtype.element_ty), mask=inside)
