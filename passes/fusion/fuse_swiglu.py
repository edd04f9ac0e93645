"""fuse-swiglu: the two products of a gated unit become one, with the activation behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...compiler.ir import Graph, Value
from ...compiler.ops.glu import glu
from ...compiler.ops.linear import is_plain, linear
from ...compiler.ops.shape import slice_
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Decline, Match, Pat, Rule, pat, rewrite
from .weights import concatenated, concatenated_biases, is_weight, rows_of

GATE, UP, BOTH = (Pat(linear, where=lambda v: is_plain(v.node)) for _ in range(3))
TWO = pat(glu, GATE, UP)
GATE_PART, UP_PART = pat(slice_, BOTH), pat(slice_, BOTH)
ONE = pat(glu, GATE_PART, UP_PART)


def _gated(root: Value, x: Value, weight: Value, bias: Value | None) -> Value:
    unit = {("gate" if name == "activation" else name): a for name, a in root.attrs.items()}
    return linear(x, weight, bias=bias, **unit)


def _check_weights(product: Value) -> None:
    if not all(map(is_weight, product.node.args[1:])):
        raise Decline("a weight is computed from parameters")


# glu(x·Wᵀ, x·Vᵀ) == linear(x, W ‖ V; gate)
def _of_two(m: Match) -> Value:
    gate, up = m[GATE], m[UP]
    x = gate.node.args[0]
    if gate == up:
        raise Decline("gate and up are one value, which would be computed twice")
    if x != up.node.args[0]:
        raise Decline("gate and up are products of two values")
    _check_weights(gate)
    _check_weights(up)
    weight = concatenated([gate.node.args[1], up.node.args[1]])
    return _gated(m[TWO], x, weight, concatenated_biases([gate, up]))


# glu of two slices of x·Wᵀ == linear(x, rows of W ‖ other rows of W; gate)
def _of_one(m: Match) -> Value:
    gate, up, both = m[GATE_PART], m[UP_PART], m[BOTH]
    (x, weight), bias = both.node.args[:2], both.node.operand("bias")
    if gate == up:
        raise Decline("gate and up are one value, which would be computed twice")
    if any(p.attrs["dim"] % p.type.rank != p.type.rank - 1 for p in (gate, up)):
        raise Decline("gate and up are not slices of the product's columns")
    _check_weights(both)
    start, middle, step = _bounds(gate)
    second, stop, other_step = _bounds(up)

    def chosen(value: Value) -> Value:
        if step == other_step == 1 and middle == second:
            return rows_of(value, start, stop)
        return concatenated([rows_of(value, *_bounds(part)) for part in (gate, up)])

    return _gated(m[ONE], x, chosen(weight), bias and chosen(bias))


def _bounds(part: Value) -> tuple[int, int, int]:
    return part.attrs["start"], part.attrs["stop"], part.attrs.get("step", 1)


RULES = (Rule("two-products", (TWO,), _of_two), Rule("one-product", (ONE,), _of_one))


@dataclass(frozen=True)
class FuseSwiglu:
    """glu of products of one value -> linear with a gate over one weight, gate rows first."""

    name: ClassVar[str] = "fuse-swiglu"

    def expected(self, graph: Graph) -> int:
        """Gated units."""
        return sum(n.op is glu for n in graph.nodes())

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        return rewrite(graph, RULES, context.log)
