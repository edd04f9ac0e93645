"""Random graphs of element-wise ops."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from ingot.compiler.ir import Graph
from ingot.compiler.ops import pointwise as ops
from ingot.compiler.ops.leaf import literal, param
from ingot.compiler.ops.reduce import amax
from ingot.compiler.types import TensorType, symbol

EXACT = (ops.add, ops.sub, ops.mul, ops.maximum, ops.minimum)


@st.composite
def dags(draw_: Any) -> Graph:
    """Element-wise ops over [T, 12] and its rows and columns, between sums that end regions."""
    dtype = draw_(st.sampled_from(("bf16", "f16", "f32")))
    t = symbol("T")
    shapes = ((t, 12), (12,), (t, 1), (t, 12))
    params = [param(name=f"p{i}", type=TensorType(dtype, s)) for i, s in enumerate(shapes)]
    values = list(params)
    for _ in range(draw_(st.integers(2, 14))):
        a, b = draw_(st.sampled_from(values)), draw_(st.sampled_from(values))
        kind = draw_(st.sampled_from(("two", "two", "two", "number", "one", "choice", "amax")))
        if kind == "two":
            new = draw_(st.sampled_from(EXACT))(a, b)
        elif kind == "number":
            scale = literal(value=draw_(st.sampled_from((0.3, -2.0, 1e-3))), dtype=dtype)
            new = ops.mul(a, scale)
        elif kind == "one":
            new = draw_(st.sampled_from((ops.neg, ops.abs_, ops.relu)))(a)
        elif kind == "choice":
            new = ops.where(ops.lt(a, b), a, b)
        elif a.type.shape == (t, 12):
            new = amax(a, dim=-1, keepdim=True)
        else:
            new = ops.neg(a)
        values.append(new)
    made = values[len(params) :]
    chosen = draw_(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    return Graph("drawn", tuple(params), tuple(chosen), {"T": range(1, 65)})
