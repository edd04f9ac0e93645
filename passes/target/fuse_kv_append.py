"""fuse-kv-append: what makes keys, values or latent rows writes them into the paged cache.

Rows that nothing else reads are then stored nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...compiler.ir import Graph, Node, Value, walk
from ...compiler.ops.attention import kv_append
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Applied, Decline


def _producer(append: Node) -> Node:
    """The one node whose results are the rows of `append`; Decline where there is none.

    Caches and places are there before it: parameters, or made of what is not.
    """
    count = len(append.types)
    rows, others = append.args[count : 2 * count], (*append.args[:count], *append.args[2 * count :])
    makers = {row.node for row in rows}
    if len(makers) > 1 or len({*rows}) < count:
        raise Decline("its rows are not different results of one node")
    (maker,) = makers
    if maker in walk(others):
        raise Decline("a cache or a place in it is computed from the same results")
    if any(row.index >= len(maker.op.caches) for row in rows):
        raise Decline(f"{maker.op.name} does not write it into a cache")
    return maker


# kv_append(caches, f(x), places) == f(x, caches, places)
def _fused(maker: Node, append: Node) -> Applied:
    count = len(append.types)
    rows = append.args[count : 2 * count]
    named: dict[str, Value] = dict(
        zip(("slots", "positions", "page_table"), append.args[2 * count :], strict=True)
    )
    # Checked for tokens 0, 1, ... of one sequence: each has a place of its own.
    given: dict[Value, Any] = dict.fromkeys(named.values(), "index")
    given[named["slots"]] = "zeros"
    named |= {
        maker.op.caches[row.index]: cache
        for row, cache in zip(rows, append.args[:count], strict=True)
    }
    node = replace(maker.replace(**named), source=append.source)
    updated = {row.row: Value(node, row.updated) for row in node.appends}
    before = (*maker.results, *append.results)
    after = (*node.results[: len(maker.types)], *(updated[row.index] for row in rows))
    leaves = (*maker.args, *append.args[:count], *append.args[2 * count :])
    return Applied(FuseKvAppend.name, leaves, before, after, given)


@dataclass(frozen=True)
class FuseKvAppend:
    """kv_append of rows of project_heads or mla_latent -> these with caches."""

    name: ClassVar[str] = "fuse-kv-append"

    def expected(self, graph: Graph) -> int:
        """Appends of rows that come from an op which can write them itself."""
        appends = (n for n in graph.nodes() if n.op is kv_append)
        return sum(bool(n.args[len(n.types)].op.caches) for n in appends)

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        fused: dict[Node, Applied] = {}
        for append in graph.nodes():
            if append.op is not kv_append:
                continue
            try:
                maker = _producer(append)
                if maker in fused:
                    raise Decline("another append of the same rows is done with them")
                fused[maker] = _fused(maker, append)
            except Decline as reason:
                context.log.decline(self.name, append, str(reason))
        return context.log.apply(graph, tuple(fused.values()))
