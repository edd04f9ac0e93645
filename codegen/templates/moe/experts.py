"""Mixtures of experts: launches for few tokens, which read what they chose, and for many, sorted.

A weight may be dense, of x's dtype, or in MXFP4, each of the two by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton

from ....compiler.dtypes import DTYPES
from ....compiler.target import Target
from ....compiler.types import TensorType
from ...kernel_query import (
    LAUNCH_SECONDS,
    Arg,
    Call,
    Candidate,
    Codes,
    Declined,
    KernelQuery,
    Operand,
    Ref,
    Result,
    Scales,
    Temp,
    present,
)
from .experts_few import hidden_kernel, part_kernel
from .experts_many import count_kernel, hidden_tile_kernel, part_tile_kernel, place_kernel
from .experts_sum import combine_kernel

# Codes that a device unpacks in a second in kernels that do little else: about 20 a clock and SM;
# by scaled conversions an instruction of 64 lanes unpacks 128.
_UNPACKED_PER_SECOND = {False: 4e12, True: 12e12}
# Flops a second that tiles reach, roughly.
_MULTIPLIED_PER_SECOND = 3e14
# Elements of a weight that a program for few tokens loads at once, and how many of a row at most:
# each of _THREADS loads four, or two, vectors of 16 bytes.
_TILE = {"dense": 4096, "packed": 8192}
_WIDEST = {"dense": 1024, "packed": 2048}
_THREADS = 128
# Columns that a program sums at once, and indices that one looks through.
_COMBINED, _CHUNK = 1024, 1024


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
    residual_step: int

    @property
    def choices(self) -> int:
        return self.tokens * self.k


def _read(query: KernelQuery) -> _Experts | Declined:
    """What there is to compute, or why no kernel here can."""
    x, weights, indices, gate_up, down = query.args[:5]
    residual = query.operand("residual")
    biases = [b for name in ("gate_up_bias", "down_bias") if (b := query.operand(name))]
    rows = [x, residual] if residual else [x]
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
        bool(query.attrs.get("gated", True)),
        x.strides[0],
        rows[-1].strides[0],
    )


def _memory(query: KernelQuery, position: int) -> tuple[dict[str, Ref], dict[str, Any]]:
    """Pointers to the weight at `position`, and the constants that go with them."""
    packed = query.args[position].packed
    if packed is None:
        return {"weight": Arg(position)}, {"scales": None, "GROUP": 0, "SCALED": False}
    form = {"GROUP": packed.group, "SCALED": query.target.scaled_conversions}
    return {"weight": Codes(position), "scales": Scales(position)}, form


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


def _unpacking(weight: Operand, target: Target) -> float:
    """Seconds that unpacking one expert's weight takes the whole device."""
    rate = _UNPACKED_PER_SECOND[target.scaled_conversions]
    return weight.type.numel / weight.shape[0] / rate if weight.packed else 0.0


