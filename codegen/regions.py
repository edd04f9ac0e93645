"""Which nodes one launch computes: regions of element-wise ops, and an order for them.

A region is convex: nothing outside it both waits for one of its nodes and is waited for by another.
Regions and the nodes between them then have an order in which each finds its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import networkx as nx

from ..compiler.ir import Node

# Steps of a region: more would hold too much in registers.
LARGEST = 16


def grouped(nodes: Sequence[Node], fusible: Callable[[Node], bool]) -> list[tuple[Node, ...]]:
    """`nodes`, arguments before users, as groups in such an order.

    A fusible node joins the groups of its arguments where they have its shape and the union is
    convex; all others stay alone. Within a group nodes keep their order.
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
                and not _between(waits, joined, other)
            )
            if fits:
                _join(waits, other, joined)
                for moved in members[joined]:
                    group_of[moved] = other
                members[other] += members.pop(joined)
                joined = other
    for group in members.values():
        group.sort(key=place.__getitem__)
    # The order of the nodes, where groups leave a choice: each as late as its last member.
    last = {i: place[group[-1]] for i, group in members.items()}
    order = nx.lexicographical_topological_sort(waits, key=last.__getitem__)
    return [tuple(members[i]) for i in order]


def _between(waits: nx.DiGraph[int], first: int, last: int) -> bool:
    """Whether `last` waits for another group that waits for `first`."""
    seen: set[int] = set()
    stack = [i for i in waits.successors(first) if i != last]
    while stack:
        group = stack.pop()
        if group == last:
            return True
        if group not in seen:
            seen.add(group)
            stack.extend(waits.successors(group))
    return False


def _join(waits: nx.DiGraph[int], kept: int, gone: int) -> None:
    """All edges of `gone` are edges of `kept`."""
    waits.add_edges_from((i, kept) for i in list(waits.predecessors(gone)) if i != kept)
    waits.add_edges_from((kept, i) for i in list(waits.successors(gone)) if i != kept)
    waits.remove_node(gone)
