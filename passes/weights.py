"""What passes do to weights: ordinary ops on constants, folded when a program is loaded.

A weight is any value that is computed from constants alone, not only a constant: a slice, a
transposition, a concatenation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..compiler.ir import Value
from ..compiler.ops import shape
from ..compiler.rewrite import depends_only_on_constants


def is_weight(value: Value) -> bool:
    """Whether `value` is computed from constants alone."""
    return depends_only_on_constants(value)


def concatenated(values: Sequence[Value], dim: int = 0) -> Value:
    """`values` one after the other along `dim`."""
    return values[0] if len(values) == 1 else shape.cat(*values, dim=dim)


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


# f(mxfp4(a, s)) == mxfp4(f(a), f(s)) where f moves whole rows
def by_rows(f: Callable[[Value], Value], weight: Value) -> Value:
    """f(weight) for an `f` that moves rows and leaves the last dim as it is, whatever its size."""
    if weight.op.name == "mxfp4":
        return weight.op(*map(f, weight.node.args), **weight.attrs)
    return f(weight)
