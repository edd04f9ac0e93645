"""Rules for indices that are tensors: advanced indexing, and a number scattered.

They are rules as in `aten_rules`: NotImplemented leaves an `aten.*` node.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...compiler.dtypes import INTEGERS
from ...compiler.ir import Value
from ...compiler.ops import pointwise, shape
from ...compiler.ops import reduce as reduction
from ...compiler.ops.leaf import literal

if TYPE_CHECKING:
    from .torch_export import Importer as Im


def scatter(im: Im, x: Value, axis: int, index: Value, value: Any) -> Any:
    """x with a number at indices along one dim, whose other dims are those of x."""
    axis %= x.type.rank
    sizes = [s for i, s in enumerate(index.type.shape) if i != axis]
    if sizes != [s for i, s in enumerate(x.type.shape) if i != axis]:
        return NotImplemented
    return im.emit(shape.scatter, x, index, dim=axis, value=value)


def index(im: Im, x: Value, indices: list[Value | None]) -> Any:
    """x[i, :, j]: the dims that are indexed come first and become one, whose rows are taken."""
    by_axis = {axis: i for axis, i in enumerate(indices) if i is not None}
    if any(i.type.dtype not in INTEGERS for i in by_axis.values()):
        return NotImplemented
    rest = [axis for axis in range(x.type.rank) if axis not in by_axis]
    sizes = [x.type.shape[axis] for axis in rest]
    rows: Value | None = None
    for axis, i in by_axis.items():
        size = x.type.shape[axis]
        if not isinstance(size, int):
            return NotImplemented
        place = _counted_from_the_start(im, im.to_dtype(i, "i64"), size)
        if rows is not None:
            before = im.emit(pointwise.mul, rows, literal(value=size, dtype="i64"))
            place = im.emit(pointwise.add, before, place)
        rows = place
    assert rows is not None
    order = (*by_axis, *rest)
    table = x if order == tuple(sorted(order)) else im.emit(shape.permute, x, dims=order)
    count = math.prod(x.type.shape[axis] for axis in by_axis)
    taken = im.emit(shape.take, im.to_shape(table, (count, *sizes)), rows)
    # Where the indexed dims follow one another, what is taken stands in their place.
    first, last, rank = min(by_axis), max(by_axis), rows.type.rank
    if first == 0 or last - first >= len(by_axis):
        return taken
    dims = [*range(rank, rank + first), *range(rank), *range(rank + first, taken.type.rank)]
    return im.emit(shape.permute, taken, dims=tuple(dims))


def _counted_from_the_start(im: Im, index: Value, size: int) -> Value:
    """`index` with `size` added where it is negative."""
    if _is_place(index):
        return index
    zero, length = (literal(value=n, dtype="i64") for n in (0, size))
    behind = im.emit(pointwise.lt, index, zero)
    return im.emit(pointwise.where, behind, im.emit(pointwise.add, index, length), index)


def _is_place(index: Value) -> bool:
    """Whether an index is known to be none of those that count from the end."""
    node = index.node
    if node.op in (shape.view, shape.permute, shape.expand, shape.slice_):
        return _is_place(node.args[0])
    counted = node.op is shape.arange and isinstance(node.attrs["start"], int)
    return counted and node.attrs["start"] >= 0 or node.op in (reduction.topk, reduction.argmax)
