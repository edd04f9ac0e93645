"""Element-wise ops as Triton expressions: what one step of a generated kernel computes.

Operands and results are values as they stand in registers: f16 and bf16 in f32, everything else in
its own type. The generator rounds a step's result to its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..compiler.dtypes import DTYPES, FLOATS, INTEGERS

NARROW = {name: f"tl.{DTYPES[name].torch}" for name in FLOATS if DTYPES[name].bits == 16}
# The type in registers of each dtype that kernels know.
HELD = {
    name: "tl.float32" if name in NARROW else "tl.int1" if name == "bool" else f"tl.{dtype.torch}"
    for name, dtype in DTYPES.items()
    if dtype.triton
}


@dataclass(frozen=True)
class Typed:
    """An operand of a step: its name in the text, its dtype, and its number if it is a literal."""

    name: str
    dtype: str
    value: bool | int | float | None = None


def number(value: bool | int | float, dtype: str) -> str:
    """A literal as a block of the type that `dtype` has in registers."""
    if dtype in FLOATS:
        x = float(value)
        shown = repr(x) if math.isfinite(x) else f'float("{x}")'
    else:
        shown = str(bool(value)) if dtype == "bool" else str(int(value))
    return f"tl.full((BLOCK,), {shown}, {HELD[dtype]})"


def rounded(text: str, dtype: str) -> str:
    """`text`, a value in registers, rounded to `dtype` and back in registers."""
    narrow = NARROW.get(dtype)
    return f"({text}).to({narrow}).to(tl.float32)" if narrow else text


def stored(name: str, dtype: str) -> str:
    """The value in registers called `name` as it is written to memory."""
    return f"{name}.to({NARROW[dtype]})" if dtype in NARROW else name


_Expression = Callable[[Sequence[Typed], Mapping[str, Any]], str]


def _pattern(text: str, **by_dtype: str) -> _Expression:
    """Operands stand in `text` as {0}, {1}, {2}; some dtypes of the first have their own texts."""

    def expression(operands: Sequence[Typed], attrs: Mapping[str, Any]) -> str:
        chosen = by_dtype.get(operands[0].dtype, text)
        return chosen.format(*(o.name for o in operands))

    return expression


def _compared(sign: str) -> _Expression:
    """A literal beside a narrow float is rounded to it before they are compared."""

    def expression(operands: Sequence[Typed], attrs: Mapping[str, Any]) -> str:
        x, y = (rounded(o.name, o.dtype) if o.value is not None else o.name for o in operands)
        return f"{x} {sign} {y}"

    return expression


def _clamp(operands: Sequence[Typed], attrs: Mapping[str, Any]) -> str:
    x = operands[0]
    low, high = number(attrs["min"], x.dtype), number(attrs["max"], x.dtype)
    return f"tl.where({x.name} < {low}, {low}, tl.where({x.name} > {high}, {high}, {x.name}))"


def _cast(operands: Sequence[Typed], attrs: Mapping[str, Any]) -> str:
    x, dtype = operands[0], attrs["dtype"]
    return f"{x.name} != 0" if dtype == "bool" else f"{x.name}.to({HELD[dtype]})"


def _power(operands: Sequence[Typed], attrs: Mapping[str, Any]) -> str:
    """Small whole powers are products, as in torch."""
    x, y = operands
    if x.dtype in INTEGERS:
        signed = x.dtype != "u8"
        return f"integer_power({x.name}, {y.name}, {DTYPES[x.dtype].bits}, {signed})"
    products: dict[Any, str] = {
        1: x.name,
        2: f"{x.name} * {x.name}",
        3: f"{x.name} * {x.name} * {x.name}",
    }
    if y.value in products:
        return products[y.value]
    return f"float_power({x.name}, {y.name})"


def _glu(operands: Sequence[Typed], attrs: Mapping[str, Any]) -> str:
    gate, up = (o.name for o in operands)
    alpha, limit = (float(attrs.get(name, 0.0)) for name in ("alpha", "limit"))
    return f"gated({gate}, {up}, {attrs['activation']!r}, {alpha!r}, {limit!r})"


def _gelu(operands: Sequence[Typed], attrs: Mapping[str, Any]) -> str:
    name = "gelu_tanh" if attrs["approximate"] == "tanh" else "gelu"
    return f"activated({operands[0].name}, {name!r})"


# `index` is the place in the region's row-major order.
def _arange(operands: Sequence[Typed], attrs: Mapping[str, Any]) -> str:
    wide = "tl.int64" if attrs["dtype"] in INTEGERS else "tl.float64"
    start, step = attrs["start"], attrs["step"]
    return f"(index.to({wide}) * {step} + {start}).to({HELD[attrs['dtype']]})"


def _full(operands: Sequence[Typed], attrs: Mapping[str, Any]) -> str:
    return number(attrs["value"], attrs["dtype"])


# Triton's plain division and root of f32 are approximations. NaN wins in maximum and minimum, as in
# torch.
EXPRESSIONS: Mapping[str, _Expression] = {
    "neg": _pattern("-{0}"),
    "abs": _pattern("tl.abs({0})"),
    "floor": _pattern("tl.floor({0})"),
    "exp": _pattern("tl.exp({0})"),
    "expm1": _pattern("expm1({0})"),
    "log": _pattern("tl.log({0})"),
    "sqrt": _pattern("tl.sqrt_rn({0})", f64="tl.sqrt({0})"),
    "rsqrt": _pattern("tl.rsqrt({0})"),
    "sin": _pattern("tl.sin({0})"),
    "cos": _pattern("tl.cos({0})"),
    "tanh": _pattern("tanh({0})"),
    "sigmoid": _pattern("activated({0}, 'sigmoid')"),
    "silu": _pattern("activated({0}, 'silu')"),
    "relu": _pattern("activated({0}, 'relu')"),
    "softplus": _pattern("softplus({0})"),
    "gelu": _gelu,
    "clamp": _clamp,
    "cast": _cast,
    "logical_not": _pattern("{0} == 0"),
    "add": _pattern("{0} + {1}", bool="{0} | {1}"),
    "sub": _pattern("{0} - {1}"),
    "mul": _pattern("{0} * {1}", bool="{0} & {1}"),
    "div": _pattern("tl.div_rn({0}, {1})", f64="{0} / {1}"),
    "pow": _power,
    "maximum": _pattern("tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})"),
    "minimum": _pattern("tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})"),
    "lt": _compared("<"),
    "le": _compared("<="),
    "gt": _compared(">"),
    "ge": _compared(">="),
    "eq": _compared("=="),
    "ne": _compared("!="),
    "logical_and": _pattern("{0} & {1}"),
    "logical_or": _pattern("{0} | {1}"),
    "where": _pattern("tl.where({0}, {1}, {2})"),
    "glu": _glu,
    "arange": _arange,
    "full": _full,
}
