"""Dropping unit dims: every value loses its dims of size 1, but where broadcasting needs them.

A model that was traced at batch 1 becomes a graph over T tokens. Parameters and outputs keep their
types, with views at the border. Used by canonicalize.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.ir import Graph, Node, Value
from ...compiler.ops import linear, norm, pointwise, reduce, shape
from ...compiler.ops.aten import overload_of
from ...compiler.types import Shape


def _dense(dims: Shape) -> Shape:
    return tuple(d for d in dims if d != 1)


def _axis(dims: Shape, axis: int) -> int:
    """Where `axis` of `dims` is after the unit dims before it are dropped."""
    return len(_dense(dims[: axis % len(dims)]))


class _Dropper:
    """Maps each value of the old graph to one without unit dims."""

    def __init__(self) -> None:
        self.env: dict[Value, Value] = {}
        self.source = ""

    def emit(self, op: Any, *args: Value, **attrs: Any) -> Value:
        return op.node(args, attrs, self.source).results[0]

    def shaped(self, value: Value, target: Shape) -> Value:
        """The new form of an old value, viewed as `target`."""
        new = self.env[value]
        return new if new.type.shape == target else self.emit(shape.view, new, shape=target)

    def dense(self, value: Value) -> Value:
        """A new value without its unit dims."""
        target = _dense(value.type.shape)
        return value if value.type.shape == target else self.emit(shape.view, value, shape=target)

    def operand(self, value: Value, result: Shape) -> Value:
        """An operand that broadcasts against the new form of a result of shape `result`."""
        if value.op.name == "literal":
            return value
        padded = (1,) * (len(result) - value.type.rank) + value.type.shape
        target = tuple(p for p, r in zip(padded, result, strict=True) if r != 1)
        while target and target[0] == 1:
            target = target[1:]
        return self.shaped(value, target)

    def node(self, node: Node) -> tuple[Value, ...]:
        self.source = node.source
        if node.op.name in ("param", "constant", "literal"):
            return tuple(self.dense(v) for v in node.results)
        rule = _RULES.get(node.op.name) or (
            _pointwise if _is_pointwise_aten(node.op.name) else None
        )
        results = rule(self, node, **node.attrs) if rule else None
        if results is None:
            args = tuple(self.shaped(a, a.type.shape) for a in node.args)
            results = node.op.node(args, node.attrs, node.source).results
        return tuple(self.dense(r) for r in (results if isinstance(results, tuple) else (results,)))


def drop_unit_dims(graph: Graph) -> Graph:
    """The graph with every unit dim dropped between its parameters and its outputs."""
    dropper = _Dropper()
    for node in graph.nodes():
        dropper.env.update(zip(node.results, dropper.node(node), strict=True))

    def restored(value: Value) -> Value:
        return value if value.op.name == "param" else dropper.shaped(value, value.type.shape)

    return Graph(
        graph.name,
        graph.params,
        tuple(map(restored, graph.outputs)),
        graph.symbols,
        {name: restored(v) for name, v in graph.updates.items()},
    )


# Each rule gives the new results of a node, None to keep the node between views.
Rule = Callable[..., Value | tuple[Value, ...] | None]


def _is_pointwise_aten(name: str) -> bool:
    """Whether `name` is an aten operator that torch itself says to be element-wise."""
    return name.startswith("aten.") and torch.Tag.pointwise in overload_of(name).tags


def _pointwise(d: _Dropper, node: Node, **attrs: Any) -> Value:
    result = node.types[0].shape
    return d.emit(node.op, *(d.operand(a, result) for a in node.args), **attrs)


def _view(d: _Dropper, node: Node, *, shape: Shape) -> Value:
    return d.shaped(node.args[0], _dense(shape))


def _permute(d: _Dropper, node: Node, *, dims: tuple[int, ...]) -> Value:
    (x,) = node.args
    kept = [i for i in dims if x.type.shape[i] != 1]
    order = tuple(sorted(kept).index(i) for i in kept)
    new = d.env[x]
    return new if order == tuple(range(len(order))) else d.emit(shape.permute, new, dims=order)


def _expand(d: _Dropper, node: Node, *, shape: Shape) -> Value:
    return d.emit(node.op, d.operand(node.args[0], shape), shape=_dense(shape))


def _slice(d: _Dropper, node: Node, *, dim: int, **attrs: Any) -> Value | None:
    (x,) = node.args
    if x.type.shape[dim] == 1:
        return None
    return d.emit(node.op, d.env[x], dim=_axis(x.type.shape, dim), **attrs)


def _keeping(dims: Shape, axis: int) -> Shape:
    return tuple(s for i, s in enumerate(dims) if s != 1 or i == axis % len(dims))


def _slice_scatter(d: _Dropper, node: Node, *, dim: int, **attrs: Any) -> Value | None:
    x, source = node.args
    if x.type.shape[dim] == 1:
        return None
    source = d.shaped(source, _keeping(source.type.shape, dim))
    return d.emit(node.op, d.env[x], source, dim=_axis(x.type.shape, dim), **attrs)


def _cat(d: _Dropper, node: Node, *, dim: int) -> Value:
    parts = [d.shaped(a, _keeping(a.type.shape, dim)) for a in node.args]
    return d.emit(node.op, *parts, dim=_axis(node.types[0].shape, dim))


def _reduction(d: _Dropper, node: Node, *, dim: int, keepdim: bool) -> Value | None:
    (x,) = node.args
    if x.type.shape[dim] == 1:
        return d.env[x]  # a sum, mean or maximum of one
    return d.emit(node.op, d.env[x], dim=_axis(x.type.shape, dim), keepdim=False)


def _along(d: _Dropper, node: Node, *, dim: int, **attrs: Any) -> tuple[Value, ...] | None:
    (x,) = node.args
    if x.type.shape[dim] == 1:
        return None
    axis = _axis(x.type.shape, dim)
    return node.op.node((d.env[x],), {**attrs, "dim": axis}, node.source).results


def _gather(d: _Dropper, node: Node, *, dim: int) -> Value | None:
    x, index = node.args
    if x.type.shape[dim] == 1:
        return None
    index = d.shaped(index, _keeping(index.type.shape, dim))
    return d.emit(node.op, d.env[x], index, dim=_axis(x.type.shape, dim))


def _rows(d: _Dropper, node: Node, **attrs: Any) -> Value:
    """Ops on the last dim of their first argument: the dims before it are rows."""
    x, *rest = node.args
    rows = d.shaped(x, (*_dense(x.type.shape[:-1]), x.type.shape[-1]))
    if rows.type.rank < 1:
        rows = d.shaped(x, x.type.shape[-1:])
    return d.emit(node.op, rows, *(d.shaped(a, a.type.shape) for a in rest), **attrs)


def _embedding(d: _Dropper, node: Node) -> Value:
    ids, table = node.args
    return d.emit(node.op, d.env[ids], d.shaped(table, table.type.shape))


def _matmul(d: _Dropper, node: Node) -> Value | None:
    x, y = node.args
    if x.type.shape[-1] == 1:  # x [.., M, 1] @ y [.., 1, N] == x * y
        return _pointwise_as(d, pointwise.mul, node)
    if _dense(x.type.shape[:-2]) or _dense(y.type.shape[:-2]):
        return None
    return d.emit(node.op, *(d.shaped(a, a.type.shape[-2:]) for a in (x, y)))


def _pointwise_as(d: _Dropper, op: Any, node: Node) -> Value:
    result = node.types[0].shape
    return d.emit(op, *(d.operand(a, result) for a in node.args))


def _as_complex(d: _Dropper, node: Node) -> Value:
    (x,) = node.args
    return d.emit(node.op, d.shaped(x, (*_dense(x.type.shape[:-1]), 2)))


def _as_real(d: _Dropper, node: Node) -> Value:
    return d.emit(node.op, d.env[node.args[0]])


_RULES: dict[str, Rule] = {
    "aten.polar.default": _pointwise,
    "aten.view_as_complex.default": _as_complex,
    "aten.view_as_real.default": _as_real,
    **{op.name: _pointwise for op in pointwise.POINTWISE},
    shape.view.name: _view,
    shape.permute.name: _permute,
    shape.expand.name: _expand,
    shape.slice_.name: _slice,
    shape.slice_scatter.name: _slice_scatter,
    shape.cat.name: _cat,
    shape.gather.name: _gather,
    reduce.mean.name: _reduction,
    reduce.sum_.name: _reduction,
    reduce.amax.name: _reduction,
    reduce.softmax.name: _along,
    reduce.topk.name: _along,
    linear.linear.name: _rows,
    linear.embedding.name: _embedding,
    linear.matmul.name: _matmul,
    norm.rms_norm.name: _rows,
    norm.layer_norm.name: _rows,
}
