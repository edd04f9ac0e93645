"""One rank's share of an op whose results are summed over ranks: embeddings and experts.

Used by shard-tensor-parallel, which adds the all_reduce.
"""

from __future__ import annotations

from typing import Any

from ...compiler.ir import Node, Op, Value
from ...compiler.ops import linear, pointwise, shape
from ...compiler.ops.leaf import literal
from .propagate_slice import Cut, cut_label, cut_weight


def share(size: int, ranks: int, rank: int, axis: int) -> Cut:
    """The rank's share of `size` indices; shares are equal, so the last ones may end past them."""
    each = -(-size // ranks)
    return Cut(axis, rank * each, (rank + 1) * each)


# embedding(ids, W) == Σ over ranks of (the row of W, on the rank that holds it; 0 on the others)
def vocab_parallel_embedding(node: Node, ids: Value, ranks: int, rank: int) -> Value:
    """The rows of the tokens that the rank's part of the table has, zero rows for the others."""
    table = node.args[1]
    size = table.type.shape[0]
    assert isinstance(size, int)
    mine = share(size, ranks, rank, 0)
    held, row = _held(node, ids, mine)
    found = emit(node, linear.embedding, row, cut_weight(table, mine))
    column = emit(node, shape.view, held, shape=(*ids.type.shape, 1))
    zero = literal(value=0.0, dtype=found.type.dtype)
    return emit(node, pointwise.where, column, found, zero)


# Σ over the hidden units of an expert == Σ over ranks of the units that the rank holds
def tensor_parallel_experts(node: Node, args: tuple[Value, ...], ranks: int, rank: int) -> Value:
    """Every expert with the rank's share of its hidden units. `args`: x, weights, indices."""
    axes = node.axes
    assert axes is not None
    mine = share(int(axes.size(("i",))), ranks, rank, 0)
    weights = [
        _added_once(weight, rank)
        if i in axes.added
        else cut_label(weight, axes, dims, "i", (mine.start, mine.stop))
        for i, (weight, dims) in enumerate(zip(node.args, axes.operands, strict=True))
    ]
    return node.rebuilt((*args, *weights[len(args) :])).results[0]


# Σ over the chosen experts == Σ over ranks of those chosen experts that the rank holds
def expert_parallel_experts(node: Node, args: tuple[Value, ...], ranks: int, rank: int) -> Value:
    """The rank's share of the experts; choices of others weigh 0. `args`: x, weights, indices."""
    x, weights, indices = args
    count = node.args[3].type.shape[0]
    assert isinstance(count, int)
    mine = share(count, ranks, rank, 0)
    held, index = _held(node, indices, mine)
    zero = literal(value=0.0, dtype=weights.type.dtype)
    weights = emit(node, pointwise.where, held, weights, zero)
    parameters = (cut_weight(p, mine) for p in node.args[3:])
    return node.rebuilt((x, weights, index, *parameters)).results[0]


def _held(node: Node, ids: Value, mine: Cut) -> tuple[Value, Value]:
    """Whether each id is in the rank's share, and its index there (0 where it is not)."""

    def number(value: int) -> Value:
        return literal(value=value, dtype=ids.type.dtype)

    from_first = emit(node, pointwise.ge, ids, number(mine.start))
    held = emit(
        node, pointwise.logical_and, from_first, emit(node, pointwise.lt, ids, number(mine.stop))
    )
    index = emit(node, pointwise.sub, ids, number(mine.start))
    return held, emit(node, pointwise.where, held, index, number(0))


def _added_once(bias: Value, rank: int) -> Value:
    """The bias of a sum over ranks: on the first, zeros on the others."""
    return shape.full(value=0, shape=bias.type.shape, dtype=bias.type.dtype) if rank else bias


def emit(node: Node, op: Op, *args: Value, **attrs: Any) -> Value:
    """The op's first result, at the place of `node` in the model."""
    return op.node(args, attrs, node.source).results[0]
