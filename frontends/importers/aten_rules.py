"""What each torch operator is in the IR: one rule an operator, by its full name.

A rule gets the importer, which knows the operator at hand, and the operator's arguments with
tensors already imported. It gives a value, a tuple of values, or NotImplemented to leave the
operator to an `aten.*` node.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ...compiler.dtypes import FLOATS
from ...compiler.ir import Op, Value
from ...compiler.ops import attention, linear, moe, norm, pointwise, shape
from ...compiler.ops import reduce as reduction
from ...compiler.ops.leaf import literal
from ...compiler.torch_types import dtype_name, torch_dtype
from ...compiler.types import Dim, TensorType, dim


class Im(Protocol):
    """The importer, as rules see it: `node` is the fx node at hand, `result` its traced type."""

    node: Any

    @property
    def result(self) -> TensorType: ...

    def emit(self, op: Op, *args: Value, **attrs: Any) -> Value:
        """One node, which remembers where the model says it."""
        ...

    def to_shape(self, x: Value, target: tuple[Dim, ...]) -> Value:
        """`x` viewed as `target`."""
        ...

    def to_dtype(self, x: Any, dtype: str) -> Value:
        """A tensor cast, or a number as a literal, of `dtype`."""
        ...

    def tensor_type(self, tensor: torch.Tensor) -> TensorType:
        """The type of a traced tensor."""
        ...

    def source(self) -> str:
        """The module path and source line of the operator at hand."""
        ...

    def fallback(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """An `aten.*` node for an operator without a rule."""
        ...


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


# ---- nothing happens


@_rule(
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten.sym_constrain_range_for_size.default",
    "aten.sym_constrain_range.default",
)
def _nothing(im: Im, *args: Any, **kwargs: Any) -> None:
    return None


@_rule(
    "aten.alias.default",
    "aten.clone.default",
    "aten.contiguous.default",
    "aten.detach.default",
    "aten.lift_fresh_copy.default",
    "aten.dropout.default",
)
def _identity(im: Im, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


# ---- views


@_rule(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.unsqueeze.default",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
)
def _view(im: Im, x: Value, *args: Any) -> Value:
    return im.to_shape(x, im.result.shape)


@_rule("aten.permute.default")
def _permute(im: Im, x: Value, dims: list[int]) -> Value:
    return im.emit(shape.permute, x, dims=tuple(d % x.type.rank for d in dims))


@_rule("aten.transpose.int")
def _transpose(im: Im, x: Value, a: int, b: int) -> Value:
    dims = list(range(x.type.rank))
    dims[a], dims[b] = dims[b], dims[a]
    return im.emit(shape.permute, x, dims=tuple(dims))


@_rule("aten.t.default")
def _t(im: Im, x: Value) -> Value:
    return im.emit(shape.permute, x, dims=tuple(reversed(range(x.type.rank))))


@_rule("aten.expand.default")
def _expand(im: Im, x: Value, *args: Any, **kwargs: Any) -> Value:
    target = im.result.shape
    return x if x.type.shape == target else im.emit(shape.expand, x, shape=target)


@_rule("aten.repeat_interleave.self_int")
def _repeat_interleave(im: Im, x: Value, times: int, axis: int | None = None, **kw: Any) -> Any:
    if axis is None:
        return NotImplemented
    axis %= x.type.rank
    before, after = x.type.shape[: axis + 1], x.type.shape[axis + 1 :]
    column = im.emit(shape.view, x, shape=(*before, 1, *after))
    wide = im.emit(shape.expand, column, shape=(*before, times, *after))
    return im.to_shape(wide, im.result.shape)


def _sliced(im: Im, x: Value, axis: int, start: Dim, stop: Dim, step: int = 1) -> Value:
    axis %= x.type.rank
    if start == 0 and stop == x.type.shape[axis] and step == 1:
        return x
    extra = {"step": step} if step != 1 else {}
    return im.emit(shape.slice_, x, dim=axis, start=start, stop=stop, **extra)


def _bound(value: Any, size: Dim, default: Dim) -> Dim:
    """A slice bound as Python counts it, from the left and within the dim."""
    if value is None:
        return default
    if isinstance(value, int) and isinstance(size, int):
        return max(0, min(size, value + size if value < 0 else value))
    if isinstance(value, int) and value < 0:
        return dim(size + value)
    return size if isinstance(value, int) and value >= 2**62 else value


@_rule("aten.slice.Tensor")
def _slice(
    im: Im, x: Value, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Value:
    size = x.type.shape[axis]
    return _sliced(im, x, axis, _bound(start, size, 0), _bound(stop, size, size), step)


@_rule("aten.narrow.default")
def _narrow(im: Im, x: Value, axis: int, start: Dim, length: Dim) -> Value:
    return _sliced(im, x, axis, start, dim(start + length))


@_rule("aten.select.int")
def _select(im: Im, x: Value, axis: int, index: Any) -> Value:
    size = x.type.shape[axis]
    start = dim(size + index) if isinstance(index, int) and index < 0 else index
    return im.to_shape(_sliced(im, x, axis, start, dim(start + 1)), im.result.shape)


@_rule("aten.split_with_sizes.default")
def _split_with_sizes(im: Im, x: Value, sizes: list[Dim], axis: int = 0) -> tuple[Value, ...]:
    parts: list[Value] = []
    start: Any = 0
    for size in sizes:
        parts.append(_sliced(im, x, axis, start, dim(start + size)))
        start = dim(start + size)
    return tuple(parts)


@_rule("aten.split.Tensor", "aten.chunk.default")
def _split(im: Im, x: Value, size_or_chunks: Any, axis: int = 0) -> tuple[Value, ...]:
    sizes = [im.tensor_type(t).shape[axis] for t in im.node.meta["val"]]
    return _split_with_sizes(im, x, sizes, axis)


@_rule("aten.unbind.int")
def _unbind(im: Im, x: Value, axis: int = 0) -> tuple[Value, ...]:
    kept = tuple(d for i, d in enumerate(x.type.shape) if i != axis % x.type.rank)
    count: Any = x.type.shape[axis]
    return tuple(im.to_shape(_sliced(im, x, axis, i, i + 1), kept) for i in range(count))


@_rule("aten.cat.default")
def _cat(im: Im, parts: list[Value], axis: int = 0) -> Value:
    dtype = im.result.dtype
    same = [im.to_dtype(p, dtype) for p in parts]
    return same[0] if len(same) == 1 else im.emit(shape.cat, *same, dim=axis % same[0].type.rank)


@_rule("aten.stack.default")
def _stack(im: Im, parts: list[Value], axis: int = 0) -> Value:
    rank = parts[0].type.rank
    axis %= rank + 1
    dims = parts[0].type.shape
    columns = [im.emit(shape.view, p, shape=(*dims[:axis], 1, *dims[axis:])) for p in parts]
    return im.emit(shape.cat, *columns, dim=axis)


@_rule("aten.slice_scatter.default")
def _slice_scatter(
    im: Im,
    x: Value,
    source: Value,
    axis: int = 0,
    start: Any = None,
    stop: Any = None,
    step: int = 1,
) -> Value:
    size = x.type.shape[axis]
    first, last = _bound(start, size, 0), _bound(stop, size, size)
    extra = {"step": step} if step != 1 else {}
    axis %= x.type.rank
    return im.emit(shape.slice_scatter, x, source, dim=axis, start=first, stop=last, **extra)


@_rule("aten.copy.default")
def _copy(im: Im, x: Value, source: Value, *args: Any) -> Value:
    return _expand(im, im.to_dtype(source, x.type.dtype))


@_rule("aten.index_select.default")
def _index_select(im: Im, x: Value, axis: int, rows: Value) -> Any:
    return NotImplemented if axis % x.type.rank else im.emit(shape.take, x, rows)


@_rule("aten.gather.default")
def _gather(im: Im, x: Value, axis: int, index: Value, **kwargs: Any) -> Value:
    return im.emit(shape.gather, x, index, dim=axis % x.type.rank)


# ---- out of nothing


@_rule(
    "aten.zeros.default",
    "aten.zeros_like.default",
    "aten.new_zeros.default",
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.new_empty.default",
)
def _zeros(im: Im, *args: Any, **kwargs: Any) -> Value:
    """Zeros. What was never written may hold anything, so empty may be zeros as well."""
    return im.emit(shape.full, value=0, shape=im.result.shape, dtype=im.result.dtype)


@_rule("aten.ones.default", "aten.ones_like.default", "aten.new_ones.default")
def _ones(im: Im, *args: Any, **kwargs: Any) -> Value:
    return im.emit(shape.full, value=1, shape=im.result.shape, dtype=im.result.dtype)


@_rule("aten.full.default", "aten.full_like.default", "aten.new_full.default")
def _full(im: Im, *args: Any, **kwargs: Any) -> Value:
    value = kwargs.get("fill_value", args[-1])
    return im.emit(shape.full, value=value, shape=im.result.shape, dtype=im.result.dtype)


@_rule("aten.scalar_tensor.default")
def _scalar_tensor(im: Im, value: Any, **kwargs: Any) -> Value:
    return im.emit(shape.full, value=value, shape=(), dtype=im.result.dtype)


@_rule("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(im: Im, *args: Any, **kwargs: Any) -> Any:
    start, stop, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
    if not isinstance(step, int) or isinstance(start, float) or isinstance(stop, float):
        return NotImplemented
    return im.emit(shape.arange, start=start, stop=stop, step=step, dtype=im.result.dtype)


# ---- element-wise


def _unary(op: Op) -> Rule:
    def rule(im: Im, x: Value) -> Any:
        if im.result.dtype not in FLOATS:
            return NotImplemented
        return im.emit(op, im.to_dtype(x, im.result.dtype))

    return rule


for _op in (*pointwise.UNARY,):
    RULES[f"aten.{_op.name}.default"] = _unary(_op)


@_rule("aten.gelu.default")
def _gelu(im: Im, x: Value, *, approximate: str = "none") -> Value:
    return im.emit(pointwise.gelu, x, approximate=approximate)


def _binary(op: Op) -> Rule:
    def rule(im: Im, x: Any, y: Any, *, alpha: Any = 1) -> Value:
        y = y if alpha == 1 else _times(im, y, alpha)
        return im.emit(op, *_operands(im, op, x, y))

    return rule


def _operands(im: Im, op: Op, x: Any, y: Any) -> tuple[Value, Value]:
    """Both operands in the dtype in which torch computes: the result's, or for comparisons the
    one that both promote to.
    """
    dtype = im.result.dtype
    if op.name in _COMPARISONS:
        sides = [
            torch.empty((1,) * v.type.rank, dtype=torch_dtype(v.type.dtype), device="meta")
            if isinstance(v, Value)
            else v
            for v in (x, y)
        ]
        dtype = dtype_name(torch.result_type(*sides))
    return im.to_dtype(x, dtype), im.to_dtype(y, dtype)


def _times(im: Im, x: Any, factor: Any) -> Any:
    if not isinstance(x, Value):
        return x * factor
    return im.emit(pointwise.mul, x, literal(value=factor, dtype=x.type.dtype))


_BINARY = {
    "add": pointwise.add,
    "sub": pointwise.sub,
    "mul": pointwise.mul,
    "div": pointwise.div,
    "maximum": pointwise.maximum,
    "minimum": pointwise.minimum,
    "lt": pointwise.lt,
    "le": pointwise.le,
    "gt": pointwise.gt,
    "ge": pointwise.ge,
    "eq": pointwise.eq,
    "ne": pointwise.ne,
}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
for _name, _op in _BINARY.items():
    for _kind in ("Tensor", "Scalar", "default"):
        RULES[f"aten.{_name}.{_kind}"] = _binary(_op)


@_rule("aten.rsub.Scalar", "aten.rsub.Tensor")
def _rsub(im: Im, x: Value, y: Any, alpha: Any = 1) -> Value:
    x = x if alpha == 1 else _times(im, x, alpha)
    return im.emit(pointwise.sub, *_operands(im, pointwise.sub, y, x))


@_rule("aten.reciprocal.default")
def _reciprocal(im: Im, x: Value) -> Value:
    return im.emit(pointwise.div, *_operands(im, pointwise.div, 1.0, x))


@_rule("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def _pow(im: Im, x: Any, y: Any) -> Value:
    left, right = _operands(im, pointwise.pow_, x, y)
    if y == 2:
        return im.emit(pointwise.mul, left, left)
    return im.emit(pointwise.pow_, left, right)


@_rule("aten.square.default")
def _square(im: Im, x: Value) -> Value:
    return im.emit(pointwise.mul, x, x)


@_rule("aten._to_copy.default", "aten.to.dtype", "aten.type_as.default")
def _cast(im: Im, x: Value, *args: Any, **kwargs: Any) -> Value:
    return im.to_dtype(x, im.result.dtype)


@_rule("aten.logical_and.default", "aten.bitwise_and.Tensor", "aten.__and__.Tensor")
def _and(im: Im, x: Value, y: Value) -> Any:
    return im.emit(pointwise.logical_and, x, y) if im.result.dtype == "bool" else NotImplemented


@_rule("aten.logical_or.default", "aten.bitwise_or.Tensor", "aten.__or__.Tensor")
def _or(im: Im, x: Value, y: Value) -> Any:
    return im.emit(pointwise.logical_or, x, y) if im.result.dtype == "bool" else NotImplemented


@_rule("aten.logical_not.default", "aten.bitwise_not.default")
def _not(im: Im, x: Value) -> Any:
    return im.emit(pointwise.logical_not, x) if x.type.dtype == "bool" else NotImplemented


@_rule("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther")
def _where(im: Im, condition: Value, x: Any, y: Any) -> Value:
    dtype = im.result.dtype
    return im.emit(pointwise.where, condition, im.to_dtype(x, dtype), im.to_dtype(y, dtype))


@_rule("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(im: Im, x: Value, mask: Value, value: Any) -> Value:
    return im.emit(pointwise.where, mask, im.to_dtype(value, x.type.dtype), x)


@_rule("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")
def _clamp(im: Im, x: Value, *bounds: Any, min: Any = None, max: Any = None) -> Any:
    which = str(im.node.target).split(".")[1]
    low = bounds[0] if bounds and which != "clamp_max" else min
    high = bounds[-1] if which == "clamp_max" else bounds[1] if len(bounds) > 1 else max
    if x.type.dtype not in ("f16", "bf16", "f32", "f64"):
        return NotImplemented
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return im.emit(pointwise.clamp, x, min=float(low), max=float(high))


# ---- along one dim


def _along_one(op: Op) -> Rule:
    def rule(im: Im, x: Value, dims: Any, keepdim: bool = False, *, dtype: Any = None) -> Any:
        dims = dims if isinstance(dims, list) else [dims]
        if len(dims) != 1 or im.result.dtype not in ("f16", "bf16", "f32", "f64"):
            return NotImplemented
        x = im.to_dtype(x, im.result.dtype)
        return im.emit(op, x, dim=dims[0] % x.type.rank, keepdim=keepdim)

    return rule


RULES["aten.mean.dim"] = _along_one(reduction.mean)
RULES["aten.sum.dim_IntList"] = _along_one(reduction.sum_)
RULES["aten.amax.default"] = _along_one(reduction.amax)


@_rule("aten.max.dim")
def _max(im: Im, x: Value, axis: int, keepdim: bool = False) -> tuple[Value, ...]:
    values = im.emit(reduction.amax, x, dim=axis % x.type.rank, keepdim=keepdim)
    return (values, im.fallback("aten.max.dim", [x, axis, keepdim], {})[1])


@_rule("aten.softmax.int", "aten._softmax.default")
def _softmax(im: Im, x: Value, axis: int, *args: Any, **kwargs: Any) -> Value:
    return im.emit(reduction.softmax, im.to_dtype(x, im.result.dtype), dim=axis % x.type.rank)


@_rule("aten.topk.default")
def _topk(
    im: Im, x: Value, k: int, axis: int = -1, largest: bool = True, sorted: bool = True
) -> Any:
    if not largest:
        return NotImplemented
    return reduction.topk.node((x,), {"k": k, "dim": axis % x.type.rank}, im.source()).results


# ---- products and norms


@_rule("aten.linear.default")
def _linear(im: Im, x: Value, weight: Value, bias: Value | None = None) -> Value:
    return im.emit(linear.linear, x, weight, *(() if bias is None else (bias,)))


@_rule("aten.matmul.default", "aten.mm.default", "aten.bmm.default")
def _matmul(im: Im, x: Value, y: Value) -> Any:
    if min(x.type.rank, y.type.rank) < 2:
        return NotImplemented
    return im.emit(linear.matmul, x, y)


@_rule("aten.addmm.default")
def _addmm(im: Im, bias: Value, x: Value, y: Value, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """bias + x · y == linear(x, yᵀ, bias)"""
    if (beta, alpha) != (1, 1) or bias.type.shape != y.type.shape[1:]:
        return NotImplemented
    return im.emit(linear.linear, x, im.emit(shape.permute, y, dims=(1, 0)), bias)


@_rule("aten.embedding.default")
def _embedding(im: Im, table: Value, ids: Value, *args: Any) -> Value:
    return im.emit(linear.embedding, ids, table)


@_rule("aten.layer_norm.default")
def _layer_norm(
    im: Im,
    x: Value,
    shape_: list[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Any:
    if len(shape_) != 1 or (weight is None and bias is not None):
        return NotImplemented
    affine = [v for v in (weight, bias) if v is not None]
    return im.emit(norm.layer_norm, x, *affine, eps=eps)


@_rule("aten._native_batch_norm_legit_no_training.default")
def _batch_norm(
    im: Im,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    momentum: float,
    eps: float,
) -> tuple[Value]:
    """With the running statistics: (x - mean) · rsqrt(var + eps) · weight + bias, by channel. The
    statistics of the batch, which are further results, are not computed.
    """
    columns = (x.type.shape[1], *(1,) * (x.type.rank - 2))

    def channels(vector: Value) -> Value:
        return im.to_shape(im.to_dtype(vector, x.type.dtype), columns)

    small = literal(value=eps, dtype=running_var.type.dtype)
    inverse = im.emit(pointwise.rsqrt, im.emit(pointwise.add, running_var, small))
    y = im.emit(pointwise.sub, x, channels(running_mean))
    y = im.emit(pointwise.mul, y, channels(inverse))
    y = y if weight is None else im.emit(pointwise.mul, y, channels(weight))
    return (y if bias is None else im.emit(pointwise.add, y, channels(bias)),)


@_rule("aten.rms_norm.default")
def _rms_norm(
    im: Im, x: Value, shape_: list[int], weight: Value | None = None, eps: float | None = None
) -> Any:
    if len(shape_) != 1:
        return NotImplemented
    eps = torch.finfo(torch_dtype(x.type.dtype)).eps if eps is None else eps
    return im.emit(norm.rms_norm, x, *(() if weight is None else (weight,)), eps=eps)


# ---- attention and experts, token-major: the batch of one is dropped


@_rule("ingot.attention.default")
def _attention(
    im: Im,
    q: Value,
    k: Value,
    v: Value,
    sinks: Value | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Value:
    rows: list[Value] = []
    for x in (q, k, v):
        _, heads, tokens, size = x.type.shape
        turned = im.emit(shape.permute, x, dims=(0, 2, 1, 3))
        rows.append(im.to_shape(turned, (tokens, heads, size)))
    attrs: dict[str, Any] = {"scale": scale}
    attrs.update({"causal": False} if not causal else {})
    attrs.update({"window": window} if window else {})
    attrs.update({"softcap": softcap} if softcap else {})
    out = im.emit(attention.attention, *rows, *(() if sinks is None else (sinks,)), **attrs)
    return im.to_shape(out, im.result.shape)


def _split_interleaved(im: Im, x: Value) -> Value:
    """[E, gate0, up0, gate1, up1, ...] as [E, gates, ups]."""
    size = x.type.shape[1]
    halves = [_sliced(im, x, 1, start, size, 2) for start in (0, 1)]
    return im.emit(shape.cat, *halves, dim=1)


@_rule("ingot.experts.default")
def _experts(
    im: Im,
    x: Value,
    weights: Value,
    indices: Value,
    gate_up: Value,
    down: Value,
    gate_up_bias: Value | None,
    down_bias: Value | None,
    activation: str,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Value:
    if transposed:
        gate_up = im.emit(shape.permute, gate_up, dims=(0, 2, 1))
        down = im.emit(shape.permute, down, dims=(0, 2, 1))
    biases = [b for b in (gate_up_bias, down_bias) if b is not None]
    if interleaved and gated:
        gate_up = _split_interleaved(im, gate_up)
        biases = [_split_interleaved(im, biases[0]), biases[1]] if biases else []
    attrs: dict[str, Any] = {"activation": activation}
    attrs.update({} if gated else {"gated": False})
    attrs.update({"alpha": alpha, "limit": limit} if alpha else {})
    return im.emit(moe.experts, x, weights, indices, gate_up, down, *biases, **attrs)
