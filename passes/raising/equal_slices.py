"""Slices along a dim over which every index is the same: copies that `expand` made.

Rotary embeddings of models for images and text (M-RoPE) take three or four positions a token: time,
height and width. Text has the one position in all of them, so that what is computed from the copies
is computed once. Rules of `canonicalize`.
"""

from __future__ import annotations

from math import prod

from ...compiler.axes import position
from ...compiler.ir import Value
from ...compiler.ops import shape
from ...compiler.rewrite import Decline, Match, Pat, Rule, pat
from ...compiler.types import Dim, dim

X = Pat()


def _operand_dims(value: Value, axis: int) -> list[int | None] | None:
    """The dim of each operand that dim `axis` of `value` comes from, index by index.

    None for an operand that has no such dim; None for all where indices are not computed each by
    itself, or by a rule that is not known.
    """
    node, sizes = value.node, value.type.shape
    if node.op is shape.expand:
        (x,) = node.args
        at = axis - (value.type.rank - x.type.rank)
        return [None if at < 0 or x.type.shape[at] != sizes[axis] else at]
    if node.op is shape.view:
        (x,) = node.args
        before = dim(prod(sizes[:axis]))
        held = [i for i, size in enumerate(x.type.shape) if size == sizes[axis]]
        return next(([i] for i in held if dim(prod(x.type.shape[:i])) == before), None)
    axes = node.axes
    if axes is None or len(node.types) != 1 or len(axes.results[0][axis]) != 1:
        return None
    (label,) = axes.results[0][axis]
    if not (axes.is_plain(label) or (node.op is shape.slice_ and label == axes.along)):
        return None
    return [position(dims, label) for dims in axes.operands]


def _is_same(value: Value, axis: int, known: dict[tuple[Value, int], bool]) -> bool:
    """Whether all indices of a dim certainly hold the same."""
    if value.type.shape[axis] == 1:
        return True
    if (value, axis) not in known:
        dims = _operand_dims(value, axis) if value.node.args else None
        known[value, axis] = dims is not None and all(
            at is None or _is_same(x, at, known)
            for x, at in zip(value.node.args, dims, strict=True)
        )
    return known[value, axis]


def _first(value: Value, axis: int, count: Dim) -> Value:
    """The first `count` indices of a dim over which all are the same."""
    node = value.node
    if value.type.shape[axis] in (1, count):
        return value
    dims = _operand_dims(value, axis)
    assert dims is not None
    args = [
        x if at is None else _first(x, at, count) for x, at in zip(node.args, dims, strict=True)
    ]
    attrs = dict(node.attrs)
    if "shape" in attrs:
        attrs["shape"] = shape.replaced(attrs["shape"], axis, count)
    if node.op is shape.slice_ and attrs["dim"] % value.type.rank == axis:
        return args[0]
    return Value(node.rebuilt(args, attrs))


# slice(f(expand(x)), a, b) == f(expand(x) to b - a) along a dim of which all indices are the same
SLICE = pat(shape.slice_, X)


def _slice_of_same(m: Match) -> Value:
    x, cut = m[X], m[SLICE]
    axis = cut.attrs["dim"] % x.type.rank
    count, size = cut.type.shape[axis], x.type.shape[axis]
    if not (isinstance(count, int) and isinstance(size, int) and 0 < count < size):
        raise Decline("nothing is left out, or it is not known how much")
    if not _is_same(x, axis, {}):
        raise Decline("indices differ")
    return _first(x, axis, count)


# expand(x) == view(x) where nothing is repeated
COPIES = pat(shape.expand, X)


def _no_copies(m: Match) -> Value:
    if dim(prod(m[X].type.shape)) != dim(prod(m[COPIES].type.shape)):
        raise Decline("it makes copies")
    return shape.view(m[X], shape=m[COPIES].type.shape)


# slice_scatter(x, slice(x, a, b), a, b) == x
PART = pat(shape.slice_, X)
PUT_BACK = pat(shape.slice_scatter, X, PART)


def _put_back(m: Match) -> Value:
    rank = m[X].type.rank
    put, taken = (
        (a["dim"] % rank, a["start"], a["stop"], a.get("step", 1))
        for a in (m[PUT_BACK].attrs, m[PART].attrs)
    )
    if put != taken:
        raise Decline("it is put elsewhere")
    return m[X]


RULES = (
    Rule("slice-of-same", (SLICE,), _slice_of_same),
    Rule("expand-without-copies", (COPIES,), _no_copies),
    Rule("put-back", (PUT_BACK,), _put_back),
)
