"""Types and attributes out of text: literals, lists of them, and arithmetic on dims.

Text may come from anywhere: arithmetic is done only where its result is small, which is known from
the sizes of its parts before anything is computed.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy

from .ast_lock import parse_expression
from .dtypes import DTYPES
from .types import TensorType, dim, symbol

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(sympy, name) for name in ("floor", "ceiling", "Mod", "Min", "Max")
}
_MAX_EXPONENT = 16
_MAX_RANK = 64  # torch has no tensors of more dims


class ParseError(Exception):
    """The text is not IR; the message quotes the line."""


@lru_cache(1 << 12)
def parse_type(text: str) -> TensorType:
    """A type as printed, `bf16[T, 4096]`."""
    found = re.fullmatch(r"\s*(\w+)\[(.*)\]\s*", text)
    if not found or found[1] not in DTYPES:
        raise ParseError(f"expected a type such as f32[T, 64], found {text[:80]!r}")
    dims = parse_attribute(parse_expression(f"[{found[2]}]"))
    if len(dims) > _MAX_RANK:
        raise ParseError(f"expected at most {_MAX_RANK} dims, found {len(dims)}")
    for d in dims:
        if isinstance(d, bool) or not isinstance(d, int | sympy.Expr):
            raise ParseError(f"expected a dim, found {d!r}")
    return TensorType(found[1], tuple(dim(d) for d in dims))


def parse_attribute(tree: ast.expr) -> Any:
    """The value of a literal, of a dim, or of a list of such; ParseError for anything else."""
    if isinstance(tree, ast.List):
        # The product of a shape's dims is a dim as well: that of its elements.
        _joined(_extent(item) for item in tree.elts if not isinstance(item, ast.List))
        return tuple(parse_attribute(item) for item in tree.elts)
    _extent(tree)
    return _value(tree)


@dataclass(frozen=True)
class _Extent:
    """Bounds of an expression, multiplied out: `terms`, `degree` in all symbols together, `bits` of
    its largest coefficient, and `functions` in it (floor, Max, ...)."""

    terms: int = 1
    degree: int = 0
    bits: int = 1
    functions: int = 0

    def __post_init__(self) -> None:
        if self.terms > 64 or self.degree > 32 or self.bits > 1024 or self.functions > 8:
            raise ParseError(
                "expected arithmetic of at most 64 terms, 8 functions, degree 32 and 1024 bits, "
                f"found {self.terms} terms, {self.functions} functions, degree {self.degree} and "
                f"{self.bits} bits"
            )


def _joined(parts: Iterable[_Extent]) -> _Extent:
    """The extent of the product of all parts."""
    total = _Extent()
    for part in parts:
        total = _Extent(
            total.terms * part.terms,
            total.degree + part.degree,
            # Numbers of a list are no dims: their product is never made symbolic.
            max(total.bits, part.bits),
            total.functions + part.functions,
        )
    return total


def _extent(tree: ast.expr) -> _Extent:
    """The extent of what `_value` will compute; ParseError where that is too much."""
    match tree:
        case ast.Constant(value):
            return _Extent(bits=value.bit_length() if isinstance(value, int) else 64)
        case ast.Name():
            return _Extent(degree=1)
        case ast.UnaryOp(ast.USub(), operand):
            return _extent(operand)
        case ast.BinOp(base, ast.Pow(), power):
            exponent = abs(_exponent(power))
            one = _extent(base)
            return _Extent(
                one.terms**exponent,
                one.degree * exponent,
                (one.bits + one.terms.bit_length()) * exponent,
                one.functions,
            )
        case ast.BinOp(left, ast.Add() | ast.Sub(), right):
            a, b = _extent(left), _extent(right)
            return _Extent(
                a.terms + b.terms,
                max(a.degree, b.degree),
                max(a.bits, b.bits) + 1,
                a.functions + b.functions,
            )
        case ast.BinOp(left, ast.Mult() | ast.Div(), right):
            a, b = _extent(left), _extent(right)
            return _Extent(
                a.terms * b.terms,
                a.degree + b.degree,
                a.bits + b.bits + min(a.terms, b.terms).bit_length(),
                a.functions + b.functions,
            )
        case ast.Call(ast.Name(name), args, []) if name in _FUNCTIONS and args:
            found = _joined(map(_extent, args))
            return _Extent(found.terms, found.degree, found.bits, found.functions + len(args))
        case _:
            raise ParseError(f"not an attribute: {ast.unparse(tree)[:80]}")


def _exponent(tree: ast.expr) -> int:
    sign, number = (-1, tree.operand) if isinstance(tree, ast.UnaryOp) else (1, tree)
    value = number.value if isinstance(number, ast.Constant) else None
    if not isinstance(value, int) or value > _MAX_EXPONENT:
        shown = ast.unparse(tree)[:80]
        raise ParseError(f"expected an exponent within ±{_MAX_EXPONENT}, found {shown}")
    return sign * value


def _quotient(a: Any, b: Any) -> Any:
    return sympy.Integer(a) / b if isinstance(a, int) else a / b


_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _quotient,
    ast.Pow: operator.pow,
}


def _value(tree: ast.expr) -> Any:
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.Name):
        return {"inf": math.inf, "nan": math.nan}.get(tree.id, symbol(tree.id))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_number(tree.operand)
    if isinstance(tree, ast.BinOp):
        return _ARITHMETIC[type(tree.op)](_number(tree.left), _number(tree.right))
    assert isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)
    return _FUNCTIONS[tree.func.id](*map(_number, tree.args))


def _number(tree: ast.expr) -> Any:
    value = _value(tree)
    if not isinstance(value, int | float | sympy.Expr):
        raise ParseError(f"expected a number, found {ast.unparse(tree)[:80]}")
    return value
