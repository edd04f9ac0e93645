"""gather-logits: rows are chosen before the work, not after it.

The rows that logits are wanted for are taken from the last values that other tokens still need,
so that the end of the network runs for L tokens instead of T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...compiler.ir import Graph, Op, Value
from ...compiler.ops import collective, glu, linear, moe, norm, pointwise, shape
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import (
    Decline,
    Match,
    Pat,
    Rule,
    depends_only_on_constants,
    pat,
    rewrite_all,
)
from ..raising.canonicalize import merge_equal

# Ops whose row t is made from row t of their operands (and from operands without rows).
TOKEN_WISE: tuple[Op, ...] = (
    *sorted(pointwise.POINTWISE, key=lambda op: op.name),
    linear.linear,
    linear.head_linear,
    norm.rms_norm,
    norm.layer_norm,
    glu.glu,
    moe.experts,
    collective.all_reduce,
)
# The same, where the dim that they work along is not that of the rows.
ALONG: tuple[Op, ...] = (collective.all_gather, shape.slice_)

ROWS = Pat()


# take(f(x, w), rows) == f(take(x, rows), w)
def _rule(op: Op) -> Rule:
    inner = Pat(op)
    root = pat(shape.take, inner, ROWS)

    def build(m: Match) -> Value:
        node, rows = m[inner].node, m[ROWS]
        tokens, rank = m[inner].type.shape[0], m[inner].type.rank
        if op in ALONG and node.attrs["dim"] % rank == 0:
            raise Decline("it works along the rows")

        def taken(x: Value) -> Value:
            if x.op.name == "literal" or depends_only_on_constants(x):
                return x
            if x.type.rank < 1 or x.type.shape[0] != tokens:
                raise Decline(f"{x.type} does not have the rows of {m[inner].type}")
            if op in pointwise.POINTWISE and x.type.rank != rank:
                raise Decline(f"{x.type} is broadcast over the rows")
            return _taken(x, rows, node.source)

        return Value(op.node(tuple(map(taken, node.args)), node.attrs, node.source))

    return Rule(f"take-before-{op.name}", (root,), build)


def _taken(x: Value, rows: Value, source: str) -> Value:
    """The rows of `x`, as a part of what uses them: it keeps its place in the model."""
    return Value(shape.take.node((x, rows), {}, source))


def _view_rule() -> Rule:
    """take(view(x), rows) == view(take(x, rows)) where the view keeps the rows."""
    x = Pat()
    inner = pat(shape.view, x)
    root = pat(shape.take, inner, ROWS)

    def build(m: Match) -> Value:
        if m[x].type.shape[:1] != m[inner].type.shape[:1]:
            raise Decline("the view does not keep the rows")
        target: tuple[Any, ...] = m[root].type.shape
        source = m[inner].node.source
        rows = _taken(m[x], m[ROWS], source)
        return Value(shape.view.node((rows,), {"shape": target}, source))

    return Rule("take-before-view", (root,), build)


RULES = (*map(_rule, (*TOKEN_WISE, *ALONG)), _view_rule())


@dataclass(frozen=True)
class GatherLogits:
    """`take` of the wanted rows moved up to the last values that other tokens need."""

    name: ClassVar[str] = "gather-logits"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        while True:
            before = graph
            graph, _ = merge_equal(rewrite_all(graph, RULES, context.log))
            if graph is before:
                return graph
