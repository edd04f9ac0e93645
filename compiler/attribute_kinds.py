"""Kinds of attributes: which values the annotations in an op's `infer` take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import sympy

from .types import TensorType


class Kind(NamedTuple):
    """What an attribute may be, in words and as a test."""

    words: str
    takes: Callable[[Any], bool]


def _all(takes: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(map(takes, value))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_float(value: Any) -> bool:
    return isinstance(value, float) or _is_int(value)


def _is_dim(value: Any) -> bool:
    return _is_int(value) or isinstance(value, sympy.Expr)


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


_PLAIN: dict[str, Kind] = {
    "bool": Kind("True or False", _is(bool)),
    "int": Kind("an integer", _is_int),
    "float": Kind("a number", _is_float),
    "bool | int | float": Kind("a number, True or False", _is(int, float)),
    "str": Kind("a string", _is(str)),
    "Dim": Kind("a dim", _is_dim),
    "Shape": Kind("a list of dims", _all(_is_dim)),
    "TensorType": Kind("a type", _is(TensorType)),
    "tuple[int, ...]": Kind("a list of integers", _all(_is_int)),
    "tuple[bool, ...]": Kind("a list of True or False", _all(_is(bool))),
    "Steps": Kind("a list of steps, which are lists", _all(_is(tuple))),
}


def _or_none(kind: Kind) -> Kind:
    def takes(value: Any) -> bool:
        return value is None or kind.takes(value)

    return Kind(f"{kind.words}, or None", takes)


# By annotation, as `infer` has it.
KINDS: Mapping[str, Kind] = _PLAIN | {f"{n} | None": _or_none(kind) for n, kind in _PLAIN.items()}
