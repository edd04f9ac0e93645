"""fuse-elementwise: element-wise ops over one shape become regions, each one launch.

A region is convex: nothing outside it both waits for one of its nodes and is waited for by another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx

from ...compiler.dtypes import DTYPES
from ...compiler.ir import Graph, Node, Value
from ...compiler.ops.leaf import param
from ...compiler.ops.region import STEP_OPS, region_of
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Applied

# Steps of a region: more would hold too much in registers.
LARGEST = 16


def fusible(node: Node) -> bool:
    """Whether a node may be a step of a region: kernels know its op and its dtypes."""
    types = (*node.types, *(a.type for a in node.args))
    return node.op.name in STEP_OPS and all(DTYPES[t.dtype].triton for t in types)


def grouped(nodes: Sequence[Node]) -> list[tuple[Node, ...]]:
    """`nodes`, arguments before users, as groups, each with its nodes in their order.

    A fusible node joins the groups of its arguments where they have its shape and the union is
    convex; all others stay alone.
    """
    place = {node: i for i, node in enumerate(nodes)}
    group_of: dict[Node, int] = {}
    members: dict[int, list[Node]] = {}
    waits: nx.DiGraph[int] = nx.DiGraph()
    for i, node in enumerate(nodes):
        group_of[node], members[i] = i, [node]
        waits.add_node(i)
        waits.add_edges_from((group_of[a.node], i) for a in node.args if a.node in group_of)
        if not fusible(node):
            continue
        shape = node.types[0].shape
        joined = i
        for arg in node.args:
            other = group_of.get(arg.node, joined)
            fits = (
                other != joined
                and fusible(arg.node)
                and arg.type.shape == shape
                and len(members[other]) + len(members[joined]) <= LARGEST
                and not _between(waits, other, joined)
            )
            if fits:
                nx.contracted_nodes(waits, other, joined, self_loops=False, copy=False)
                for moved in members[joined]:
                    group_of[moved] = other
                members[other] += members.pop(joined)
                joined = other
    for group in members.values():
        group.sort(key=place.__getitem__)
    return [tuple(group) for group in members.values()]


def _between(waits: nx.DiGraph[int], first: int, last: int) -> bool:
    """Whether `last` waits for another group that waits for `first`."""
    return any(nx.has_path(waits, i, last) for i in waits.successors(first) if i != last)


def _region(nodes: tuple[Node, ...], uses: Mapping[Value, int]) -> Applied:
    """`nodes` as one that gives what others read too, or nothing else."""
    inside = Counter(a for node in nodes for a in node.args)
    outputs = tuple(v for n in nodes for v in n.results if not inside[v] or uses[v] > inside[v])
    made = region_of(nodes, outputs)
    return Applied(FuseElementwise.name, made.args, outputs, made.results)


@dataclass(frozen=True)
class FuseElementwise:
    """Element-wise ops, each an argument of another -> a region of them."""

    name: ClassVar[str] = "fuse-elementwise"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        fixed, uses = graph.constants(), graph.use_counts()
        nodes = [n for n in graph.nodes() if n.op is not param and n not in fixed]
        groups = [group for group in grouped(nodes) if len(group) > 1]
        return context.log.apply(graph, [_region(group, uses) for group in groups])
