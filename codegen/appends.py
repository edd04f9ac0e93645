"""Which appends to the paged cache the launch of their rows does: rows written where they belong.

What computes keys and values (or a latent row) can write each token's row into the cache itself;
rows that nothing else reads are then stored nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..compiler.ir import Node, Op
from ..compiler.ops.attention import kv_append
from ..compiler.ops.heads import project_heads
from ..compiler.ops.leaf import param
from ..compiler.ops.mla import mla_latent

# Ops whose templates write results into a cache (KernelQuery.append).
_WRITERS: frozenset[Op] = frozenset({project_heads, mla_latent})


def with_appends(groups: Sequence[tuple[Node, ...]]) -> list[tuple[Node, ...]]:
    """`groups`, arguments before users, with appends in the group of what makes their rows.

    An append stays by itself where its rows are not all results of one such node, or where its
    other operands are computed: only parameters are there early enough for any place.
    """
    alone = {group[0] for group in groups if len(group) == 1}
    joined: dict[Node, Node] = {}
    for group in groups:
        writer = _writer_of(group[0]) if len(group) == 1 else None
        if writer in alone and writer not in joined:
            joined[writer] = group[0]
    moved = {*joined.values()}
    return [
        (group[0], joined[group[0]]) if group[0] in joined else group
        for group in groups
        if group[0] not in moved
    ]


def _writer_of(node: Node) -> Node | None:
    """The one node whose results are the rows of an append that can move to it."""
    if node.op is not kv_append:
        return None
    count = len(node.types)
    caches, rows, index = node.args[:count], node.args[count : 2 * count], node.args[2 * count :]
    writers = {row.node for row in rows}
    if len(writers) != 1 or len({*rows}) != count or any(a.op is not param for a in caches + index):
        return None
    writer = writers.pop()
    return writer if writer.op in _WRITERS else None
