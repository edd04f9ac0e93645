"""Element-wise ops: one result element from the elements at the same place, with broadcasting."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..axes import elementwise
from ..dtypes import DTYPES, FLOATS, INTEGERS
from ..ir import Op, Sample, Tolerance, per_element
from ..torch_types import torch_dtype, wide
from ..types import Dim, Shape, TensorType, Types, VerifyError

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
            raise VerifyError(
                f"{name}: cannot broadcast {shown}: dims {dims} differ at axis {axis}"
            )
        result.append(dims.pop() if dims else 1)
    return tuple(result)


_cost = per_element(1)


# ---- one operand


def float_type(name: str, x: TensorType) -> Types:
    """The type of `x`, which is to be a float."""
    if x.dtype not in FLOATS:
        raise VerifyError(f"{name}: expected a float, found {x}")
    return (x,)


def _unary(name: str, torch_op: Callable[[Any], Any], **options: Any) -> Op:
    infer = partial(float_type, name)
    return Op(name, infer, torch_op, _cost, (Sample((_T,)),), axes=elementwise, **options)


# torch computes sigmoid, silu, gelu and softplus in other code for the numbers left over after the
# last full vector, and rounds those differently. A token's result must not depend on where in the
# batch it stands, so these are written in ops that round alike everywhere: exp, log1p, tanh, erf
# and arithmetic.


def sigmoid_of(x: torch.Tensor) -> torch.Tensor:
    return (1 / (1 + torch.exp(-wide(x)))).to(x.dtype)


def silu_of(x: torch.Tensor) -> torch.Tensor:
    return (wide(x) / (1 + torch.exp(-wide(x)))).to(x.dtype)


def gelu_of(x: torch.Tensor) -> torch.Tensor:
    y = wide(x)
    return (0.5 * y * (1 + torch.erf(y * math.sqrt(0.5)))).to(x.dtype)


def gelu_tanh_of(x: torch.Tensor) -> torch.Tensor:
    y = wide(x)
    return (0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y)))).to(
        x.dtype
    )


def _rsqrt_of(x: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(wide(x)).to(x.dtype)


def _softplus_of(x: torch.Tensor) -> torch.Tensor:
    y = wide(x)
    return (y.clamp(min=0) + torch.log1p(torch.exp(-y.abs()))).to(x.dtype)


neg = _unary("neg", torch.neg)
abs_ = _unary("abs", torch.abs)
floor = _unary("floor", torch.floor)
exp = _unary("exp", torch.exp)
expm1 = _unary("expm1", torch.expm1)
log = _unary("log", torch.log)
sqrt = _unary("sqrt", torch.sqrt)
rsqrt = _unary("rsqrt", _rsqrt_of)
sin = _unary("sin", torch.sin, tolerance=Tolerance(f32=1e-4))
cos = _unary("cos", torch.cos, tolerance=Tolerance(f32=1e-4))
tanh = _unary("tanh", torch.tanh)
sigmoid = _unary("sigmoid", sigmoid_of)
silu = _unary("silu", silu_of)
relu = _unary("relu", torch.relu)
softplus = _unary("softplus", _softplus_of)


def _gelu_infer(x: TensorType, *, approximate: str) -> Types:
    if approximate not in ("none", "tanh"):
        raise VerifyError(f"gelu: approximate is 'none' or 'tanh', found {approximate!r}")
    return float_type("gelu", x)


def _gelu_reference(x: torch.Tensor, *, approximate: str) -> torch.Tensor:
    return gelu_tanh_of(x) if approximate == "tanh" else gelu_of(x)


gelu = Op(
    "gelu",
    _gelu_infer,
    _gelu_reference,
    _cost,
    (Sample((_T,), {"approximate": "tanh"}), Sample((_T,), {"approximate": "none"})),
    axes=elementwise,
)


def _clamp_infer(x: TensorType, *, min: float, max: float) -> Types:
    if not min <= max:
        raise VerifyError(f"clamp: expected min <= max, found {min} and {max}")
    return float_type("clamp", x)


clamp = Op(
    "clamp",
    _clamp_infer,
    torch.clamp,
    _cost,
    (Sample((_T,), {"min": -0.5, "max": 0.5}), Sample((_T,), {"min": 0.0, "max": math.inf})),
    axes=elementwise,
)


def _cast_infer(x: TensorType, *, dtype: str) -> Types:
    if dtype not in DTYPES:
        raise VerifyError(f"cast: unknown dtype {dtype!r}")
    return (x.with_dtype(dtype),)


def _cast_reference(x: torch.Tensor, *, dtype: str) -> torch.Tensor:
    return x.to(torch_dtype(dtype))


cast = Op(
    "cast",
    _cast_infer,
    _cast_reference,
    _cost,
    (Sample((_T,), {"dtype": "bf16"}), Sample((TensorType("i64", (4,)),), {"dtype": "f32"})),
    axes=elementwise,
)


def _not_infer(x: TensorType) -> Types:
    if x.dtype != "bool":
        raise VerifyError(f"logical_not: expected a bool, found {x}")
    return (x,)


logical_not = Op(
    "logical_not",
    _not_infer,
    torch.logical_not,
    _cost,
    (Sample((TensorType("bool", (4,)),)),),
    axes=elementwise,
)


# ---- two operands of one dtype


_REAL = (*INTEGERS, *FLOATS)
_NUMBERS = (*_REAL, "c64", "c128")
_ANY = ("bool", *_NUMBERS)


def _binary_infer(
    name: str, compare: bool, dtypes: tuple[str, ...], x: TensorType, y: TensorType
) -> Types:
    if x.dtype != y.dtype or x.dtype not in dtypes:
        kinds = ", ".join(dtypes)
        raise VerifyError(f"{name}: expected equal dtypes of {kinds}; found {x} and {y}")
    return (TensorType("bool" if compare else x.dtype, broadcast(name, x.shape, y.shape)),)


def _binary(
    name: str,
    torch_op: Callable[[Any, Any], Any],
    dtypes: tuple[str, ...],
    commutative: bool = False,
    compare: bool = False,
    samples: tuple[Sample, ...] = (Sample((_T, _T)), Sample((_T, _ROW))),
) -> Op:
    infer = partial(_binary_infer, name, compare, dtypes)
    return Op(name, infer, torch_op, _cost, samples, axes=elementwise, commutative=commutative)


_BOOLS = (Sample((TensorType("bool", (3, 5)), TensorType("bool", (5,)))),)
_INTS = (Sample((TensorType("i64", (3, 5)), TensorType("i64", (5,))), high=3),)


def _maximum(x: Any, y: Any) -> Any:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return torch.maximum(x, y)
    return x.clamp(min=y) if isinstance(x, torch.Tensor) else y.clamp(min=x)


def _minimum(x: Any, y: Any) -> Any:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return torch.minimum(x, y)
    return x.clamp(max=y) if isinstance(x, torch.Tensor) else y.clamp(max=x)


add = _binary("add", operator.add, _ANY, commutative=True)
sub = _binary("sub", operator.sub, _NUMBERS)
mul = _binary("mul", operator.mul, _ANY, commutative=True)
div = _binary("div", operator.truediv, (*FLOATS, "c64", "c128"))
pow_ = _binary("pow", operator.pow, _NUMBERS, samples=(Sample((TensorType("f64", (3,)),) * 2),))
maximum = _binary("maximum", _maximum, _REAL, commutative=True)
minimum = _binary("minimum", _minimum, _REAL, commutative=True)
lt = _binary("lt", operator.lt, _REAL, compare=True)
le = _binary("le", operator.le, _REAL, compare=True)
gt = _binary("gt", operator.gt, _REAL, compare=True)
ge = _binary("ge", operator.ge, _REAL, compare=True)
eq = _binary("eq", operator.eq, _ANY, compare=True, commutative=True, samples=_INTS)
ne = _binary("ne", operator.ne, _ANY, compare=True, commutative=True, samples=_INTS)
logical_and = _binary("logical_and", operator.and_, ("bool",), commutative=True, samples=_BOOLS)
logical_or = _binary("logical_or", operator.or_, ("bool",), commutative=True, samples=_BOOLS)


# ---- choice


def _where_infer(condition: TensorType, x: TensorType, y: TensorType) -> Types:
    if condition.dtype != "bool" or x.dtype != y.dtype:
        raise VerifyError(f"where: expected bool and two equal dtypes, found {condition}, {x}, {y}")
    return (TensorType(x.dtype, broadcast("where", condition.shape, x.shape, y.shape)),)


def _where_reference(condition: torch.Tensor, x: Any, y: Any) -> torch.Tensor:
    result = torch.where(condition, x, y)
    like = next((v for v in (x, y) if isinstance(v, torch.Tensor)), result)
    return result.to(like.dtype)


where = Op(
    "where",
    _where_infer,
    _where_reference,
    _cost,
    (Sample((TensorType("bool", (3, 5)), _T, _ROW)),),
    axes=elementwise,
)

UNARY = (
    *(neg, abs_, floor, exp, expm1, log, sqrt, rsqrt, sin, cos, tanh),
    *(sigmoid, silu, relu, softplus),
)
ACTIVATIONS = (silu, gelu, relu, sigmoid, tanh)
POINTWISE = frozenset(
    (*UNARY, gelu, clamp, cast, logical_not)
    + (add, sub, mul, div, pow_, maximum, minimum, lt, le, gt, ge, eq, ne)
    + (logical_and, logical_or, where)
)
