"""Rotary embedding, and its tables of cosines and sines."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...kernel_query import (
    Arg,
    Call,
    Candidate,
    Declined,
    KernelQuery,
    Operand,
    Result,
    even_step,
    not_floats,
)
from ..pdl import pdl_wait
from ..rowwise.arithmetic import cos_and_sin

_FLOATS = ("f16", "bf16", "f32")
# Elements of a tile that a program rotates.
_TILE = 2048


class Rotation(NamedTuple):
    """Rotary embedding of 2 · HALF dims from START on, by tables whose rows lie STEP apart."""

    cos: Any
    sin: Any
    FORM: Any
    START: Any
    HALF: Any
    STEP: Any


NOT_ROTATED = Rotation(None, None, "", 0, 0, 0)


# ---- rope_tables: cos and sin of positions · inv_freq


@triton.jit
def tables_kernel(
    positions,
    inv_freq,
    cos,
    sin,
    HALF: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """A program a token: a row of HALF angles, each rounded to the float that frequencies have."""
    pdl_wait(PROGRAMMATIC)
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < HALF
    frequency = tl.load(inv_freq + at, mask=inside, other=0.0)
    if inv_freq.dtype.element_ty != tl.float64:
        frequency = frequency.to(tl.float32)
    angle = tl.load(positions + row).to(frequency.dtype) * frequency
    c, s = cos_and_sin(angle)
    to = row.to(tl.int64) * HALF + at
    tl.store(cos + to, (c * SCALE).to(cos.dtype.element_ty), mask=inside)
    tl.store(sin + to, (s * SCALE).to(sin.dtype.element_ty), mask=inside)


def rope_tables(query: KernelQuery) -> Candidate | Declined:
    """rope_tables(positions, inv_freq)."""
    positions, inv_freq = query.args
    if not positions.dense or not inv_freq.dense or query.attrs["dtype"] not in _FLOATS:
        return Declined(
            f"expected dense operands and tables of {', '.join(_FLOATS)}; found {positions.type}, "
            f"{inv_freq.type} and {query.attrs['dtype']}"
        )
    if not positions.shape[0]:
        return Candidate((), 0.0, "no tokens")
    half = inv_freq.shape[0]
    call = Call(
        tables_kernel,
        {
            "positions": Arg(0),
            "inv_freq": Arg(1),
            "cos": Result(0),
            "sin": Result(1),
            "HALF": half,
            "SCALE": float(query.attrs["scale"]),
            "BLOCK": triton.next_power_of_2(half),
        },
        (positions.shape[0], 1, 1),
        (Result(0), Result(1)),
        num_warps=1,
    )
    return Candidate((call,), query.seconds(1), "a program a token")


# ---- rope


@triton.jit
def rope_kernel(
    x,
    rotation,
    out,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    X_STEP: tl.constexpr,
    HEAD_STEP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """A program rotates BLOCK_H of the HEADS heads of a token, SIZE elements each.

    Pair i is read, and written, at (i, i + HALF) or at (2i, 2i + 1), by the form. What is not
    rotated, REST or fewer elements, is copied.
    """
    pdl_wait(PROGRAMMATIC)
    HALF: tl.constexpr = rotation.HALF
    START: tl.constexpr = rotation.START
    READ_APART: tl.constexpr = HALF if rotation.FORM == "half" else 1
    WRITTEN_APART: tl.constexpr = 1 if rotation.FORM == "interleaved" else HALF
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (i < HALF)
    x += token * X_STEP + head * HEAD_STEP
    out += (token * HEADS + head) * SIZE
    first = i if READ_APART != 1 else 2 * i
    a = tl.load(x + START + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + START + first + READ_APART, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(rotation.cos + token * rotation.STEP + i, mask=i < HALF, other=0.0).to(tl.float32)
    s = tl.load(rotation.sin + token * rotation.STEP + i, mask=i < HALF, other=0.0).to(tl.float32)
    first = i if WRITTEN_APART != 1 else 2 * i
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(out + START + first, (a * c - b * s).to(kind), mask=inside)
    tl.store(out + START + first + WRITTEN_APART, (b * c + a * s).to(kind), mask=inside)
    if REST > 0:
        j = tl.arange(0, REST)[None, :]
        j = tl.where(j < START, j, j + 2 * HALF)
        kept = (head < HEADS) & (j < SIZE)
        tl.store(out + j, tl.load(x + j, mask=kept), mask=kept)


def _heads(x: Operand) -> tuple[int, int, int] | None:
    """Heads a token, and the steps from token to token and head to head, of x [T, ..., D]; None
    where the dims between do not lie in one step, or a head is not dense."""
    if x.packed or x.value is not None or (x.shape[-1] > 1 and x.strides[-1] != 1):
        return None
    step = even_step(x.shape[1:-1], x.strides[1:-1])
    if step is None:
        return None
    heads = prod(x.shape[1:-1])
    return heads, x.strides[0], step if heads != 1 else x.shape[-1]


def rope(query: KernelQuery) -> Candidate | Declined:
    """rope(x, cos, sin)."""
    x, cos, sin = query.args
    lies = _heads(x)
    tables = cos.strides[1:] == (1,) and cos.strides == sin.strides
    if lies is None or not tables:
        return Declined(f"heads of x {x.type} or rows of tables {cos.type} do not lie in one step")
    if odd := not_floats(query.args):
        return odd
    heads, step, head_step = lies
    if not x.shape[0] * heads:
        return Candidate((), 0.0, "no heads")
    size, half = x.shape[-1], cos.shape[1]
    form, start = query.attrs["form"], query.attrs.get("start", 0)
    block = triton.next_power_of_2(half)
    rest = size - 2 * half
    tile = max(1, _TILE // (2 * block + rest))
    block_h = min(triton.next_power_of_2(heads), 1 << (tile.bit_length() - 1))
    call = Call(
        rope_kernel,
        {
            "x": Arg(0),
            "rotation": Rotation(Arg(1), Arg(2), form, start, half, cos.strides[0]),
            "out": Result(0),
            "HEADS": heads,
            "SIZE": size,
            "X_STEP": step,
            "HEAD_STEP": head_step,
            "BLOCK_H": block_h,
            "BLOCK": block,
            "REST": triton.next_power_of_2(rest) if rest else 0,
        },
        (x.shape[0], -(-heads // block_h), 1),
        (Result(0),),
        num_warps=4 if block_h * block >= 512 else 2,
    )
    return Candidate((call,), query.seconds(1), "a program a token's heads")


TEMPLATES = {"rope": (rope,), "rope_tables": (rope_tables,)}
