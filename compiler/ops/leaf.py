"""Leaves of every graph: parameters, named weights and scalar literals."""

from __future__ import annotations

from typing import Any

from ..dtypes import FLOATS
from ..ir import Op, Value, free
from ..types import TensorType, Types, VerifyError

_INEXACT = (*FLOATS, "c64", "c128")


def _declared(*, name: str, type: TensorType) -> Types:
    return (type,)


def _not_computed(**attrs: Any) -> tuple[Any, ...]:
    raise VerifyError(f"{attrs.get('name')!r} is an input of the graph: it is bound, not computed")


param = Op("param", _declared, _not_computed, free)
constant = Op("constant", _declared, _not_computed, free)


# A literal reaches references as a Python number: torch then computes with it unrounded, as in
# the traced program, whatever the dtype of the tensor beside it.
def _literal_infer(*, value: bool | int | float, dtype: str) -> Types:
    allowed = bool if dtype == "bool" else bool | int | float if dtype in _INEXACT else bool | int
    if not isinstance(value, allowed):
        raise VerifyError(f"literal: expected a number of dtype {dtype}, found {value!r}")
    return (TensorType(dtype, ()),)


def _literal_reference(*, value: Any, dtype: str) -> Any:
    return value


literal = Op("literal", _literal_infer, _literal_reference, free)


def is_literal(value: Value, number: float | None = None) -> bool:
    """Whether `value` is a literal, and equal to `number` if one is given."""
    return value.op is literal and (number is None or value.attrs["value"] == number)
