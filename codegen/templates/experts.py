"""Mixtures of experts: launches for few tokens, which read what they chose, and for many, sorted.

A weight may be dense, of x's dtype, or in MXFP4, each of the two by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton

from ...compiler.types import DTYPE_BITS, TensorType
from ..request import (
    LAUNCH_SECONDS,
    Arg,
    Call,
    Chosen,
    Codes,
    Declined,
    Operand,
    Ref,
    Request,
    Result,
    Scales,
    Temp,
)
from .experts_few import down_kernel, hidden_kernel

# Codes that a device unpacks in a second in kernels that do little else; about 20 a clock and SM.
_UNPACKED_PER_SECOND = 4e12
# Elements of a weight that a program of the kernels for few tokens loads at once, and the widest
# tile of them, one vector of 16 bytes a thread.
_TILE, _WIDEST = 4096, {"dense": 1024, "packed": 2048}


@dataclass(frozen=True)
class _Experts:
    """The operands of a node by what they are; `step` is between rows, in elements."""

    tokens: int
    k: int
    count: int
    width: int
    inner: int
    gated: bool
    step: int
    biased: bool
    residual: int | None
    residual_step: int

    @property
    def choices(self) -> int:
        return self.tokens * self.k


def _read(request: Request) -> _Experts | Declined:
    """What there is to compute, or why no kernel here can."""
    x, weights, indices, gate_up, down, *optional = request.args
    residual = 4 + len(optional) if request.attrs.get("residual") else None
    biases = optional[: len(optional) - (residual is not None)]
    rows = [x] if residual is None else [x, request.args[residual]]
    for operand in rows:
        if operand.strides[-1] != 1:
            return Declined(f"rows of {operand.type} are not dense")
    for operand in (weights, indices, gate_up, down, *biases):
        if not operand.dense:
            return Declined(f"{operand.type} is not dense")
    return _Experts(
        x.shape[0],
        indices.shape[1],
        gate_up.shape[0],
        x.shape[1],
        down.shape[2],
        bool(request.attrs.get("gated", True)),
        x.strides[0],
        bool(biases),
        residual,
        rows[-1].strides[0],
    )


def _memory(request: Request, position: int) -> tuple[dict[str, Ref], dict[str, Any]]:
    """Pointers to the weight at `position`, and the constants that go with them."""
    packed = request.args[position].packed
    if packed is None:
        return {"weight": Arg(position)}, {"scales": None, "GROUP": 0}
    return {"weight": Codes(position), "scales": Scales(position)}, {"GROUP": packed.group}


def _bias(have: _Experts, position: int) -> tuple[dict[str, Ref], dict[str, Any]]:
    return ({"bias": Arg(position)}, {}) if have.biased else ({}, {"bias": None})


def _residual(have: _Experts) -> tuple[dict[str, Ref], dict[str, Any]]:
    constants = {"STEP": have.residual_step}
    if have.residual is None:
        return {}, {"residual": None, **constants}
    return {"residual": Arg(have.residual)}, constants


def _activation(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "GATED": bool(attrs.get("gated", True)),
        "ACTIVATION": attrs["activation"],
        "ALPHA": float(attrs.get("alpha", 0.0)),
        "LIMIT": float(attrs.get("limit", 0.0)),
    }


def _touched(have: _Experts) -> float:
    """How many experts T · k choices name, if all are equally likely."""
    return have.count * (1 - (1 - 1 / have.count) ** have.choices)


def _of_one(weight: Operand) -> float:
    """Bytes of one expert's weight."""
    return weight.nbytes / weight.shape[0]


def _unpacking(weight: Operand) -> float:
    """Seconds that unpacking one expert's weight takes the whole device."""
    return weight.type.numel / weight.shape[0] / _UNPACKED_PER_SECOND if weight.packed else 0.0


def _gemv_tile(width: int, packed: bool, most_rows: int) -> dict[str, Any]:
    """Rows and columns at once: wide, but wasting at most an eighth of the last block."""
    block = _WIDEST["packed" if packed else "dense"]
    while block > 256 and triton.cdiv(width, block) * block > 1.125 * width:
        block //= 2
    return {"ROWS": min(most_rows, _TILE // block * (2 if packed else 1)), "BLOCK": block}


def few(request: Request) -> Chosen | Declined:
    """Two launches: the hidden columns of every choice, then every token's sum over its choices."""
    have = _read(request)
    if isinstance(have, Declined):
        return have
    gate_up, down = request.args[3:5]
    dtype = request.args[0].type.dtype
    weight, form = _memory(request, 3)
    bias, no_bias = _bias(have, 5)
    tile = _gemv_tile(have.width, gate_up.packed is not None, 16)
    hidden = Call(
        hidden_kernel,
        {"x": Arg(0), "indices": Arg(2), **weight, **bias, "hidden": Temp("hidden")},
        (triton.cdiv(have.inner, tile["ROWS"]), have.choices, 1),
        (Temp("hidden"),),
        {
            **form,
            **no_bias,
            **tile,
            **_activation(request.attrs),
            "K": have.k,
            "STEP": have.step,
            "WIDTH": have.width,
            "INNER": have.inner,
        },
    )
    weight, form = _memory(request, 4)
    bias, no_bias = _bias(have, 6)
    residual, rest = _residual(have)
    tile = _gemv_tile(have.inner, down.packed is not None, 16)
    out = Call(
        down_kernel,
        {
            "hidden": Temp("hidden"),
            "weights": Arg(1),
            "indices": Arg(2),
            **weight,
            **bias,
            **residual,
            "out": Result(0),
        },
        (triton.cdiv(have.width, tile["ROWS"]), have.tokens, 1),
        (Result(0),),
        {
            **form,
            **no_bias,
            **rest,
            **tile,
            "K": have.k,
            "WIDTH": have.width,
            "INNER": have.inner,
        },
    )
    moved = have.choices * (_of_one(gate_up) + _of_one(down)) / request.target.bytes_per_second
    computed = have.choices * (_unpacking(gate_up) + _unpacking(down))
    return Chosen(
        (hidden, out),
        max(moved, computed) + 2 * LAUNCH_SECONDS,
        f"{have.choices} choices, each reads its expert",
        {"hidden": TensorType(dtype, (have.choices, have.inner))},
    )


TEMPLATES = {"experts": (few,)}