def _gemv_tile(width: int, weight: Operand) -> dict[str, Any]:
    """Rows and columns at once: wide, but wasting at most an eighth of the last block."""
    form = "packed" if weight.packed else "dense"
    block = _WIDEST[form]
    while block > 256 and triton.cdiv(width, block) * block > 1.125 * width:
        block //= 2
    return {"ROWS": min(16, _TILE[form] // block), "BLOCK": block}


def _combined(query: KernelQuery, have: _Experts) -> Call:
    """The launch that adds every token's parts."""
    residual, absent = present({"residual": query.ref("residual")})
    block = min(_COMBINED, triton.next_power_of_2(have.width))
    return Call(
        combine_kernel,
        {"parts": Temp("parts"), "weights": Arg(1), **residual, "out": Result(0)},
        (have.tokens, triton.cdiv(have.width, block), 1),
        (Result(0),),
        {**absent, "STEP": have.residual_step, "K": have.k, "WIDTH": have.width, "BLOCK": block},
    )


def few(query: KernelQuery) -> Candidate | Declined:
    """Three launches: every choice's hidden columns, its part, and every token's sum of parts."""
    have = _read(query)
    if isinstance(have, Declined):
        return have
    gate_up, down = query.args[3:5]
    dtype = query.args[0].type.dtype
    weight, form = _memory(query, 3)
    bias, no_bias = present({"bias": query.ref("gate_up_bias")})
    sizes = {"WIDTH": have.width, "INNER": have.inner}
    tile = _gemv_tile(have.width, gate_up)
    warps = _THREADS // query.target.warp
    hidden = Call(
        hidden_kernel,
        {"x": Arg(0), "indices": Arg(2), **weight, **bias, "hidden": Temp("hidden")},
        (have.choices, triton.cdiv(have.inner, tile["ROWS"]), 1),
        (Temp("hidden"),),
        {
            **_activation(query.attrs),
            **form,
            **no_bias,
            **tile,
            **sizes,
            "K": have.k,
            "STEP": have.step,
        },
        warps,
    )
    weight, form = _memory(query, 4)
    bias, no_bias = present({"bias": query.ref("down_bias")})
    tile = _gemv_tile(have.inner, down)
    parts = Call(
        part_kernel,
        {
            "hidden": Temp("hidden"),
            "indices": Arg(2),
            **weight,
            **bias,
            "parts": Temp("parts"),
        },
        (have.choices, triton.cdiv(have.width, tile["ROWS"]), 1),
        (Temp("parts"),),
        {**form, **no_bias, **tile, **sizes},
        warps,
    )
    moved = have.choices * (_of_one(gate_up) + _of_one(down)) / query.target.bytes_per_second
    computed = have.choices * (_unpacking(gate_up, query.target) + _unpacking(down, query.target))
    return Candidate(
        (hidden, parts, _combined(query, have)),
        max(moved, computed) + 3 * LAUNCH_SECONDS,
        f"{have.choices} choices, each reads its expert",
        {
            "hidden": TensorType(dtype, (have.choices, have.inner)),
            "parts": TensorType(dtype, (have.choices, have.width)),
        },
    )


def many(query: KernelQuery) -> Candidate | Declined:
    """Five launches: two sort the choices by expert, two multiply tiles of them, one sums."""
    have = _read(query)
    if isinstance(have, Declined):
        return have
    dtype = query.args[0].type.dtype
    gate_up, down = query.args[3:5]
    tokens = _tile_tokens(have, dtype)
    # Each expert that is chosen at all has one tile that may not be full.
    tiles = have.choices // tokens + min(have.count, have.choices)
    numbers = {"choices": have.choices}
    count = Call(
        count_kernel,
        {"indices": Arg(2), "counts": Temp("counts"), **numbers},
        (have.count, 1, 1),
        (Temp("counts"),),
        {"CHUNK": _CHUNK},
        overlaps=False,
    )
    sorted_ = (Temp("experts"), Temp("places"))
    where: dict[str, Ref] = {"experts": sorted_[0], "places": sorted_[1]}
    place = Call(
        place_kernel,
        {"indices": Arg(2), "counts": Temp("counts"), **where, **numbers, "tiles": tiles},
        (have.count, 1, 1),
        sorted_,
        {
            "COUNT": have.count,
            "BINS": triton.next_power_of_2(have.count),
            "TOKENS": tokens,
            "CHUNK": _CHUNK,
        },
        overlaps=False,
    )
    # Fewer than 64 rows where they are f32: for sm_100 Triton 3.7 makes tf32 of some products of 64
    # rows, ieee or not.
    shape = {"TOKENS": tokens, "ROWS": 32 if dtype == "f32" else 64}
    sizes = {"WIDTH": have.width, "INNER": have.inner}
    warps = 8 if tokens > 64 and query.target.warp == 32 else 4
    stages = 3 if query.target.name.startswith("cuda") else 2
    weight, form = _memory(query, 3)
    bias, no_bias = present({"bias": query.ref("gate_up_bias")})
    hidden = Call(
        hidden_tile_kernel,
        {"x": Arg(0), **where, **weight, **bias, "hidden": Temp("hidden")},
        (tiles, triton.cdiv(have.inner, shape["ROWS"]), 1),
        (Temp("hidden"),),
        {
            **_activation(query.attrs),
            **form,
            **no_bias,
            **shape,
            "BLOCK": _tile_block(query, gate_up, shape),
            **sizes,
            "K": have.k,
            "STEP": have.step,
        },
        warps,
        stages,
        overlaps=False,
    )
    weight, form = _memory(query, 4)
    bias, no_bias = present({"bias": query.ref("down_bias")})
    parts = Call(
        part_tile_kernel,
        {"hidden": Temp("hidden"), **where, **weight, **bias, "parts": Temp("parts")},
        (tiles, triton.cdiv(have.width, shape["ROWS"]), 1),
        (Temp("parts"),),
        {**form, **no_bias, **shape, "BLOCK": _tile_block(query, down, shape), **sizes},
        warps,
        stages,
        overlaps=False,
    )
    return Candidate(
        (count, place, hidden, parts, _combined(query, have)),
        _seconds_of_tiles(query, have, tokens),
        f"{have.choices} choices in tiles of {tokens}",
        {
            "counts": TensorType("i32", (have.count,)),
            "experts": TensorType("i32", (tiles,)),
            "places": TensorType("i32", (tiles, tokens)),
            "hidden": TensorType(dtype, (have.choices, have.inner)),
            "parts": TensorType(dtype, (have.choices, have.width)),
        },
    )


def _tile_tokens(have: _Experts, dtype: str) -> int:
    """Choices a tile: about as many as an expert has; f32 has no registers for many."""
    most = 32 if dtype == "f32" else 128
    return min(most, max(16, triton.next_power_of_2(have.choices // have.count)))


def _tile_block(query: KernelQuery, weight: Operand, shape: Mapping[str, int]) -> int:
    """As much of K at once as 128 bytes of dense elements; twice that where 64 lanes a warp load
    codes, 16 bytes each, if two programs then fit in the shared memory."""
    bits = DTYPES[query.args[0].type.dtype].bits
    block = 1024 // bits
    both = (shape["TOKENS"] + shape["ROWS"]) * 2 * block * bits // 8
    wide = weight.packed is not None and query.target.warp == 64 and bits == 16
    return 2 * block if wide and 2 * both <= query.target.shared_bytes else block


def _seconds_of_tiles(query: KernelQuery, have: _Experts, tokens: int) -> float:
    gate_up, down = query.args[3:5]
    touched = _touched(have)
    # Of each expert's tiles the last is half full, if there are several.
    tiles = max(touched, have.choices / tokens + touched / 2)
    read = touched * (_of_one(gate_up) + _of_one(down)) / query.target.bytes_per_second
    unpacked = tiles * sum(_unpacking(w, query.target) for w in (gate_up, down))
    elements = (gate_up.type.numel + down.type.numel) / have.count
    multiplied = 2 * tiles * tokens * elements / _MULTIPLIED_PER_SECOND
    # The sort reads all indices once an expert, in turns that have to wait for each other.
    turns = 2 * triton.cdiv(have.choices, _CHUNK)
    return max(read, unpacked, multiplied) + (5 + turns / 2) * LAUNCH_SECONDS


TEMPLATES = {"experts": (few, many)}
