"""Dims, dtypes and tensor types: what the IR knows about a value without computing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from typing import Any

import sympy

from .dtypes import DTYPES, STORED_BITS

Dim = int | sympy.Expr
Shape = tuple[Dim, ...]


class VerifyError(Exception):
    """The IR breaks a rule of the op it names."""


@cache
def symbol(name: str) -> sympy.Symbol:
    """The dim called `name`: a positive integer, one and the same object on every call."""
    return sympy.Symbol(name, integer=True, positive=True)


def dim(value: int | sympy.Expr) -> Dim:
    """`value` in normal form: an int when it is one, else an expanded expression."""
    if isinstance(value, int):
        return value
    expanded: Any = sympy.expand(value)
    return int(expanded) if expanded.is_Integer else expanded


def free_symbols(shape: Shape) -> set[str]:
    """Names of the symbols in `shape`."""
    return {s.name for d in shape if not isinstance(d, int) for s in d.free_symbols}  # pyright: ignore


def evaluate(d: Dim, binding: Mapping[str, int]) -> int:
    """`d` with every symbol replaced.

    KeyError names a symbol that `binding` lacks; ValueError for a dim that is then no integer.
    """
    return d if isinstance(d, int) else _evaluate(d, tuple(binding.items()))


@lru_cache(1 << 12)
def _evaluate(d: sympy.Expr, values: tuple[tuple[str, int], ...]) -> int:
    binding = dict(values)
    value: Any = d.xreplace({s: sympy.Integer(binding[s.name]) for s in d.free_symbols})  # pyright: ignore
    if not value.is_Integer:
        raise ValueError(f"dim {d} is {value} at {binding}, which is no integer")
    return int(value)


def attr_symbols(value: Any) -> set[str]:
    """Names of the symbols in an attribute, also inside tuples and types."""
    if isinstance(value, sympy.Expr):
        return free_symbols((value,))
    if isinstance(value, TensorType):
        return free_symbols(value.shape)
    if isinstance(value, tuple):
        return set[str]().union(*(attr_symbols(v) for v in value))
    return set()


def bind_attr(value: Any, binding: Mapping[str, int]) -> Any:
    """An attribute with every dim in it, also inside tuples and types, replaced by its int."""
    if isinstance(value, sympy.Expr):
        return evaluate(value, binding)
    if isinstance(value, tuple):
        return tuple(bind_attr(v, binding) for v in value)
    if isinstance(value, TensorType):
        return value.bind(binding)
    return value


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype and shape of one value; shapes may hold expressions over the graph's symbols."""

    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> Dim:
        return dim(prod(self.shape))

    @property
    def nbytes(self) -> Dim:
        """Bytes of the dense tensor; sub-byte dtypes are packed."""
        known = DTYPES.get(self.dtype)
        bits = known.bits if known else STORED_BITS[self.dtype]
        total: Any = self.numel * bits
        symbolic = isinstance(total, sympy.Expr)
        return dim(sympy.ceiling(total / sympy.Integer(8))) if symbolic else -(-total // 8)

    def bind(self, binding: Mapping[str, int]) -> TensorType:
        """This type with every symbol replaced by its value."""
        return TensorType(self.dtype, tuple(evaluate(d, binding) for d in self.shape))

    def with_shape(self, shape: Shape) -> TensorType:
        return TensorType(self.dtype, tuple(dim(d) for d in shape))

    def with_dtype(self, dtype: str) -> TensorType:
        return TensorType(dtype, self.shape)


Types = tuple[TensorType, ...]
