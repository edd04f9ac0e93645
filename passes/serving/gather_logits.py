"""gather-logits: rows are chosen before the work, not after it.

The rows that logits are wanted for are taken from the last values that other tokens still need,
so that the end of the network runs for L tokens instead of T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...compiler.axes import Dims, position
from ...compiler.ir import Graph, Op, Value
from ...compiler.ops import attention, mla, shape
from ...compiler.ops.leaf import literal
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Decline, Match, Pat, Rule, pat
from ..raising.canonicalize import settled

ROWS = Pat()
# Queries of all tokens and their keys and values come from one product: it stays one.
_STOPS = (attention.cached_attention, mla.cached_mla_attention)


# take(f(x, w), rows) == f(take(x, rows), w), where an index of the first dim of f(x, w) is computed
# from that index of the first dim of x by itself
def _rule(op: Op) -> Rule:
    inner = Pat(op)
    root = pat(shape.take, inner, ROWS)

    def build(m: Match) -> Value:
        node, axes = m[inner].node, m[inner].node.axes
        assert axes is not None
        row = axes.results[0][0] if axes.results[0] else ()
        if len(row) != 1:
            raise Decline("it does not keep the rows")
        if not axes.is_plain(row[0]):
            raise Decline("it works along the rows")

        def taken(x: Value, dims: Dims) -> Value:
            if dims[:1] == (row,):
                # A part of what uses them: they keep its place in the model.
                return Value(shape.take.node((x, m[ROWS]), {}, node.source))
            if position(dims, row[0]) is not None:
                raise Decline("it does not keep the rows")
            if x.op is literal or x.node.is_constant:
                return x
            raise Decline(f"{x.type} does not have the rows, it is broadcast over the rows")

        args = [*map(taken, node.args, axes.operands)]
        resized = {"shape": m[root].type.shape} if "shape" in node.attrs else {}
        return Value(node.rebuilt(args, {**node.attrs, **resized}))

    return Rule(f"take-before-{op.name}", (root,), build)


RULES = tuple(_rule(op) for op in Op.registry.values() if op.axes and op not in _STOPS)


@dataclass(frozen=True)
class GatherLogits:
    """`take` of the wanted rows moved up to the last values that other tokens need."""

    name: ClassVar[str] = "gather-logits"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        graph = settled(graph, RULES, context.log)
        for node in graph.nodes():
            if node.op is shape.take and node.args[0].node.args and not node.args[0].op.axes:
                context.log.decline(self.name, node.args[0].node, "it has no axis rule")
        return graph
