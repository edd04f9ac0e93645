"""Values a head, read as rows of the weight that makes them.

A product that is viewed by heads, cut and turned is the product with a weight that is viewed, cut
and turned alike: tokens stay the first dim, and what is done to the others is done to rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.ir import Node, Value
from ...compiler.ops import shape
from ...compiler.ops.linear import linear
from ...compiler.rewrite import Decline
from ...compiler.types import Shape

_MOVES = (shape.view, shape.slice_, shape.permute)


@dataclass(frozen=True)
class HeadRows:
    """y[t, h, d] = weight[h, d] · x[t] + bias[h, d].

    `nodes` are those between `x` and y, the product among them.
    """

    x: Value
    weight: Value
    bias: Value | None
    nodes: frozenset[Node]


def head_rows(value: Value) -> HeadRows:
    """`value` [T, H, D] as rows of a weight. Decline where it is no product of a weight."""
    moves: list[Node] = []
    while value.op in _MOVES:
        moves.append(value.node)
        value = value.node.args[0]
    if value.op is not linear or value.type.rank != 2:
        raise Decline(f"{value.op.name} where a product of tokens and a weight is expected")
    (x, weight), bias = value.node.args[:2], value.node.operand("bias")
    if not all(a.node.is_constant for a in value.node.args[1:]):
        raise Decline("a weight of the product depends on the input")
    for node in reversed(moves):
        weight = _on_rows(node, weight, x.type.shape[-1:])
        bias = None if bias is None else _on_rows(node, bias, ())
    if len(weight.type.shape) != 3:
        raise Decline(f"the product becomes rows {weight.type}, not rows of heads")
    return HeadRows(x, weight, bias, frozenset((value.node, *moves)))


def _on_rows(move: Node, rows: Value, tail: Shape) -> Value:
    """What `move` does to [T, ...] done to [..., *tail]."""
    before, after = move.args[0].type.shape, move.types[0].shape
    if move.op is shape.view and before[0] == after[0]:
        return shape.view(rows, shape=(*after[1:], *tail))
    if move.op is shape.slice_ and move.attrs["dim"] % len(before):
        return shape.slice_(rows, **{**move.attrs, "dim": move.attrs["dim"] % len(before) - 1})
    if move.op is shape.permute and move.attrs["dims"][0] == 0:
        dims = tuple(d - 1 for d in move.attrs["dims"][1:])
        return shape.permute(rows, dims=(*dims, *range(len(dims), rows.type.rank)))
    raise Decline(f"a {move.op.name} of the product touches the tokens")
