"""Element-wise ops: one result element from the elements at the same place, with broadcasting."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from ..ir import Cost, Op, Sample, Tolerance
from ..torch_types import torch_dtype
from ..types import DTYPE_BITS, FLOATS, Dim, Shape, TensorType, Types, VerifyError

_T = TensorType("f32", (3, 5))
_ROW = TensorType("f32", (5,))


def broadcast(name: str, *shapes: Shape) -> Shape:
    """The common shape of `shapes`, aligned at the right; VerifyError where dims disagree."""
    rank = max(map(len, shapes))
    result: list[Dim] = []
    for axis in range(-rank, 0):
        dims = {s[axis] for s in shapes if len(s) >= -axis} - {1}
        if len(dims) > 1:
            shown = " and ".join(str(list(s)) for s in shapes)
            raise VerifyError(f"{name}: cannot broadcast {shown}: dims {dims} differ at axis {axis}")
        result.append(dims.pop() if dims else 1)
    return tuple(result)


def _cost(args: Types, results: Types, **attrs: Any) -> Cost:
    return Cost(results[0].numel, sum((t.nbytes for t in (*args, *results)), 0))


# ---- one operand


def _unary_infer(name: str) -> Callable[[TensorType], Types]:
    def infer(x: TensorType) -> Types:
        if x.dtype not in FLOATS:
            raise VerifyError(f"{name}: expected a float, found {x}")
        return (x,)

    return infer


def _unary(name: str, torch_op: Callable[[Any], Any], **options: Any) -> Op:
    def reference(x: Any) -> tuple[Any, ...]:
        return (torch_op(x),)

    return Op(name, _unary_infer(name), reference, _cost, (Sample((_T,)),), **options)


neg = _unary("neg", torch.neg)
abs_ = _unary("abs", torch.abs)
exp = _unary("exp", torch.exp)
log = _unary("log", torch.log)
sqrt = _unary("sqrt", torch.sqrt)
rsqrt = _unary("rsqrt", torch.rsqrt)
sin = _unary("sin", torch.sin, tolerance=Tolerance(f32=1e-4))
cos = _unary("cos", torch.cos, tolerance=Tolerance(f32=1e-4))
tanh = _unary("tanh", torch.tanh)
sigmoid = _unary("sigmoid", torch.sigmoid)
silu = _unary("silu", torch.nn.functional.silu)
relu = _unary("relu", torch.relu)


def _gelu_infer(x: TensorType, *, approximate: str) -> Types:
    if approximate not in ("none", "tanh"):
        raise VerifyError(f"gelu: approximate is 'none' or 'tanh', found {approximate!r}")
    return _unary_infer("gelu")(x)


def _gelu_reference(x: torch.Tensor, *, approximate: str) -> tuple[torch.Tensor]:
    return (torch.nn.functional.gelu(x, approximate=approximate),)


gelu = Op(
    "gelu",
    _gelu_infer,
    _gelu_reference,
    _cost,
    (Sample((_T,), {"approximate": "tanh"}), Sample((_T,), {"approximate": "none"})),
)


def _clamp_infer(x: TensorType, *, min: float, max: float) -> Types:
    if not min <= max:
        raise VerifyError(f"clamp: expected min <= max, found {min} and {max}")
    return _unary_infer("clamp")(x)


def _clamp_reference(x: torch.Tensor, *, min: float, max: float) -> tuple[torch.Tensor]:
    return (x.clamp(min, max),)


clamp = Op(
    "clamp",
    _clamp_infer,
    _clamp_reference,
    _cost,
    (Sample((_T,), {"min": -0.5, "max": 0.5}), Sample((_T,), {"min": 0.0, "max": math.inf})),
)


def _cast_infer(x: TensorType, *, dtype: str) -> Types:
    if dtype not in DTYPE_BITS:
        raise VerifyError(f"cast: unknown dtype {dtype!r}")
    return (x.with_dtype(dtype),)


def _cast_reference(x: torch.Tensor, *, dtype: str) -> tuple[torch.Tensor]:
    return (x.to(torch_dtype(dtype)),)


cast = Op(
    "cast",
    _cast_infer,
    _cast_reference,
    _cost,
    (Sample((_T,), {"dtype": "bf16"}), Sample((TensorType("i64", (4,)),), {"dtype": "f32"})),
)


def _not_infer(x: TensorType) -> Types:
    if x.dtype != "bool":
        raise VerifyError(f"logical_not: expected a bool, found {x}")
    return (x,)


def _not_reference(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (~x,)


logical_not = Op(
    "logical_not", _not_infer, _not_reference, _cost, (Sample((TensorType("bool", (4,)),)),)
)


# ---- two operands of one dtype


def _binary_infer(name: str, compare: bool) -> Callable[[TensorType, TensorType], Types]:
    def infer(x: TensorType, y: TensorType) -> Types:
        if x.dtype != y.dtype:
            raise VerifyError(f"{name}: expected equal dtypes, found {x} and {y}")
        return (TensorType("bool" if compare else x.dtype, broadcast(name, x.shape, y.shape)),)

    return infer


def _binary(
    name: str,
    torch_op: Callable[[Any, Any], Any],
    commutative: bool = False,
    compare: bool = False,
    samples: tuple[Sample, ...] = (Sample((_T, _T)), Sample((_T, _ROW))),
) -> Op:
    def reference(x: Any, y: Any) -> tuple[Any, ...]:
        return (torch_op(x, y),)

    infer = _binary_infer(name, compare)
    return Op(name, infer, reference, _cost, samples, commutative=commutative)


_BOOLS = (Sample((TensorType("bool", (3, 5)), TensorType("bool", (5,)))),)
_INTS = (Sample((TensorType("i64", (3, 5)), TensorType("i64", (5,))), high=3),)


def _maximum(x: Any, y: Any) -> Any:
    return x.clamp(min=y) if isinstance(y, int | float) else torch.maximum(x, y)


def _minimum(x: Any, y: Any) -> Any:
    return x.clamp(max=y) if isinstance(y, int | float) else torch.minimum(x, y)


add = _binary("add", operator.add, commutative=True)
sub = _binary("sub", operator.sub)
mul = _binary("mul", operator.mul, commutative=True)
div = _binary("div", operator.truediv)
pow_ = _binary("pow", operator.pow, samples=(Sample((TensorType("f64", (3,)),) * 2),))
maximum = _binary("maximum", _maximum, commutative=True)
minimum = _binary("minimum", _minimum, commutative=True)
lt = _binary("lt", operator.lt, compare=True)
le = _binary("le", operator.le, compare=True)
gt = _binary("gt", operator.gt, compare=True)
ge = _binary("ge", operator.ge, compare=True)
eq = _binary("eq", operator.eq, compare=True, commutative=True, samples=_INTS)
ne = _binary("ne", operator.ne, compare=True, commutative=True, samples=_INTS)
logical_and = _binary("logical_and", operator.and_, commutative=True, samples=_BOOLS)
logical_or = _binary("logical_or", operator.or_, commutative=True, samples=_BOOLS)


# ---- choice


def _where_infer(condition: TensorType, x: TensorType, y: TensorType) -> Types:
    if condition.dtype != "bool" or x.dtype != y.dtype:
        raise VerifyError(f"where: expected bool and two equal dtypes, found {condition}, {x}, {y}")
    return (TensorType(x.dtype, broadcast("where", condition.shape, x.shape, y.shape)),)


def _where_reference(condition: torch.Tensor, x: Any, y: Any) -> tuple[torch.Tensor]:
    like = x if isinstance(x, torch.Tensor) else y
    return (torch.where(condition, x, y).to(getattr(like, "dtype", torch.float32)),)


where = Op(
    "where",
    _where_infer,
    _where_reference,
    _cost,
    (Sample((TensorType("bool", (3, 5)), _T, _ROW)),),
)

UNARY = (neg, abs_, exp, log, sqrt, rsqrt, sin, cos, tanh, sigmoid, silu, relu)
ACTIVATIONS = (silu, gelu, relu, sigmoid, tanh)
POINTWISE = frozenset(
    (*UNARY, gelu, clamp, cast, logical_not)
    + (add, sub, mul, div, pow_, maximum, minimum, lt, le, gt, ge, eq, ne)
    + (logical_and, logical_or, where)
)
