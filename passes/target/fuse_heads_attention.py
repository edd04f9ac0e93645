"""fuse-heads-attention: attention over a paged cache makes the heads that it takes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...compiler.ir import Graph, Node, Value
from ...compiler.ops.attention import cached_attention
from ...compiler.ops.heads import project_heads
from ...compiler.ops.leaf import param
from ...compiler.ops.project_attention import CACHES, INDEX, project_attention
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Applied, Decline


def _producer(attends: Node, users: dict[Value, list[Node]], roots: tuple[Value, ...]) -> Node:
    """The node of all heads that `attends` takes; Decline where there is none."""
    q, *caches = attends.args[:3]
    maker = q.node
    if maker.op is not project_heads or q.index != 0:
        raise Decline("its queries are not the first heads of a product")
    rows = {a.row: Value(maker, a.updated) for a in maker.appends}
    if len(maker.attrs["heads"]) != 3 or rows != dict(enumerate(caches, 1)):
        raise Decline("its caches are not what the product appends keys and values to")
    if any(attends.operand(name) != maker.operand(name) for name in INDEX):
        raise Decline("it has other slots, positions or pages than what is appended")
    if users[q] != [attends] or q in roots:
        raise Decline("its queries are read elsewhere")
    sinks = attends.operand("sinks")
    if sinks and not (sinks.node.is_constant or sinks.op is param):
        raise Decline("its sinks are computed")
    return maker


# attention(q, caches) of q, caches = heads(x, caches) is project_attention(x, caches)
def _fused(maker: Node, attends: Node) -> Applied:
    named: dict[str, Any] = {**maker.operands, **maker.attrs, **attends.attrs}
    x, weight = (named.pop(name) for name in project_heads.required)
    named |= {new: named.pop(old) for old, new in CACHES.items()}
    named["sinks"] = attends.operand("sinks")
    node = project_attention.node((x, weight), named, attends.source)
    # Checked for tokens 0, 1, ... of one sequence: each has a place of its own.
    given: dict[Value, Any] = dict.fromkeys((named[name] for name in INDEX), "index")
    given[named["slots"]] = "zeros"
    before = (attends.results[0], *maker.results[1:])
    return Applied(FuseHeadsAttention.name, node.args, before, node.results, given)


@dataclass(frozen=True)
class FuseHeadsAttention:
    """cached_attention of what project_heads makes and appends -> project_attention."""

    name: ClassVar[str] = "fuse-heads-attention"

    def expected(self, graph: Graph) -> int:
        """Attention over a cache that a product of heads appends to."""
        nodes = (n for n in graph.nodes() if n.op is cached_attention)
        return sum(n.args[1].op is project_heads for n in nodes)

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        fused: list[Applied] = []
        users, roots = graph.users(), graph.roots
        for node in graph.nodes():
            if node.op is not cached_attention:
                continue
            try:
                fused.append(_fused(_producer(node, users, roots), node))
            except Decline as reason:
                context.log.decline(self.name, node, str(reason))
        return context.log.apply(graph, fused)
