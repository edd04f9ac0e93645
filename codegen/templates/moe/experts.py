"""Mixtures of experts: launches for few tokens, which read what they chose, and for many, sorted.

A weight may be dense, of x's dtype, or in MXFP4, each of the two by itself. In fragments few
tokens stream both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton

from ....compiler.dtypes import DTYPES
from ....compiler.target import Target
from ....compiler.types import TensorType
from ...kernel_query import Arg, Call, Candidate, Declined, KernelQuery, Operand, Result, Temp
from ...prices import (
    CHUNK_SECONDS,
    EXPERTS_BANDWIDTH,
    MULTIPLIED_PER_SECOND,
    STREAMED_PER_SECOND,
    unpacking_seconds,
)
from ..gemm.epilogue import epilogue_of
from ..gemm.product import Rows
from ..gemm.weight import weight_of
from .expert_stream import calls
from .experts_kernels import (
    combine_kernel,
    count_kernel,
    expert_gemv_kernel,
    expert_sum_kernel,
    grouped_gemm_kernel,
    place_kernel,
)

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


def _of_one(weight: Operand) -> float:
    """Bytes of one expert's weight."""
    return weight.nbytes / weight.shape[0]


def _unpacking(weight: Operand, target: Target) -> float:
    """Seconds that unpacking one expert's weight takes the whole device."""
    elements = weight.type.numel / weight.shape[0]
    return unpacking_seconds(target, elements) if weight.packed else 0.0


