"""Cuts: the rows [start, stop) of one dim of a value, computed from cuts of what it is made of.

`pushed` says, for one node, how much of each argument is enough for a cut of its result. Used by
shard-tensor-parallel, for activations and for the weights that a rank reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ...compiler.ir import Node, Op, Value
from ...compiler.ops import attention, glu, linear, norm, pointwise, reduce, rope, shape
from ...compiler.ops.leaf import constant
from ...compiler.ops.mxfp4 import mxfp4
from ...compiler.types import Shape, dim


class Misaligned(Exception):
    """A cut that goes through the middle of something indivisible; says of what."""


@dataclass(frozen=True)
class Cut:
    """Indices [start, stop) of dim `axis`, counted from the left."""

    axis: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def at(self, axis: int) -> Cut:
        return Cut(axis, self.start, self.stop)


@dataclass(frozen=True)
class Pushed:
    """A node's arguments with the cut that is needed of each (None: all), and its attributes."""

    args: tuple[tuple[Value, Cut | None], ...]
    attrs: Mapping[str, Any]


def pushed(node: Node, cut: Cut) -> Pushed | None:
    """What a cut of the node's one result is computed from; None where a cut needs everything.

    Misaligned when it could be, but for where the cut lies.
    """
    rule = _RULES.get(node.op)
    return rule(node, cut) if rule else None


def is_all(value: Value, cut: Cut) -> bool:
    return (cut.start, cut.stop) == (0, value.type.shape[cut.axis])


def sliced(value: Value, cut: Cut) -> Value:
    """The cut as a slice of the value itself."""
    if is_all(value, cut):
        return value
    return shape.slice_(value, dim=cut.axis, start=cut.start, stop=cut.stop)


def cut_weight(value: Value, cut: Cut) -> Value:
    """A cut of what depends on weights alone, so that little more is read than it needs.

    Past the end there are zeros. Misaligned where a packed weight cannot be cut.
    """
    size = value.type.shape[cut.axis]
    assert isinstance(size, int)
    if value.op is mxfp4 and not is_all(value, cut):
        return _cut_each(value, _mxfp4(value.node, cut))
    if cut.stop > size:
        held = Cut(cut.axis, min(cut.start, size), size)
        padding = list(value.type.shape)
        padding[cut.axis] = cut.size - held.size
        zeros = shape.full(value=0, shape=tuple(padding), dtype=value.type.dtype)
        return shape.cat(cut_weight(value, held), zeros, dim=cut.axis) if held.size else zeros
    if value.op is constant or is_all(value, cut):
        return sliced(value, cut)
    try:
        inner = pushed(value.node, cut)
    except Misaligned:
        inner = None
    return sliced(value, cut) if inner is None else _cut_each(value, inner)


def _cut_each(value: Value, inner: Pushed) -> Value:
    args = tuple(cut_weight(a, c) if c else a for a, c in inner.args)
    return value.op.node(args, inner.attrs, value.node.source).results[0]


def joined_cuts(weight: Value, cuts: Sequence[Cut]) -> Value:
    """Cuts of the rows of a weight one after the other; of a packed weight, in its packed form."""
    if len(cuts) == 1:
        return cut_weight(weight, cuts[0])
    if weight.op is mxfp4:
        parts = tuple(joined_cuts(a, cuts) for a in weight.node.args)
        return mxfp4.node(parts, weight.attrs, weight.node.source).results[0]
    return shape.cat(*(cut_weight(weight, c) for c in cuts), dim=cuts[0].axis)


def _with_size(dims: Shape, axis: int, size: int) -> Shape:
    return shape.replaced(dims, axis, size)


def _rank(node: Node) -> int:
    return node.types[0].rank


# slice(linear(x, W, b)) == linear(x, slice(W), slice(b)); rows of x are rows of the result
def _linear(node: Node, cut: Cut) -> Pushed:
    x, *parameters = node.args
    if cut.axis < _rank(node) - 1:
        return Pushed(((x, cut), *((p, None) for p in parameters)), node.attrs)
    return Pushed(((x, None), *((p, cut.at(0)) for p in parameters)), node.attrs)


# slice(embedding(ids, W)) == embedding(ids, slice(W))
def _embedding(node: Node, cut: Cut) -> Pushed:
    ids, table = node.args
    if cut.axis < _rank(node) - 1:
        return Pushed(((ids, cut), (table, None)), node.attrs)
    return Pushed(((ids, None), (table, cut.at(1))), node.attrs)


# slice(f(x, y)) == f(slice(x), slice(y)); what is broadcast along the dim is taken whole
def _pointwise(node: Node, cut: Cut) -> Pushed:
    def operand(value: Value) -> Cut | None:
        axis = cut.axis - (_rank(node) - value.type.rank)
        return None if axis < 0 or value.type.shape[axis] == 1 else cut.at(axis)

    return Pushed(tuple((a, operand(a)) for a in node.args), node.attrs)


