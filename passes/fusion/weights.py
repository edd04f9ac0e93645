"""What passes do to weights: ordinary ops on constants, folded when a program is loaded.

A weight is any value that is computed from constants alone, not only a constant: a slice, a
transposition, a concatenation, or an `mxfp4` node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...compiler.ir import Value
from ...compiler.ops import shape
from ...compiler.ops.mxfp4 import mxfp4
from ...compiler.rewrite import Decline


def is_weight(value: Value) -> bool:
    """Whether `value` is computed from constants alone."""
    return value.node.is_constant


def is_quantized(value: Value) -> bool:
    """Whether `value` is read in a packed form."""
    return value.op is mxfp4


# cat(mxfp4(a, s), mxfp4(b, t)) == mxfp4(cat(a, b), cat(s, t)): no scale is for two operands
def concatenated(values: Sequence[Value], dim: int = 0) -> Value:
    """`values` one after the other along `dim`, in the packed form if they have one.

    Decline where some are packed and others not, or where their formats differ.
    """
    first = values[0]
    if len(values) == 1:
        return first
    if not any(map(is_quantized, values)):
        return shape.cat(*values, dim=dim)
    formats = {(v.stored.dtype, v.type.dtype) for v in values}
    if not all(map(is_quantized, values)) or len(formats) > 1:
        found = ", ".join(sorted({v.stored.dtype for v in values}))
        raise Decline(f"weights in several formats are not one weight: {found}")
    codes, scales = (shape.cat(*(v.node.args[i] for v in values), dim=dim) for i in (0, 1))
    return mxfp4(codes, scales, **first.attrs)


# mxfp4(a, s)[i:j] == mxfp4(a[i:j], s[i:j])
def rows_of(value: Value, start: int, stop: int, step: int = 1) -> Value:
    """Every `step`-th row of [start, stop) of `value`, in its packed form if it has one."""
    if (start, stop, step) == (0, value.type.shape[0], 1):
        return value
    if is_quantized(value):
        if value.type.rank == 1:
            raise Decline("packed weights are not cut along the dim of their scales")
        codes, scales = (rows_of(a, start, stop, step) for a in value.node.args)
        return mxfp4(codes, scales, **value.attrs)
    extra = {} if step == 1 else {"step": step}
    return shape.slice_(value, dim=0, start=start, stop=stop, **extra)


# f(mxfp4(a, s)) == mxfp4(f(a), f(s)) where f moves whole rows, or whole groups of a shared scale
def by_rows(f: Callable[[Value], Value], weight: Value) -> Value:
    """f(weight), in its packed form if it has one; `f` splits and moves, whatever the last dim."""
    if is_quantized(weight):
        return mxfp4(*map(f, weight.node.args), **weight.attrs)
    return f(weight)


def concatenated_biases(products: Sequence[Value]) -> Value | None:
    """The biases of linear products one after the other; zeros where only others have one."""
    biases = [p.node.operand("bias") for p in products]
    if not any(biases):
        return None
    return concatenated(
        [
            shape.full(value=0.0, shape=p.type.shape[-1:], dtype=p.type.dtype) if b is None else b
            for p, b in zip(products, biases, strict=True)
        ]
    )
