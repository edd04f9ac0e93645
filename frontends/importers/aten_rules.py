"""Translation of ATen operators to the IR: one rule per operator, by its full name.

A rule gets the importer, at the current fx node, and the operator's arguments with tensors already
imported. It returns a value, a tuple of values, or NotImplemented for an `aten.*` node.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...compiler.dtypes import FLOATS
from ...compiler.ir import Op, Value
from ...compiler.ops import attention, hadamard, linear, moe, norm, pointwise, shape
from ...compiler.ops import reduce as reduction
from ...compiler.ops.leaf import literal
from ...compiler.torch_types import dtype_name, torch_dtype
from ...compiler.types import Dim, dim
from . import indexing

if TYPE_CHECKING:
    from .torch_export import Importer as Im


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def _rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule under space-separated names, without `aten.` and `.default`."""

    def register(rule: Rule) -> Rule:
        for name in names.split():
            full = name if "." in name else f"{name}.default"
            RULES[full if full.startswith("ingot.") else f"aten.{full}"] = rule
        return rule

    return register


# ---- nothing happens


@_rule("_assert_tensor_metadata _assert_scalar sym_constrain_range_for_size sym_constrain_range")
def _nothing(im: Im, *args: Any, **kwargs: Any) -> None:
    return None


@_rule("alias clone contiguous detach lift_fresh_copy dropout")
def _identity(im: Im, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


# ---- views


@_rule(
    "view reshape _unsafe_view unsqueeze squeeze squeeze.dim squeeze.dims flatten.using_ints "
    "unflatten.int"
)
def _view(im: Im, x: Value, *args: Any) -> Value:
    return im.to_shape(x, im.result.shape)


@_rule("permute transpose.int t")
def _permute(im: Im, x: Value, *how: Any) -> Value:
    dims = list(range(x.type.rank))
    if not how:
        dims.reverse()
    elif len(how) == 1:
        dims = [d % x.type.rank for d in how[0]]
    else:
        dims[how[0]], dims[how[1]] = dims[how[1]], dims[how[0]]
    return im.emit(shape.permute, x, dims=tuple(dims))


@_rule("expand")
def _expand(im: Im, x: Value, *args: Any, **kwargs: Any) -> Value:
    target = im.result.shape
    return x if x.type.shape == target else im.emit(shape.expand, x, shape=target)


@_rule("repeat_interleave.self_int")
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
    return im.emit(shape.slice_, x, dim=axis, start=start, stop=stop, **_step(step))


def _step(step: int) -> dict[str, int]:
    return {"step": step} if step != 1 else {}


def _bound(value: Any, size: Dim, default: Dim) -> Dim:
    """A slice bound normalized to 0 ≤ bound ≤ size, as Python does."""
    if value is None:
        return default
    if isinstance(value, int) and isinstance(size, int):
        return max(0, min(size, value + size if value < 0 else value))
    if isinstance(value, int) and value < 0:
        return dim(size + value)
    return size if isinstance(value, int) and value >= 2**62 else value


def _range(x: Value, axis: int, start: Any = None, stop: Any = None) -> tuple[Dim, Dim]:
    size = x.type.shape[axis]
    return _bound(start, size, 0), _bound(stop, size, size)


@_rule("slice.Tensor")
def _slice(im: Im, x: Value, axis: int = 0, *ends: Any) -> Value:
    return _sliced(im, x, axis, *_range(x, axis, *ends[:2]), *ends[2:])


@_rule("slice_scatter")
def _slice_scatter(im: Im, x: Value, source: Value, axis: int = 0, *ends: Any) -> Value:
    start, stop = _range(x, axis, *ends[:2])
    extra = _step(*ends[2:]) if ends[2:] else {}
    axis %= x.type.rank
    return im.emit(shape.slice_scatter, x, source, dim=axis, start=start, stop=stop, **extra)


@_rule("select_scatter")
def _select_scatter(im: Im, x: Value, source: Value, axis: int, index: int) -> Value:
    axis %= x.type.rank
    size: Any = x.type.shape[axis]
    start = index % size
    row = im.to_shape(source, shape.replaced(x.type.shape, axis, 1))
    return im.emit(shape.slice_scatter, x, row, dim=axis, start=start, stop=start + 1)


@_rule("narrow")
def _narrow(im: Im, x: Value, axis: int, start: Dim, length: Dim) -> Value:
    return _sliced(im, x, axis, start, dim(start + length))


@_rule("select.int")
def _select(im: Im, x: Value, axis: int, index: Any) -> Value:
    size = x.type.shape[axis]
    start = dim(size + index) if isinstance(index, int) and index < 0 else index
    return im.to_shape(_sliced(im, x, axis, start, dim(start + 1)), im.result.shape)


@_rule("split_with_sizes")
def _split_with_sizes(im: Im, x: Value, sizes: list[Dim], axis: int = 0) -> tuple[Value, ...]:
    parts: list[Value] = []
    start: Any = 0
    for size in sizes:
        parts.append(_sliced(im, x, axis, start, dim(start + size)))
        start = dim(start + size)
    return tuple(parts)


@_rule("split.Tensor chunk")
def _split(im: Im, x: Value, size_or_chunks: Any, axis: int = 0) -> tuple[Value, ...]:
    sizes = [im.tensor_type(t).shape[axis] for t in im.node.meta["val"]]
    return _split_with_sizes(im, x, sizes, axis)


@_rule("unbind.int")
def _unbind(im: Im, x: Value, axis: int = 0) -> tuple[Value, ...]:
    kept = tuple(d for i, d in enumerate(x.type.shape) if i != axis % x.type.rank)
    count: Any = x.type.shape[axis]
    return tuple(im.to_shape(_sliced(im, x, axis, i, i + 1), kept) for i in range(count))


@_rule("cat concat concatenate")
def _cat(im: Im, parts: list[Value], axis: int = 0) -> Value:
    dtype = im.result.dtype
    same = [im.to_dtype(p, dtype) for p in parts]
    return same[0] if len(same) == 1 else im.emit(shape.cat, *same, dim=axis % same[0].type.rank)


@_rule("stack")
def _stack(im: Im, parts: list[Value], axis: int = 0) -> Value:
    rank = parts[0].type.rank
    axis %= rank + 1
    dims = parts[0].type.shape
    columns = [im.emit(shape.view, p, shape=(*dims[:axis], 1, *dims[axis:])) for p in parts]
    return im.emit(shape.cat, *columns, dim=axis)


@_rule("copy")
def _copy(im: Im, x: Value, source: Value, *args: Any) -> Value:
    return _expand(im, im.to_dtype(source, x.type.dtype))


@_rule("index_select")
def _index_select(im: Im, x: Value, axis: int, rows: Value) -> Any:
    return NotImplemented if axis % x.type.rank else im.emit(shape.take, x, rows)


@_rule("gather")
def _gather(im: Im, x: Value, axis: int, index: Value, **kwargs: Any) -> Value:
    axis = axis % x.type.rank
    if x.node.is_constant and x.type.shape[:axis] == (1,) * (x.type.rank - 1):
        # One row of a table by the index of each token: the tokens are the only dim that counts.
        table, rows = im.to_shape(x, x.type.shape[-1:]), im.to_shape(index, index.type.shape[-1:])
        taken = im.emit(shape.take, table, im.to_dtype(rows, "i32"))
        return im.to_shape(taken, index.type.shape)
    return im.emit(shape.gather, x, index, dim=axis)


_rule("scatter.value")(indexing.scatter)
_rule("index.Tensor")(indexing.index)


# ---- out of nothing


def _filled(names: str, value: Any) -> None:
    """Rule of operators that fill with `value`, or with their last argument for None."""

    def rule(im: Im, *args: Any, **kwargs: Any) -> Value:
        number = kwargs.get("fill_value", args[-1]) if value is None else value
        return im.emit(shape.full, value=number, shape=im.result.shape, dtype=im.result.dtype)

    _rule(names)(rule)


# What was never written may hold anything, so that it may be zeros as well.
_filled("zeros zeros_like new_zeros empty.memory_format empty_like new_empty", 0)
_filled("ones ones_like new_ones", 1)
_filled("full full_like new_full scalar_tensor", None)


@_rule("arange arange.start arange.start_step")
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


for _op in pointwise.UNARY:
    _rule(_op.name)(_unary(_op))


@_rule("softplus")
def _softplus(im: Im, x: Value, beta: Any = 1, threshold: Any = 20) -> Any:
    """log(1 + exp(beta · x)) / beta; from a `threshold` of 20 on that is x in f32."""
    dtype = im.result.dtype
    if threshold < 20 or dtype not in FLOATS:
        return NotImplemented
    if beta == 1:
        return im.emit(pointwise.softplus, x)
    wide = im.to_dtype(x, dtype if dtype == "f64" else "f32")
    y = im.emit(pointwise.softplus, _times(im, wide, beta))
    return im.to_dtype(_times(im, y, 1 / beta), dtype)


@_rule("gelu")
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


_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
for _name in ("add", "sub", "mul", "div", "maximum", "minimum", *_COMPARISONS):
    _rule(f"{_name}.Tensor {_name}.Scalar {_name}")(_binary(getattr(pointwise, _name)))
_rule("max.other")(_binary(pointwise.maximum))
_rule("min.other")(_binary(pointwise.minimum))


@_rule("rsub.Scalar rsub.Tensor")
def _rsub(im: Im, x: Value, y: Any, alpha: Any = 1) -> Value:
    x = x if alpha == 1 else _times(im, x, alpha)
    return im.emit(pointwise.sub, *_operands(im, pointwise.sub, y, x))


@_rule("reciprocal")
def _reciprocal(im: Im, x: Value) -> Value:
    return im.emit(pointwise.div, *_operands(im, pointwise.div, 1.0, x))


@_rule("pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar")
def _pow(im: Im, x: Any, y: Any) -> Value:
    left, right = _operands(im, pointwise.pow_, x, y)
    if y == 2:
        return im.emit(pointwise.mul, left, left)
    return im.emit(pointwise.pow_, left, right)


@_rule("square")
def _square(im: Im, x: Value) -> Value:
    return im.emit(pointwise.mul, x, x)


@_rule("_to_copy to.dtype type_as")
def _cast(im: Im, x: Value, *args: Any, **kwargs: Any) -> Value:
    return im.to_dtype(x, im.result.dtype)


def _logical(names: str, op: Op) -> None:
    def rule(im: Im, *args: Value) -> Any:
        if any(x.type.dtype != "bool" for x in args):
            return NotImplemented
        return im.emit(op, *args)

    _rule(names)(rule)


_logical("logical_and bitwise_and.Tensor __and__.Tensor", pointwise.logical_and)
_logical("logical_or bitwise_or.Tensor __or__.Tensor", pointwise.logical_or)
_logical("logical_not bitwise_not", pointwise.logical_not)


@_rule("where.self where.ScalarSelf where.ScalarOther")
def _where(im: Im, condition: Value, x: Any, y: Any) -> Value:
    dtype = im.result.dtype
    return im.emit(pointwise.where, condition, im.to_dtype(x, dtype), im.to_dtype(y, dtype))


@_rule("masked_fill.Scalar masked_fill.Tensor")
def _masked_fill(im: Im, x: Value, mask: Value, value: Any) -> Value:
    return im.emit(pointwise.where, mask, im.to_dtype(value, x.type.dtype), x)


@_rule("index_put")
def _index_put(im: Im, x: Value, indices: Any, value: Any, accumulate: bool = False) -> Value | Any:
    """x[mask] = number: a mask of x's shape, and one number for all that it has."""
    one = isinstance(value, Value) and value.type.rank == 0
    if accumulate or len(indices) != 1 or not isinstance(mask := indices[0], Value) or not one:
        return NotImplemented
    if mask.type.dtype != "bool" or mask.type.shape != x.type.shape:
        return NotImplemented
    return im.emit(pointwise.where, mask, im.to_dtype(value, x.type.dtype), x)


@_rule("clamp clamp_min clamp_max")
def _clamp(im: Im, x: Value, *bounds: Any, min: Any = None, max: Any = None) -> Any:
    which = str(im.node.target).split(".")[1]
    low = bounds[0] if bounds and which != "clamp_max" else min
    high = bounds[-1] if which == "clamp_max" else bounds[1] if len(bounds) > 1 else max
    if x.type.dtype not in FLOATS:
        return _clamp_by(im, x, low, high)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return im.emit(pointwise.clamp, x, min=float(low), max=float(high))


@_rule("clamp.Tensor clamp_min.Tensor clamp_max.Tensor")
def _clamp_by_tensors(
    im: Im, x: Value, *bounds: Any, min: Value | None = None, max: Value | None = None
) -> Value:
    if "clamp_max" in str(im.node.target):
        bounds = (None, *bounds)
    first, second, *_ = (*bounds, None, None)
    return _clamp_by(im, x, first or min, second or max)


def _clamp_by(im: Im, x: Value, low: Any, high: Any) -> Value:
    """min(max(x, low), high) in the result's dtype; None is no bound."""
    x = im.to_dtype(x, im.result.dtype)
    for op, bound in ((pointwise.maximum, low), (pointwise.minimum, high)):
        x = x if bound is None else im.emit(op, x, im.to_dtype(bound, im.result.dtype))
    return x


# ---- along one dim


def _along_one(op: Op) -> Rule:
    def rule(im: Im, x: Value, dims: Any, keepdim: bool = False, *, dtype: Any = None) -> Any:
        dims = dims if isinstance(dims, list) else [dims]
        if len(dims) != 1 or im.result.dtype not in FLOATS:
            return NotImplemented
        x = im.to_dtype(x, im.result.dtype)
        return im.emit(op, x, dim=dims[0] % x.type.rank, keepdim=keepdim)

    return rule


_rule("mean.dim")(_along_one(reduction.mean))
_rule("sum.dim_IntList")(_along_one(reduction.sum_))
_rule("amax")(_along_one(reduction.amax))


@_rule("max.dim")
def _max(im: Im, x: Value, axis: int, keepdim: bool = False) -> tuple[Value, ...]:
    attrs: dict[str, Any] = {"dim": axis % x.type.rank, "keepdim": keepdim}
    indices = im.emit(reduction.argmax, x, **attrs)
    if x.type.dtype in FLOATS:
        return (im.emit(reduction.amax, x, **attrs), indices)
    (largest, _) = reduction.topk.node((x,), {"k": 1, "dim": attrs["dim"]}, im.source()).results
    return (im.to_shape(largest, indices.type.shape), indices)


@_rule("argmax")
def _argmax(im: Im, x: Value, axis: int | None = None, keepdim: bool = False) -> Any:
    if axis is None:
        return NotImplemented
    return im.emit(reduction.argmax, x, dim=axis % x.type.rank, keepdim=keepdim)


@_rule("softmax.int _softmax")
def _softmax(im: Im, x: Value, axis: int, *args: Any, **kwargs: Any) -> Value:
    return im.emit(reduction.softmax, im.to_dtype(x, im.result.dtype), dim=axis % x.type.rank)


@_rule("topk")
def _topk(
    im: Im, x: Value, k: int, axis: int = -1, largest: bool = True, sorted: bool = True
) -> Any:
    if not largest:
        return NotImplemented
    return reduction.topk.node((x,), {"k": k, "dim": axis % x.type.rank}, im.source()).results


# ---- products and norms


@_rule("linear")
def _linear(im: Im, x: Value, weight: Value, bias: Value | None = None) -> Value:
    return im.emit(linear.linear, x, weight, bias=bias)


@_rule("matmul mm bmm")
def _matmul(im: Im, x: Value, y: Value) -> Any:
    if min(x.type.rank, y.type.rank) < 2:
        return NotImplemented
    return im.emit(linear.matmul, x, y)


@_rule("addmm")
def _addmm(im: Im, bias: Value, x: Value, y: Value, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """bias + x · y == linear(x, yᵀ, bias)"""
    if (beta, alpha) != (1, 1) or bias.type.shape != y.type.shape[1:]:
        return NotImplemented
    return im.emit(linear.linear, x, im.emit(shape.permute, y, dims=(1, 0)), bias=bias)


@_rule("embedding")
def _embedding(im: Im, table: Value, ids: Value, *args: Any) -> Value:
    return im.emit(linear.embedding, ids, table)


@_rule("layer_norm")
def _layer_norm(
    im: Im,
    x: Value,
    shape_: list[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Any:
    if len(shape_) != 1:
        return NotImplemented
    return im.emit(norm.layer_norm, x, weight=weight, bias=bias, eps=eps)


@_rule("_native_batch_norm_legit_no_training")
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


@_rule("rms_norm")
def _rms_norm(
    im: Im, x: Value, shape_: list[int], weight: Value | None = None, eps: float | None = None
) -> Any:
    if len(shape_) != 1:
        return NotImplemented
    eps = torch.finfo(torch_dtype(x.type.dtype)).eps if eps is None else eps
    return im.emit(norm.rms_norm, x, weight=weight, eps=eps)


# ---- attention and experts, token-major: the batch of one is dropped


@_rule("ingot.attention.default")
def _attention(
    im: Im,
    q: Value,
    k: Value,
    v: Value,
    sinks: Value | None,
    scale: float,
    *variant: Any,
) -> Value:
    rows: list[Value] = []
    for x in (q, k, v):
        _, heads, tokens, size = x.type.shape
        by_token = im.emit(shape.permute, x, dims=(0, 2, 1, 3))
        rows.append(im.to_shape(by_token, (tokens, heads, size)))
    usual = {"causal": True, "window": 0, "softcap": 0.0}
    attrs = _unusual(dict(zip(usual, variant, strict=True)), usual)
    out = im.emit(attention.attention, *rows, sinks=sinks, scale=scale, **attrs)
    return im.to_shape(out, im.result.shape)


def _unusual(attrs: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Attributes that are not what the op takes for granted."""
    return {name: value for name, value in attrs.items() if value != usual[name]}


@_rule("ingot.hadamard.default")
def _hadamard(im: Im, x: Value, block: int) -> Value:
    return im.emit(hadamard.hadamard, x, block=block)


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
    if interleaved and gated:
        gate_up = _split_interleaved(im, gate_up)
        gate_up_bias = gate_up_bias and _split_interleaved(im, gate_up_bias)
    attrs: dict[str, Any] = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    attrs["activation"] = activation
    attrs.update({} if gated else {"gated": False})
    attrs.update({"alpha": alpha, "limit": limit} if alpha else {})
    return im.emit(moe.experts, x, weights, indices, gate_up, down, **attrs)
