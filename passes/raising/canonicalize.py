"""canonicalize: one way to say each thing. Dead code and repetitions go, views become few.

Unit dims are dropped, equal nodes merged, views and permutes composed, slices of concatenations
resolved, casts that change nothing removed. What is left is what later passes match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...compiler.dtypes import DTYPES, FLOATS
from ...compiler.ir import Graph, Node, Op, Value
from ...compiler.ops import pointwise, reduce, shape
from ...compiler.ops.aten import AXES
from ...compiler.ops.leaf import is_literal, literal
from ...compiler.ops.linear import embedding, matmul
from ...compiler.pipeline import PassContext, count_nodes
from ...compiler.rewrite import (
    Applied,
    Decline,
    Log,
    Match,
    Other,
    Pat,
    Rule,
    pat,
    rewrite_all,
)
from ...compiler.torch_types import torch_dtype
from ...compiler.types import dim
from ..moves import concatenated, sliced
from .equal_slices import RULES as EQUAL_SLICE_RULES
from .mxfp4_views import RULES as MXFP4_RULES
from .unit_dims import unit_dims_dropped

_INTEGERS = ("bool", "u8", "i8", "i16", "i32", "i64")
X, Y = Pat(), Pat()


def _over(op: Any) -> Pat:
    """Any result of `op`. A wildcard, it may have other users: nothing that is built repeats it."""
    return Pat(where=lambda v: v.op is op)


# ---- views

VIEW = pat(shape.view, _over(shape.view))
PERMUTE = pat(shape.permute, _over(shape.permute))
ONE_PERMUTE = pat(shape.permute, X)


def _arg(value: Value, i: int = 0) -> Value:
    return value.node.args[i]


def _same_type(root: Pat) -> Any:
    def build(m: Match) -> Value:
        if m[X].type != m[root].type:
            raise Decline("the type changes")
        return m[X]

    return build


# f(x) == x where f does not even change the type
def _same(op: Op) -> Rule:
    root = pat(op, X)
    return Rule(f"same-{op.name}", (root,), _same_type(root))


# view(view(x)) == view(x)
def _view_of_view(m: Match) -> Value:
    return shape.view(_arg(_arg(m[VIEW])), shape=m[VIEW].type.shape)


# f of a filled tensor is a filled tensor
def _function_of_full(op: Op) -> Rule:
    root = pat(op, _over(shape.full))

    def build(m: Match) -> Value:
        source, type_ = _arg(m[root]), m[root].type
        value = source.attrs["value"]
        if op not in (shape.view, shape.expand):
            filled = torch.full((), value, dtype=torch_dtype(source.type.dtype))
            value = op.reference(filled, **m[root].attrs)[0].item()
        return shape.full(value=value, shape=type_.shape, dtype=type_.dtype)

    return Rule(f"{op.name}-of-full", (root,), build)


# where everywhere, or nowhere
CHOOSE = pat(pointwise.where, _over(shape.full), X, Y)


def _chosen(m: Match) -> Value:
    value = m[X] if _arg(m[CHOOSE]).attrs["value"] else m[Y]
    if value.type != m[CHOOSE].type:
        raise Decline(f"{value.type} would have to be broadcast")
    return value


# the largest of one is that one
def _of_one(value: Value) -> bool:
    return _arg(value).type.shape[value.attrs["dim"]] == 1


ONE_OF_ONE = Pat(reduce.topk, (X,), where=_of_one)


def _only_one(m: Match) -> tuple[Value, Value]:
    return m[X], shape.full(value=0, shape=m[X].type.shape, dtype="i64")


# a sum, mean or maximum of one is that one
def _reduction_of_one(op: Op) -> Rule:
    root = Pat(op, (X,), where=_of_one)
    return Rule(f"{op.name}-of-one", (root,), lambda m: shape.view(m[X], shape=m[root].type.shape))


# x [.., M, 1] @ y [.., 1, N] == x · y
OUTER = pat(matmul, X, Y)


def _outer_product(m: Match) -> Value:
    if m[X].type.shape[-1] != 1:
        raise Decline("it is a sum of several")
    return pointwise.mul(m[X], m[Y])


# a number scattered to every place of a unit dim is everywhere
SCATTER_VALUE = pat(shape.scatter, X, Pat(where=lambda v: v.op is shape.full))


def _scattered_everywhere(m: Match) -> Value:
    attrs, type_, index = m[SCATTER_VALUE].attrs, m[X].type, m[SCATTER_VALUE].node.args[1]
    if type_.shape[attrs["dim"]] != 1 or index.type.shape != type_.shape:
        raise Decline("some places are not written")
    return shape.full(value=attrs["value"], shape=type_.shape, dtype=type_.dtype)


# permute(permute(x, a), b) == permute(x, [a[i] for i in b])
def _permute_of_permute(m: Match) -> Value:
    inner, outer = _arg(m[PERMUTE]), m[PERMUTE]
    dims = tuple(inner.attrs["dims"][i] for i in outer.attrs["dims"])
    return shape.permute(_arg(inner), dims=dims)


def _trivial_permute(m: Match) -> Value:
    """A permute that keeps the order of all dims but unit ones is a view."""
    x, dims = m[X], m[ONE_PERMUTE].attrs["dims"]
    kept = [d for d in dims if x.type.shape[d] != 1]
    if kept != sorted(kept):
        raise Decline("the order of elements changes")
    return shape.view(x, shape=m[ONE_PERMUTE].type.shape)


# ---- permutes towards what they can cancel with: permute(f(x, y)) == f(permute(x), permute(y))

_SEARCH_DEPTH = 12


def _is_permutable(node: Node) -> bool:
    """Whether dims of the node's operands may be permuted instead of those of its one result.

    Products may not: their operands lie in memory as they are multiplied.
    """
    axes = node.axes
    return axes is not None and len(node.types) == 1 and axes.sums <= {axes.along}


def _carries_permute(value: Value, depth: int = _SEARCH_DEPTH) -> bool:
    if value.op is shape.permute:
        return True
    through = depth > 0 and value.node.args and _is_permutable(value.node)
    return bool(through) and any(_carries_permute(a, depth - 1) for a in value.node.args)


def _is_outer_product(value: Value) -> bool:
    """Whether each operand of an element-wise op is a row or a column: permuting them is free."""
    rows = all(sum(d != 1 for d in a.type.shape) <= 1 for a in value.node.args)
    return rows and value.op in pointwise.POINTWISE and 1 not in value.type.shape


def _is_worth_moving(value: Value) -> bool:
    if value.op is shape.expand:  # less is moved
        return True
    return _is_outer_product(value) or (_carries_permute(value) and _is_permutable(value.node))


def _ordered(value: Value, order: Sequence[int | None]) -> Value:
    """The dims of `value` in another order; None stands for a new dim of size 1."""
    dims = [i for i in order if i is not None]
    kept = [i for i in dims if value.type.shape[i] != 1]
    if kept != sorted(kept):
        value = shape.permute(value, dims=tuple(dims))
        dims = list(range(len(dims)))
        order = [None if i is None else dims.pop(0) for i in order]
    target = tuple(1 if i is None else value.type.shape[i] for i in order)
    return value if value.type.shape == target else shape.view(value, shape=target)


def _hoist(op: Op | str) -> Rule:
    inner = Pat(op, where=_is_worth_moving)
    root = pat(shape.permute, inner)

    def build(m: Match) -> Value:
        node, dims = m[inner].node, m[root].attrs["dims"]
        axes = node.axes
        assert axes is not None
        labels = [f[0] for f in axes.results[0]]
        movable = axes.free | {axes.along}
        if any(d != i and labels[d] not in movable for i, d in enumerate(dims)):
            raise Decline("a dim that moves is the op's own")
        attrs, args = dict(node.attrs), list[Value]()
        # A dim of the op's own that only the result has: no operand is broadcast over it.
        own_dims = axes.whole - {f[0] for own in axes.operands for f in own}
        moved = [labels[d] for d in dims if labels[d] not in own_dims]
        for x, own in zip(node.args, axes.operands, strict=True):
            held = [f[0].removeprefix("~") for f in own]
            broadcast = {n.removeprefix("~") for (n,) in own if n.startswith("~")}
            order = [held.index(n) if n in held else None for n in moved]
            # What is broadcast need not be there in front.
            while order and (order[0] is None or held[order[0]] in broadcast):
                order.pop(0)
            for i, label in enumerate(held):
                if label not in labels:
                    order.insert(i, i)
            args.append(_ordered(x, order))
            if axes.along in held and x is node.args[0]:
                at = held.index(axes.along)
                attrs["dim"] = attrs["dim"] if order[at] == at else order.index(at)
        if "shape" in attrs:
            attrs["shape"] = m[root].type.shape
        return Value(node.rebuilt(args, attrs))

    return Rule(f"permute-of-{inner.op_name}", (root,), build)


# permute(view(x)) == view(permute(x)) where the view leaves the permuted leading dims as they are
RESHAPED = Pat(shape.view, (X,), where=_carries_permute)
TURNED_VIEW = pat(shape.permute, RESHAPED)


def _view_permute(m: Match) -> Value:
    x, dims = m[X], m[TURNED_VIEW].attrs["dims"]
    moved = max((i + 1 for i, d in enumerate(dims) if i != d), default=0)
    if x.type.shape[:moved] != m[RESHAPED].type.shape[:moved]:
        raise Decline("the view touches the dims that move")
    turned = shape.permute(x, dims=(*dims[:moved], *range(moved, x.type.rank)))
    return shape.view(turned, shape=m[TURNED_VIEW].type.shape)


# ---- slices and concatenations

NESTED_SLICE = pat(shape.slice_, _over(shape.slice_))
CUT = pat(shape.slice_, _over(shape.cat))
SCATTER = pat(shape.slice_scatter, X, Y)
CAT = pat(shape.cat)


# slice(slice(x, a, b, s), c, d, t) == slice(x, a + c·s, a + d·s, s·t), within b
def _slice_of_slice(m: Match) -> Value:
    outer, inner = m[NESTED_SLICE], _arg(m[NESTED_SLICE])
    rank = inner.type.rank
    if outer.attrs["dim"] % rank != inner.attrs["dim"] % rank:
        raise Decline("the slices are along two dims")
    step, first = inner.attrs.get("step", 1), inner.attrs["start"]
    if step != 1:
        raise Decline("the inner slice has a step")
    start, stop = (dim(first + outer.attrs[k]) for k in ("start", "stop"))
    return sliced(_arg(inner), outer.attrs["dim"] % rank, start, stop, outer.attrs.get("step", 1))


def _overlaps(whole: Value, axis: int, start: int, stop: int) -> list[tuple[Value, int, int]]:
    """The operands of a cat that [start, stop) touches, each with its own bounds."""
    found: list[tuple[Value, int, int]] = []
    at = 0
    for part in whole.node.args:
        size: Any = part.type.shape[axis]
        low, high = max(start, at), min(stop, at + size)
        if low < high:
            found.append((part, low - at, high - at))
        at += size
    return found


# slice(cat(a, b, ...)) is cat of slices of the parts that it touches
def _slice_of_cat(m: Match) -> Value:
    cut, whole = m[CUT], _arg(m[CUT])
    axis = cut.attrs["dim"] % whole.type.rank
    start, stop, step = (cut.attrs.get(k, 1) for k in ("start", "stop", "step"))
    if axis != whole.attrs["dim"] % whole.type.rank or step != 1:
        raise Decline("the slice is along another dim or has a step")
    sizes = [p.type.shape[axis] for p in whole.node.args]
    if not all(isinstance(d, int) for d in (*sizes, start, stop)) or start == stop:
        raise Decline("bounds are symbolic")
    touched = _overlaps(whole, axis, start, stop)
    return concatenated([sliced(p, axis, low, high) for p, low, high in touched], axis)


# slice_scatter(x, y, a, b) == cat(x[:a], y, x[b:])
def _scatter_as_cat(m: Match) -> Value:
    attrs, x = m[SCATTER].attrs, m[X]
    axis, start, stop = attrs["dim"] % x.type.rank, attrs["start"], attrs["stop"]
    size = x.type.shape[axis]
    if attrs.get("step", 1) != 1:
        raise Decline("a step leaves gaps")
    before = [] if start == 0 else [sliced(x, axis, 0, start)]
    after = [] if stop == size else [sliced(x, axis, stop, size)]
    parts = (*before, m[Y], *after)
    return m[Y] if len(parts) == 1 else shape.cat(*parts, dim=axis)


# cat(x[a:b], x[b:c]) == x[a:c]
def _simpler_cat(m: Match) -> Value:
    joined = concatenated(m[CAT].node.args, m[CAT].attrs["dim"])
    if joined.op is shape.cat and len(joined.node.args) == len(m[CAT].node.args):
        raise Decline("nothing to join")
    return joined


# ---- arithmetic that changes nothing


def _neutral(op: Any, number: float) -> Rule:
    one = Pat(literal, where=lambda v: is_literal(v, number))
    root = pat(op, X, one)
    return Rule(f"{op.name}-{number}", (root,), _same_type(root))


TWO_CASTS = pat(pointwise.cast, _over(pointwise.cast))
LOOKUP = pat(embedding, _over(pointwise.cast), X)


def _exact(inner: str, outer: str) -> bool:
    """Whether every value of dtype `inner` is a value of dtype `outer`."""
    if inner in _INTEGERS and outer in _INTEGERS:
        return _INTEGERS.index(outer) >= _INTEGERS.index(inner) and "u8" not in (inner, outer)
    pairs = {("f16", "f32"), ("bf16", "f32")}
    to_f64 = outer == "f64" and inner in FLOATS and DTYPES[inner].bits <= 64
    return inner == outer or (inner, outer) in pairs or to_f64


# cast(cast(x, wider), dtype) == cast(x, dtype)
def _cast_of_cast(m: Match) -> Value:
    outer, inner = m[TWO_CASTS], _arg(m[TWO_CASTS])
    x = _arg(inner)
    if not _exact(x.type.dtype, inner.type.dtype):
        raise Decline("the first cast rounds")
    return x if x.type == outer.type else pointwise.cast(x, dtype=outer.type.dtype)


# a lookup by i32 finds what a lookup by i64 finds
def _lookup_without_cast(m: Match) -> Value:
    ids = _arg(_arg(m[LOOKUP]))
    if ids.type.dtype not in ("i32", "i64"):
        raise Decline("ids of that dtype cannot be looked up")
    return embedding(ids, m[X])


RULES = (
    *map(_same, (shape.view, shape.expand, shape.slice_, pointwise.cast)),
    Rule("view-of-view", (VIEW,), _view_of_view),
    *map(_function_of_full, (shape.view, shape.expand, pointwise.cast, pointwise.logical_not)),
    Rule("where-of-full", (CHOOSE,), _chosen),
    Rule("topk-of-one", (ONE_OF_ONE, Other(ONE_OF_ONE, 1)), _only_one),
    *map(_reduction_of_one, (reduce.sum_, reduce.mean, reduce.amax)),
    Rule("outer-product", (OUTER,), _outer_product),
    Rule("scatter-everywhere", (SCATTER_VALUE,), _scattered_everywhere),
    Rule("permute-of-permute", (PERMUTE,), _permute_of_permute),
    Rule("trivial-permute", (ONE_PERMUTE,), _trivial_permute),
    Rule("permute-of-view", (TURNED_VIEW,), _view_permute),
    *(_hoist(op) for op in Op.registry.values() if op.axes and op is not shape.view),
    *map(_hoist, AXES),
    Rule("slice-of-slice", (NESTED_SLICE,), _slice_of_slice),
    Rule("slice-of-cat", (CUT,), _slice_of_cat),
    Rule("scatter-as-cat", (SCATTER,), _scatter_as_cat),
    Rule("simpler-cat", (CAT,), _simpler_cat),
    Rule("cast-of-cast", (TWO_CASTS,), _cast_of_cast),
    Rule("lookup-without-cast", (LOOKUP,), _lookup_without_cast),
    _neutral(pointwise.mul, 1),
    _neutral(pointwise.div, 1),
    _neutral(pointwise.add, 0),
    _neutral(pointwise.sub, 0),
    *EQUAL_SLICE_RULES,
    *MXFP4_RULES,
)


def common_subexpressions(graph: Graph, log: Log) -> Graph:
    """The graph with nodes of equal op, arguments and attributes merged."""
    applied: list[Applied] = []
    swap: dict[Value, Value] = {}
    seen: dict[Any, Node] = {}
    for node in graph.nodes():
        if node.op.name == "param":
            continue
        args = tuple(swap.get(a, a) for a in node.args)
        if node.op.commutative:
            args = tuple(sorted(args, key=lambda v: (id(v.node), v.index)))
        attrs = tuple((k, type(v), v) for k, v in sorted(node.attrs.items()))
        key = (node.op, args, node.given, attrs)
        first = seen.setdefault(key, node)
        if first is not node:
            swap.update(zip(node.results, first.results, strict=True))
            applied.append(Applied("common-subexpression", node.args, node.results, first.results))
    return log.apply(graph, applied)


def settled(graph: Graph, rules: Sequence[Rule], log: Log) -> Graph:
    """`rules` and the merging of equal nodes, until neither finds anything."""
    while True:
        before = graph
        graph = common_subexpressions(rewrite_all(graph, rules, log), log)
        if graph is before:
            return graph


def simplified(graph: Graph, log: Log) -> Graph:
    """`graph` settled by RULES, whose declines are not kept: a view that changes something is no
    near miss.
    """
    earlier = len(log.declined)
    graph = settled(graph, RULES, log)
    del log.declined[earlier:]
    return graph


@dataclass(frozen=True)
class Canonicalize:
    """Dead code, repetitions, unit dims, views that change nothing."""

    name: ClassVar[str] = "canonicalize"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        nodes = count_nodes(graph)
        without = context.log.apply(graph, list(unit_dims_dropped(graph)))
        dropped = simplified(without, context.log)
        if again := list(unit_dims_dropped(dropped)):  # of slices of copies
            dropped = simplified(context.log.apply(dropped, again), context.log)
        return dropped if count_nodes(dropped) <= nodes else simplified(graph, context.log)


@dataclass(frozen=True)
class MergeEqual:
    """Nodes that compute the same become one: the weights, too, that fusions made several times of
    a layer that is computed several times."""

    name: ClassVar[str] = "merge-equal"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        return common_subexpressions(graph, context.log)
