"""Dropping unit dims: each node without its dims of size 1, between views that restore them, and
with the dim that it works along counted from the left.

A model that was traced at batch 1 becomes a graph over T tokens, once views of views are composed:
parameters and outputs keep their types, with views at the border. Used by canonicalize.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...compiler.axes import Axes, Dims
from ...compiler.ir import Graph, Node, Value
from ...compiler.ops import shape
from ...compiler.ops.leaf import literal
from ...compiler.rewrite import Applied
from ...compiler.types import Shape


# f(x) == view(f(view(x, without unit dims)), with them), where f takes any number of such dims
def unit_dims_dropped(graph: Graph) -> Iterator[Applied]:
    """The rewrites of every node that has unit dims which its op can do without."""
    for node in graph.nodes():
        if (after := _without_unit_dims(node)) is not None:
            yield Applied("drop-unit-dims", node.args, node.results, after)


def _without_unit_dims(node: Node) -> tuple[Value, ...] | None:
    axes = node.axes
    # A view is composed with the views around it.
    if axes is None or node.op is shape.view:
        return None
    operands = [_kept(axes, a.type.shape, d) for a, d in zip(node.args, axes.operands, strict=True)]
    results = [_kept(axes, t.shape, d) for t, d in zip(node.types, axes.results, strict=True)]
    attrs = dict(node.attrs)
    if attrs.get("keepdim"):
        at = attrs["dim"] % node.types[0].rank
        attrs["keepdim"], results[0] = False, [i for i in results[0] if i != at]
    kept = [*map(len, operands), *map(len, results)]
    ranks = [x.rank for x in (*(a.type for a in node.args), *node.types)]
    if kept == ranks and attrs.get("dim", 0) >= 0:
        return None
    if "dim" in attrs:
        attrs["dim"] = operands[0].index(attrs["dim"] % node.args[0].type.rank)
    if "dims" in attrs:
        attrs["dims"] = tuple(operands[0].index(i) for i in attrs["dims"] if i in operands[0])
    if "shape" in attrs:
        attrs["shape"] = tuple(node.types[0].shape[i] for i in results[0])
    args = tuple(
        a if a.op is literal else _viewed(a, tuple(a.type.shape[i] for i in at), node.source)
        for a, at in zip(node.args, operands, strict=True)
    )
    after = node.rebuilt(args, attrs).results
    return tuple(
        _viewed(new, old.shape, node.source) for new, old in zip(after, node.types, strict=True)
    )


def _kept(axes: Axes, dims: Shape, labels: Dims) -> list[int]:
    """The dims that stay: all but unit dims that are free, or broadcast and in front."""
    kept: list[int] = []
    for i, (size, factors) in enumerate(zip(dims, labels, strict=True)):
        broadcast = factors[0].startswith("~") and not kept
        if not broadcast and (size != 1 or not axes.free.issuperset(factors)):
            kept.append(i)
    return kept


def _viewed(value: Value, target: Shape, source: str) -> Value:
    if value.type.shape == target:
        return value
    attrs: dict[str, Any] = {"shape": target}
    return Value(shape.view.node((value,), attrs, source))
