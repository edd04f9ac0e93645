"""Slices of results, from slices of operands: indices [start, stop) of one dim of a value.

`propagate_slice` says, for one node, how much of each operand is enough for a slice of its result:
it follows from the op's axis rule. Used by shard-tensor-parallel, for activations and for the
weights that a rank reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...compiler.axes import Axes, Dims, Factors, position
from ...compiler.ir import Node, Value
from ...compiler.ops import shape
from ...compiler.ops.leaf import constant
from ...compiler.ops.mxfp4 import mxfp4
from ..moves import concatenated, sliced

# Indices [start, stop) of each label that is not whole.
Ranges = Mapping[str, tuple[int, int]]


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

    def of(self, value: Value) -> Value:
        """The cut as a slice of the value itself."""
        return sliced(value, self.axis, self.start, self.stop)


@dataclass(frozen=True)
class Propagated:
    """A node's arguments with the cut that is needed of each (None: all), and its attributes."""

    args: tuple[tuple[Value, Cut | None], ...]
    attrs: Mapping[str, Any]


def propagate_slice(node: Node, cut: Cut) -> Propagated | None:
    """What a cut of the node's one result is computed from; None where a cut needs everything.

    Misaligned when it could be, but for where the cut lies.
    """
    axes = node.axes
    if axes is None or len(node.types) != 1:
        return None
    factors = axes.results[0][cut.axis]
    if factors == (axes.along,):
        return _along(node, cut)
    if not factors or not axes.is_plain(factors[0]):
        return None
    ranges = _ranges(axes, factors, cut)
    args = tuple(
        (a, _cut_of(axes, dims, ranges)) for a, dims in zip(node.args, axes.operands, strict=True)
    )
    if any(c is _SCATTERED for _, c in args):
        return None
    attrs = dict(node.attrs)
    if "shape" in attrs:
        attrs["shape"] = shape.replaced(attrs["shape"], cut.axis, cut.size)
    return Propagated(args, attrs)


# Where the indices that are needed do not lie one after the other.
_SCATTERED = Cut(-1, 0, 0)


def _ranges(axes: Axes, factors: Factors, cut: Cut) -> Ranges:
    """What a cut of a dim takes of the labels that it is made of.

    Either whole indices of one label, or a part of one index of it. Misaligned otherwise, and where
    that part is of something whole.
    """
    ranges: dict[str, tuple[int, int]] = {}
    start, stop = cut.start, cut.stop
    for i, label in enumerate(factors):
        inner: Any = axes.size(factors[i + 1 :])
        if start % inner == 0 and stop % inner == 0:
            ranges[label] = (start // inner, stop // inner)
            break
        first, last = start // inner, -(-stop // inner)
        if last - first != 1:
            break
        ranges[label] = (first, last)
        start, stop = start - first * inner, stop - first * inner
    else:
        start = -1
    if not ranges or not all(map(axes.is_plain, ranges)) or start == -1:
        raise _misaligned(axes, factors, cut)
    return ranges


def _misaligned(axes: Axes, factors: Factors, cut: Cut) -> Misaligned:
    inner = axes.size(factors[1:])
    return Misaligned(
        f"{axes.sizes[factors[0]]} blocks of {inner} are cut in parts of {cut.size}, at {cut.start}"
    )


def _cut_of(axes: Axes, dims: Dims, ranges: Ranges) -> Cut | None:
    """The cut of an operand that `ranges` take; None for all of it, or _SCATTERED."""
    found: list[Cut] = []
    for axis, factors in enumerate(dims):
        if not ranges.keys() & set(factors):
            continue
        start, stop = 0, 1
        for label in factors:
            size: Any = axes.sizes[label]
            if not isinstance(size, int) and len(factors) > 1:
                return _SCATTERED
            if label not in ranges:
                start, stop = start * size, stop * size
                continue
            if stop - start != 1:
                return _SCATTERED
            start, stop = (start * size + end for end in ranges[label])
        found.append(Cut(axis, start, stop))
    if len(found) > 1:
        sizes = " · ".join(str(axes.size(dims[c.axis])) for c in found)
        parts = " · ".join(str(c.size) for c in found)
        raise Misaligned(f"dims of {sizes} are cut in parts of {parts}")
    return found[0] if found else None


def _along(node: Node, cut: Cut) -> Propagated | None:
    """A cut of the dim that slice and cat work along: both only say where its indices come from."""
    if node.op is shape.slice_:
        return _slice(node, cut)
    return _cat(node, cut) if node.op is shape.cat else None


# slice(slice(x, a, b, s), c, d) == slice(slice(x, a + c·s, a + (d - 1)·s + 1), by s)
def _slice(node: Node, cut: Cut) -> Propagated | None:
    (x,) = node.args
    first, step = node.attrs["start"], node.attrs.get("step", 1)
    if not isinstance(first, int) or not cut.size:
        return None
    length = (cut.size - 1) * step + 1
    there = Cut(cut.axis, first + cut.start * step, first + cut.start * step + length)
    return Propagated(((x, there),), {**node.attrs, "start": 0, "stop": length})


# slice(cat(a, b, ...)) is cat of slices of the parts that it touches
def _cat(node: Node, cut: Cut) -> Propagated | None:
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
    return Propagated(tuple(parts), node.attrs) if parts else None


def is_all(value: Value, cut: Cut) -> bool:
    return (cut.start, cut.stop) == (0, value.type.shape[cut.axis])


def cut_weight(value: Value, cut: Cut) -> Value:
    """A cut of what depends on weights alone, so that little more is read than it needs.

    Past the end there are zeros. Misaligned where a packed weight cannot be cut.
    """
    size = value.type.shape[cut.axis]
    assert isinstance(size, int)
    if value.op is mxfp4 and not is_all(value, cut):
        inner = propagate_slice(value.node, cut)
        assert inner is not None
        return _cut_each(value, inner)
    if cut.stop > size:
        held = Cut(cut.axis, min(cut.start, size), size)
        padding = list(value.type.shape)
        padding[cut.axis] = cut.size - held.size
        zeros = shape.full(value=0, shape=tuple(padding), dtype=value.type.dtype)
        return shape.cat(cut_weight(value, held), zeros, dim=cut.axis) if held.size else zeros
    if value.op is constant or is_all(value, cut):
        return cut.of(value)
    try:
        inner = propagate_slice(value.node, cut)
    except Misaligned:
        inner = None
    return cut.of(value) if inner is None else _cut_each(value, inner)


def _cut_each(value: Value, inner: Propagated) -> Value:
    args = tuple(cut_weight(a, c) if c else a for a, c in inner.args)
    return value.node.rebuilt(args, inner.attrs).results[0]


def cut_label(value: Value, axes: Axes, dims: Dims, label: str, part: tuple[int, int]) -> Value:
    """The indices `part` of a label of a weight, from every block of those before it in its dim."""
    axis = position(dims, label)
    if axis is None:
        return value
    before, after = dims[axis][: (at := dims[axis].index(label))], dims[axis][at + 1 :]
    size, blocks, inner = (int(axes.size(f)) for f in ((label,), before, after))
    starts = [(block * size + part[0]) * inner for block in range(blocks)]
    cuts = [Cut(axis, s, s + (part[1] - part[0]) * inner) for s in starts]
    return concatenated([cut_weight(value, c) for c in cuts], axis)