# An index of result dim a is a run of the elements after the dims before it. Where a dim b of the
# operand starts at the same place, it is a run of indices of b, if the run ends between two.
def _view(node: Node, cut: Cut) -> Pushed | None:
    (x,) = node.args
    old, new = x.type.shape, node.types[0].shape
    before = dim(prod(new[: cut.axis]))
    starts = [b for b in range(len(old)) if dim(prod(old[:b])) == before and old[b] != 1]
    if not starts:
        return None
    axis = starts[0]
    rows, inner = dim(prod(new[cut.axis + 1 :])), dim(prod(old[axis + 1 :]))
    if not isinstance(rows, int) or not isinstance(inner, int):
        return None
    if cut.start * rows % inner or cut.stop * rows % inner:
        raise Misaligned(f"{old[axis]} heads of {inner} are cut in parts of {cut.size * rows}")
    there = Cut(axis, cut.start * rows // inner, cut.stop * rows // inner)
    return Pushed(((x, there),), {"shape": _with_size(new, cut.axis, cut.size)})


def _permute(node: Node, cut: Cut) -> Pushed:
    return Pushed(((node.args[0], cut.at(node.attrs["dims"][cut.axis])),), node.attrs)


def _expand(node: Node, cut: Cut) -> Pushed:
    attrs = {"shape": _with_size(node.types[0].shape, cut.axis, cut.size)}
    return Pushed(_pointwise(node, cut).args, attrs)


# slice(slice(x, a, b, s), c, d) == slice(slice(x, a + c·s, a + (d - 1)·s + 1), by s)
def _slice(node: Node, cut: Cut) -> Pushed | None:
    (x,) = node.args
    if node.attrs["dim"] % x.type.rank != cut.axis:
        return Pushed(((x, cut),), node.attrs)
    first, step = node.attrs["start"], node.attrs.get("step", 1)
    if not isinstance(first, int) or not cut.size:
        return None
    length = (cut.size - 1) * step + 1
    there = Cut(cut.axis, first + cut.start * step, first + cut.start * step + length)
    return Pushed(((x, there),), {**node.attrs, "start": 0, "stop": length})


# slice(cat(a, b, ...)) is cat of slices of the parts that it touches
def _cat(node: Node, cut: Cut) -> Pushed | None:
    if node.attrs["dim"] % _rank(node) != cut.axis:
        return Pushed(tuple((a, cut) for a in node.args), node.attrs)
    parts: list[tuple[Value, Cut | None]] = []
    at = 0
    for part in node.args:
        size = part.type.shape[cut.axis]
        if not isinstance(size, int):
            return None
        low, high = max(cut.start, at), min(cut.stop, at + size)
        if low < high:
            parts.append((part, Cut(cut.axis, low - at, high - at)))
        at += size
    return Pushed(tuple(parts), node.attrs) if parts else None


# slice(mxfp4(codes, scales)) == mxfp4(slice(codes), slice(scales)), along K between two groups
def _mxfp4(node: Node, cut: Cut) -> Pushed:
    (codes, scales), (type_,) = node.args, node.types
    if cut.axis < type_.rank - 1:
        return Pushed(((codes, cut), (scales, cut)), node.attrs)
    inner, blocks = type_.shape[-1], scales.type.shape[-1]
    assert isinstance(inner, int) and isinstance(blocks, int)
    group = inner // blocks
    if cut.start % group or cut.stop % group:
        raise Misaligned(f"groups of {group} along K = {inner} are cut in parts of {cut.size}")
    pairs = Cut(cut.axis, cut.start // 2, cut.stop // 2)
    return Pushed(
        ((codes, pairs), (scales, Cut(cut.axis, cut.start // group, cut.stop // group))), node.attrs
    )


def _full(node: Node, cut: Cut) -> Pushed:
    return Pushed((), {**node.attrs, "shape": _with_size(node.types[0].shape, cut.axis, cut.size)})


# Norms, rotations and softmax work along a dim: rows along the others are computed one by one.
def _norm(node: Node, cut: Cut) -> Pushed | None:
    x, *parameters = node.args
    if cut.axis == _rank(node) - 1:
        return None
    return Pushed(((x, cut), *((p, None) for p in parameters)), node.attrs)


def _rope(node: Node, cut: Cut) -> Pushed | None:
    return _norm(node, cut) if cut.axis else None


def _softmax(node: Node, cut: Cut) -> Pushed | None:
    along = node.attrs["dim"] % _rank(node)
    return None if cut.axis == along else Pushed(((node.args[0], cut),), node.attrs)


# Heads are independent. Fewer key/value heads than parts: each part has the one that it needs.
def _attention(node: Node, cut: Cut) -> Pushed | None:
    q, k, v, *sinks = node.args
    if cut.axis != 1:
        return None
    heads, of = q.type.shape[1], k.type.shape[1]
    assert isinstance(heads, int) and isinstance(of, int)
    group = heads // of
    first, last = cut.start // group, -(-cut.stop // group)
    if (cut.start % group or cut.stop % group) and last - first != 1:
        raise Misaligned(
            f"{cut.size} query heads, {cut.start} to {cut.stop - 1}, share {last - first} of {of} "
            f"key/value heads unevenly"
        )
    there = Cut(1, first, last)
    return Pushed(((q, cut), (k, there), (v, there), *((s, cut.at(0)) for s in sinks)), node.attrs)


_RULES: dict[Op, Callable[[Node, Cut], Pushed | None]] = {
    **dict.fromkeys(pointwise.POINTWISE, _pointwise),
    glu.glu: _pointwise,
    linear.linear: _linear,
    linear.embedding: _embedding,
    shape.view: _view,
    shape.permute: _permute,
    shape.expand: _expand,
    shape.slice_: _slice,
    shape.cat: _cat,
    shape.full: _full,
    norm.rms_norm: _norm,
    norm.layer_norm: _norm,
    rope.rope: _rope,
    reduce.softmax: _softmax,
    attention.attention: _attention,
    mxfp4: _mxfp4,
}
