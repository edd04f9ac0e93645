"""fuse-linear-residual: what is added to a product goes into its epilogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...compiler.ir import Graph, Node, Value
from ...compiler.ops.leaf import literal
from ...compiler.ops.linear import is_plain, linear
from ...compiler.ops.moe import experts
from ...compiler.ops.pointwise import add, mul
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Decline, Match, Pat, Rule, either, pat, rewrite
from .fuse_norm_linear import readers


def takes_residual(value: Value) -> bool:
    """Whether `value` is made by an op to whose result a residual can be added in place."""
    return is_plain(value.node) or value.op is experts and "residual" not in value.node.given


def _product() -> Pat:
    return either(*(Pat(op, where=takes_residual) for op in (linear, experts)))


P, Q, R = _product(), _product(), Pat()
ONE = pat(add, P, R)
TWO = pat(add, pat(add, P, Q), R)
SCALED = pat(add, pat(mul, P, Pat(literal)), R)


def takes_sum(total: Value, readers: Mapping[Value, Sequence[Node | None]]) -> bool:
    """Whether `total`, a sum, can go into the epilogue of what it adds.

    `readers` are those of the graph (see `fuse_norm_linear`).
    """

    def alone(value: Value) -> bool:
        return takes_residual(value) and value.type == total.type and len(readers[value]) == 1

    x, y = total.node.args
    sums = [a.node.args for a in (x, y) if a.op is add and len(readers[a]) == 1]
    both = any(p != q and alone(p) and alone(q) for p, q in sums)
    return x != y and (alone(x) or alone(y) or both)


def _with_residual(product: Value, residual: Value) -> Value:
    """product + residual, in the product's epilogue."""
    if residual == product:
        raise Decline("it is added to itself, and would be computed twice")
    if residual.type != product.type:
        raise Decline(f"{residual.type} is broadcast to {product.type}")
    return Value(product.node.replace(residual=residual))


# p + r; of two products one takes the other: the first that nothing else uses
def _one(m: Match) -> Value:
    return _with_residual(m[P], m[R])


# (p + q) + r == p + (q + r)
def _two(m: Match) -> Value:
    if m[P] in (m[Q], m[R]):
        raise Decline("it is added to itself, and would be computed twice")
    return _with_residual(m[P], _with_residual(m[Q], m[R]))


# p·a + r: a belongs to neither operand, and folded into the weight it would be rounded
def _scaled(m: Match) -> Value:
    raise Decline("the product is scaled before the residual is added")


RULES = (
    Rule("product-product-residual", (TWO,), _two),
    Rule("product-residual", (ONE,), _one),
    Rule("scaled-product-residual", (SCALED,), _scaled),
)


@dataclass(frozen=True)
class FuseLinearResidual:
    """add(p, r) -> p with the residual r, where p is a linear or experts."""

    name: ClassVar[str] = "fuse-linear-residual"

    def expected(self, graph: Graph) -> int:
        """Sums that can go into the epilogue of what they add."""
        reading = readers(graph)
        return sum(n.op is add and takes_sum(Value(n), reading) for n in graph.nodes())

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        return rewrite(graph, RULES, context.log)
