"""What moves values and computes nothing, as passes build it: none of it without effect.

What passes do to weights is ordinary ops on constants, folded when a program is loaded: what moves
a product moves the rows of its weight, and a packed weight is moved by its codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

from ..compiler.ir import Node, Value
from ..compiler.ops import shape
from ..compiler.ops.linear import is_plain, linear
from ..compiler.ops.mxfp4 import mxfp4
from ..compiler.rewrite import Decline
from ..compiler.types import Dim, Shape


def is_projection(value: Value) -> bool:
    """Whether `value` is a linear with a bias at most, whose weights depend on no input."""
    return is_plain(value.node) and all(a.node.is_constant for a in value.node.args[1:])


# f(mxfp4(a, s)) == mxfp4(f(a), f(s)) where f moves whole rows, or whole groups of a shared scale
def by_parts(f: Callable[[Value], Value], weight: Value) -> Value:
    """f(weight); of a packed weight packed: of its codes and its scales."""
    if weight.op is not mxfp4:
        return f(weight)
    parts = tuple(map(f, weight.node.args))
    return weight if parts == weight.node.args else mxfp4(*parts, **weight.attrs)


def viewed(value: Value, dims: Shape) -> Value:
    """`value` as `dims`, without the views before that."""
    while value.op is shape.view and value.type.shape != dims:
        (value,) = value.node.args
    return value if value.type.shape == dims else shape.view(value, shape=dims)


def sliced(value: Value, axis: int, start: Dim, stop: Dim, step: int = 1) -> Value:
    """Every `step`-th index of [start, stop) along `axis`; Decline where that cuts a group."""
    if (start, stop, step) == (0, value.type.shape[axis], 1):
        return value
    extra = {} if step == 1 else {"step": step}

    def cut(part: Value) -> Value:
        bounds = start, stop
        if part.type.shape[axis] != value.type.shape[axis]:
            held = value.type.shape[axis] // part.type.shape[axis]
            if step != 1 or start % held or stop % held or start == stop:
                raise Decline(f"[{start}, {stop}) by {step} cuts groups of {held} packed elements")
            bounds = start // held, stop // held
        return shape.slice_(part, dim=axis, start=bounds[0], stop=bounds[1], **extra)

    return by_parts(cut, value)


# cat(mxfp4(a, s), mxfp4(b, t)) == mxfp4(cat(a, b), cat(s, t)): no scale is for two operands
def concatenated(values: Sequence[Value], axis: int = 0) -> Value:
    """`values` one after the other along `axis`, packed if they are; adjacent slices are one.

    Decline where some are packed and others not, or where their formats differ.
    """
    packed = [v.op is mxfp4 for v in values]
    if not any(packed):
        return _joined(values, axis)
    formats = {(v.stored.dtype, v.type.dtype) for v in values}
    if not all(packed) or len(formats) > 1:
        found = ", ".join(sorted({v.stored.dtype for v in values}))
        raise Decline(f"weights in several formats are not one weight: {found}")
    parts = [_joined(part, axis) for part in zip(*(v.node.args for v in values), strict=True)]
    return values[0] if len(values) == 1 else mxfp4(*parts, **values[0].attrs)


# cat(x[a:b], x[b:c]) == x[a:c]
def _joined(parts: Sequence[Value], axis: int) -> Value:
    joined: list[Value] = []
    for part in parts:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.op is part.op is shape.slice_
            and last.node.args == part.node.args
        ):
            (p, q), dims = (last.attrs, part.attrs), part.type.rank
            along = p["dim"] % dims == q["dim"] % dims == axis % dims
            if along and p["stop"] == q["start"] and "step" not in p and "step" not in q:
                (x,) = part.node.args
                joined[-1] = sliced(x, axis % dims, p["start"], q["stop"])
                continue
        joined.append(part)
    return joined[0] if len(joined) == 1 else shape.cat(*joined, dim=axis)


@dataclass(frozen=True)
class Rows:
    """A value that is made of a product: y[t, …] = weight[…] · x[t] + bias[…].

    `nodes` are those between x and y, the product among them.
    """

    x: Value
    weight: Value
    bias: Value | None
    nodes: frozenset[Node]

    @staticmethod
    def of(value: Value) -> Rows:
        """Decline where `value` is no views, slices and permutes of a product of a weight."""
        moves: list[Node] = []
        while value.op in (shape.view, shape.slice_, shape.permute):
            moves.insert(0, value.node)
            value = value.node.args[0]
        if value.op is not linear:
            raise Decline(f"{value.op.name} where a product of tokens and a weight is expected")
        if not is_projection(value):
            raise Decline("a weight of the product depends on the input")
        (x, weight), bias = value.node.args[:2], value.node.operand("bias")
        bias = None if bias is None else _rows_moved(moves, bias)
        return Rows(x, _rows_moved(moves, weight), bias, frozenset((value.node, *moves)))

    def flat(self) -> Rows:
        """All rows one after the other."""
        count = prod(self.weight.type.shape[:-1])
        weight = by_parts(lambda x: viewed(x, (count, x.type.shape[-1])), self.weight)
        bias = None if self.bias is None else viewed(self.bias, (count,))
        return replace(self, weight=weight, bias=bias)


def _rows_moved(moves: Sequence[Node], weight: Value) -> Value:
    """What `moves` do to a product [..., N], one after the other, done to its weight [N, ...].

    Decline where they touch the tokens.
    """
    first = moves[0].args[0].type.rank - 1 if moves else 0

    def moved(rows: Value) -> Value:
        tail = rows.type.shape[1:]
        for move in moves:
            (x,), (result,), attrs = move.args, move.types, move.attrs
            axis = attrs.get("dim", 0) % x.type.rank - first
            dims = attrs.get("dims", ())
            if move.op is shape.view and x.type.shape[:first] == result.shape[:first]:
                rows = viewed(rows, (*result.shape[first:], *tail))
            elif move.op is shape.slice_ and axis >= 0:
                rows = sliced(rows, axis, attrs["start"], attrs["stop"], attrs.get("step", 1))
            elif move.op is shape.permute and dims[:first] == (*range(first),):
                order = [d - first for d in dims[first:]]
                rows = shape.permute(rows, dims=(*order, *range(len(order), rows.type.rank)))
            else:
                raise Decline(f"a {move.op.name} of the product touches the tokens")
        return rows

    return by_parts(moved, weight)


def one_product(parts: Sequence[Rows]) -> tuple[Value, Value | None]:
    """Weight and bias of the one product that makes `parts`; zeros where only others have one."""
    weight = concatenated([p.weight for p in parts])
    if all(p.bias is None for p in parts):
        return weight, None
    return weight, concatenated([_zeros(p.weight) if p.bias is None else p.bias for p in parts])


def _zeros(weight: Value) -> Value:
    return shape.full(value=0.0, shape=weight.type.shape[:-1], dtype=weight.type.dtype)