def _gemv_tile(width: int, weight: Operand) -> dict[str, Any]:
    """Rows and columns at once: wide, but wasting at most an eighth of the last block."""
    form = "packed" if weight.packed else "dense"
    block = _WIDEST[form]
    while block > 256 and triton.cdiv(width, block) * block > 1.125 * width:
        block //= 2
    return {"ROWS": min(16, _TILE[form] // block), "BLOCK": block}


def _combined(query: KernelQuery, have: _Experts) -> Call:
    """The launch that adds every token's parts."""
    block = min(_COMBINED, triton.next_power_of_2(have.width))
    return Call(
        combine_kernel,
        {
            "parts": Temp("parts"),
            "weights": Arg(1),
            "residual": query.ref("residual"),
            "out": Result(0),
            "K": have.k,
            "STEP": have.residual_step,
            "WIDTH": have.width,
            "BLOCK": block,
        },
        (have.tokens, triton.cdiv(have.width, block), 1),
        (Result(0),),
    )


def _gemms(query: KernelQuery, have: _Experts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the gate-up GEMM, which makes the hidden rows of every choice, and of the down
    GEMM: rows choice / K of x with the weight of the choice's expert, N columns."""
    hidden = epilogue_of(
        query,
        Temp("hidden"),
        have.inner,
        bias=query.ref("gate_up_bias"),
        activation=query.attrs["activation"],
        gated=have.gated,
        rounded=True,
    )
    gate_up = {
        "x": Rows(Arg(0), have.step, 0),
        "weight": weight_of(query, 3, have.gated),
        "epilogue": hidden,
        "K": have.k,
        "N": have.inner,
    }
    down = {
        "x": Rows(Temp("hidden"), have.inner, 0),
        "weight": weight_of(query, 4),
        "epilogue": epilogue_of(query, Temp("parts"), have.width, bias=query.ref("down_bias")),
        "K": 1,
        "N": have.width,
    }
    return gate_up, down


def few(query: KernelQuery) -> Candidate | Declined:
    """Two launches: every choice's hidden columns, and every token's sum of their products."""
    have = _read(query)
    if isinstance(have, Declined):
        return have
    held_in, held_out = query.args[3:5]
    if any(held.packed and held.packed.fragments for held in (held_in, held_out)):
        return Declined("few: a weight does not lie by rows")
    gate_up, down = _gemms(query, have)
    threads = {"num_warps": _THREADS // query.target.warp}
    tile = _gemv_tile(have.width, held_in)
    hidden = Call(
        expert_gemv_kernel,
        {**gate_up, "indices": Arg(2), **tile},
        (have.choices, triton.cdiv(have.inner, tile["ROWS"]), 1),
        (Temp("hidden"),),
        **threads,
    )
    tile = _gemv_tile(have.inner, held_out)
    choices = _choices_at_once(have.k, tile["ROWS"])
    rows = tile["ROWS"] // choices
    summed = Call(
        expert_sum_kernel,
        {
            "x": down["x"],
            "indices": Arg(2),
            "weights": Arg(1),
            "weight": down["weight"],
            "bias": query.ref("down_bias"),
            "residual": query.ref("residual"),
            "out": Result(0),
            "K": have.k,
            "N": have.width,
            "STEP": have.residual_step,
            "CHOICES": choices,
            "ROWS": rows,
            "BLOCK": tile["BLOCK"],
        },
        (have.tokens, triton.cdiv(have.width, rows), 1),
        (Result(0),),
        **threads,
    )
    moved = have.choices * (_of_one(held_in) + _of_one(held_out)) / query.target.bytes_per_second
    computed = have.choices * sum(_unpacking(w, query.target) for w in (held_in, held_out))
    return Candidate(
        (hidden, summed),
        max(moved, computed) + 2 * query.target.launch_seconds,
        f"{have.choices} choices, each reads its expert",
        {"hidden": TensorType(query.args[0].type.dtype, (have.choices, have.inner))},
    )


def stream(query: KernelQuery) -> Candidate | Declined:
    """Two launches, as `few`, of weights in fragments."""
    have = _read(query)
    if isinstance(have, Declined):
        return have
    gate_up, down = _gemms(query, have)
    for args in (gate_up, down):
        del args["K"]
    hidden = {"weights": None, "bias": query.ref("gate_up_bias")}
    token = have.k * have.inner
    hidden["epilogue"] = gate_up["epilogue"]._replace(bias=None, STEP=token)
    hidden["Y_HEAD"] = have.inner
    summed = {"weights": Arg(1), "bias": query.ref("down_bias"), "Y_HEAD": 0}
    summed["epilogue"] = epilogue_of(query, Result(0), have.width, residual=True)
    made = calls(query, {**gate_up, **hidden}, {**down, **summed}, have.k)
    if isinstance(made, Declined):
        return made
    weights = query.args[3:5]
    # What choices at the same time read of the same expert is read once.
    turns = max(1.0, have.choices / query.target.multiprocessors)
    touched = turns * _touched(have.count, have.choices / turns)
    read = touched * sum(map(_of_one, weights)) / query.target.bytes_per_second
    codes = have.choices * sum(w.type.numel / have.count for w in weights)
    return Candidate(
        made,
        max(read / EXPERTS_BANDWIDTH, codes / STREAMED_PER_SECOND)
        + 2 * query.target.launch_seconds,
        f"{have.choices} choices, each streams its expert",
        {"hidden": TensorType(query.args[0].type.dtype, (have.choices, have.inner))},
    )


def _choices_at_once(k: int, rows: int) -> int:
    """How many of `k` choices share the `rows` rows of a tile: a power of two, as many as waste at
    most a third."""
    at_once = min(triton.next_power_of_2(k), rows)
    while triton.cdiv(k, at_once) * at_once > 4 * k / 3:
        at_once //= 2
    return at_once


def many(query: KernelQuery) -> Candidate | Declined:
    """Five launches: two sort the choices by expert, two are grouped GEMMs, one sums."""
    have = _read(query)
    if isinstance(have, Declined):
        return have
    dtype = query.args[0].type.dtype
    gate_up, down = query.args[3:5]
    tokens = _tile_tokens(have, dtype)
    # Each expert that is chosen at all has one tile that may not be full.
    tiles = have.choices // tokens + min(have.count, have.choices)
    counted = {"indices": Arg(2), "counts": Temp("counts"), "choices": have.choices}
    where = {"experts": Temp("experts"), "places": Temp("places")}
    calls = [
        Call(
            count_kernel,
            {**counted, "CHUNK": _CHUNK},
            (have.count, 1, 1),
            (Temp("counts"),),
            overlaps=False,
        ),
        Call(
            place_kernel,
            {
                **counted,
                **where,
                "tiles": tiles,
                "COUNT": have.count,
                "BINS": triton.next_power_of_2(have.count),
                "TOKENS": tokens,
                "CHUNK": _CHUNK,
            },
            (have.count, 1, 1),
            tuple(where.values()),
            overlaps=False,
        ),
    ]
    # Fewer than 64 rows where they are f32: for sm_100 Triton 3.7 makes tf32 of some products of 64
    # rows, ieee or not.
    shape = {"TOKENS": tokens, "ROWS": 32 if dtype == "f32" else 64}
    for gemm, held in zip(_gemms(query, have), (gate_up, down), strict=True):
        calls.append(
            Call(
                grouped_gemm_kernel,
                {**gemm, **where, **shape, "BLOCK": _tile_block(query, held, shape)},
                (tiles, triton.cdiv(gemm["N"], shape["ROWS"]), 1),
                (gemm["epilogue"].y,),
                num_warps=8 if tokens > 64 and query.target.warp == 32 else 4,
                num_stages=3 if query.target.name.startswith("cuda") else 2,
                overlaps=False,
            )
        )
    return Candidate(
        (*calls, _combined(query, have)),
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


def _touched(count: int, choices: float) -> float:
    """How many of `count` experts the choices name, if all are equally likely."""
    return count * (1 - (1 - 1 / count) ** choices)


def _seconds_of_tiles(query: KernelQuery, have: _Experts, tokens: int) -> float:
    gate_up, down = query.args[3:5]
    touched = _touched(have.count, have.choices)
    # Of each expert's tiles the last is half full, if there are several.
    tiles = max(touched, have.choices / tokens + touched / 2)
    read = touched * (_of_one(gate_up) + _of_one(down)) / query.target.bytes_per_second
    unpacked = tiles * sum(_unpacking(w, query.target) for w in (gate_up, down))
    elements = (gate_up.type.numel + down.type.numel) / have.count
    multiplied = 2 * tiles * tokens * elements / MULTIPLIED_PER_SECOND
    sorting = triton.cdiv(have.choices, _CHUNK) * CHUNK_SECONDS
    return max(read, unpacked, multiplied) + sorting + 5 * query.target.launch_seconds


TEMPLATES = {"experts": (few, stream, many)}
# Operands that are read in packed form.
PACKED_WEIGHTS = {"experts": ("gate_up", "down")}
