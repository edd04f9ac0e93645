"""Random graphs for property tests: ops over T tokens, and the samples of every op."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from ingot.compiler.ir import Graph, Op, Value
from ingot.compiler.ops.leaf import constant, literal, param
from ingot.compiler.types import TensorType, symbol
from op_cases import sampled_ops

T = symbol("T")
SYMBOLS = {"T": range(1, 65)}
# Ops of one tensor, elsewhere of two; all are applied only where their own type rule agrees.
TOKENWISE = ("neg", "abs", "exp", "tanh", "sigmoid", "silu", "relu", "cos", "sin")
PAIRWISE = ("add", "sub", "mul", "maximum", "minimum")
NUMBERS = (0.0, -0.0, 1.0, -1.5, 1e-6, 3.25, float("inf"), float("-inf"))


@st.composite
def sample_nodes(draw: Any) -> tuple[Value, ...]:
    """All results of a drawn op on fresh leaves of its sample's types, names not yet unique."""
    op, sample = draw(st.sampled_from(sampled_ops()))
    kinds = [draw(st.sampled_from(("param", "constant"))) for _ in sample.args]
    leaves = tuple(
        (param if kind == "param" else constant)(name=f"{op.name}.{i}", type=type_)
        for i, (kind, type_) in enumerate(zip(kinds, sample.args, strict=True))
    )
    return sample.node(leaves).results


@st.composite
def token_values(draw: Any, x: Value, w: Value, steps: int) -> list[Value]:
    """Values over T tokens grown from x [T, D] and a weight w [D, D]; all of one type."""
    values = [x]
    for _ in range(steps):
        a = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(("one", "two", "number", "linear", "norm", "slice", "softmax")))
        if kind == "one":
            new = Op.registry[draw(st.sampled_from(TOKENWISE))](a)
        elif kind == "two":
            b = draw(st.sampled_from(values))
            new = Op.registry[draw(st.sampled_from(PAIRWISE))](a, b)
        elif kind == "number":
            number = literal(value=draw(st.sampled_from(NUMBERS)), dtype=a.type.dtype)
            pair = draw(st.permutations((a, number)))
            new = Op.registry[draw(st.sampled_from(PAIRWISE))](*pair)
        elif kind == "linear":
            new = Op.registry["linear"](a, w)
        elif kind == "norm":
            new = Op.registry["rms_norm"](a, eps=1e-6)
        elif kind == "slice":
            size: Any = a.type.shape[1]
            cut = draw(st.integers(0, size))
            parts = [
                Op.registry["slice"](a, dim=1, start=lo, stop=hi)
                for lo, hi in ((cut, size), (0, cut))
                if lo < hi
            ]
            new = Op.registry["cat"](*parts, dim=-1)
        else:
            new = Op.registry["softmax"](a, dim=-1)
        values.append(new)
    return values


@st.composite
def graphs(draw: Any, dtype: str = "f32", extra: bool = True) -> Graph:
    """A graph over T tokens, several outputs, perhaps an update; if `extra`, op samples too."""
    width = draw(st.sampled_from((1, 4, 8)))
    type_ = TensorType(dtype, (T, width))
    x, state = param(name="x", type=type_), param(name="layers.0.state", type=type_)
    w = constant(name="model.layers.0.q-proj/weight", type=TensorType(dtype, (width, width)))
    values = draw(token_values(x, w, draw(st.integers(1, 12))))
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    updates = {"layers.0.state": draw(st.sampled_from(values))} if draw(st.booleans()) else {}
    params = [x, state]
    if extra:
        for i, results in enumerate(draw(st.lists(sample_nodes(), max_size=3))):
            renamed = rename(results, f"s{i}.")
            outputs += renamed
            params += [a for a in renamed[0].node.args if a.op is param]
    return Graph("random", tuple(params), tuple(outputs), SYMBOLS, updates)


def rename(results: tuple[Value, ...], prefix: str) -> tuple[Value, ...]:
    """The node of `results` again, on leaves whose names start with `prefix`."""
    node = results[0].node
    args = tuple(a.op(name=prefix + a.attrs["name"], type=a.type) for a in node.args)
    return node.rebuilt(args).results
