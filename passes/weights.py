"""What passes do to weights: ordinary ops on constants, folded when a program is loaded.

A weight is any value that is computed from constants alone, not only a constant: a slice, a
transposition, a concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..compiler.ir import Value
from ..compiler.ops import shape
from ..compiler.ops.mxfp4 import mxfp4
from ..compiler.rewrite import Decline, depends_only_on_constants


def is_weight(value: Value) -> bool:
    """Whether `value` is computed from constants alone."""
    return depends_only_on_constants(value)


def concatenated(values: Sequence[Value], dim: int = 0) -> Value:
    """`values` one after the other along `dim`; packed ones stay packed.

    Blocks of mxfp4 do not cross operands, so codes join codes and scales scales along any dim.
    Decline where formats differ.
    """
    if len(values) == 1:
        return values[0]
    if all(v.op is not mxfp4 for v in values):
        return shape.cat(*values, dim=dim)
    formats = {v.stored.dtype: v for v in values}
    if len(formats) > 1 or len({v.type.dtype for v in values}) > 1:
        raise Decline(f"weights differ in format: {', '.join(sorted(formats))}")
    codes, scales = (shape.cat(*(v.node.args[i] for v in values), dim=dim) for i in (0, 1))
    return mxfp4(codes, scales, dtype=values[0].type.dtype)


def rows_of(value: Value, start: int, stop: int, step: int = 1) -> Value:
    """Every `step`-th row of `value` from `start` on, up to `stop`."""
    if (start, stop, step) == (0, value.type.shape[0], 1):
        return value
    extra = {} if step == 1 else {"step": step}
    return shape.slice_(value, dim=0, start=start, stop=stop, **extra)


def concatenated_biases(products: Sequence[Value]) -> Value | None:
    """The biases of linear products one after the other; zeros where only others have one."""
    biases = [p.node.args[2] if len(p.node.args) > 2 else None for p in products]
    if not any(biases):
        return None
    return concatenated(
        [
            shape.full(value=0.0, shape=p.type.shape[-1:], dtype=p.type.dtype) if b is None else b
            for p, b in zip(products, biases, strict=True)
        ]
    )
