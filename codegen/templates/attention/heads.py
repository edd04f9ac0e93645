"""Attention heads: the product in f32, then bias, norms and rotation of each part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from ....compiler.types import TensorType
from ...kernel_query import Call, Candidate, Declined, KernelQuery, Ref, Temp, present
from ...prices import LAUNCH_SECONDS
from ..gemm.epilogue import epilogue_of
from ..gemm.linear import normed_products
from ..pdl import pdl_wait
from ..rowwise.rows import append_operands, append_refs, cache_row


@triton.jit
def heads_kernel(
    y,
    bias,
    norm_0,
    norm_1,
    norm_2,
    cos,
    sin,
    out_0,
    out_1,
    out_2,
    cache_0,
    cache_1,
    cache_2,
    slots,
    positions,
    page_table,
    N: tl.constexpr,
    NORM_OF: tl.constexpr,
    EPS: tl.constexpr,
    FORM: tl.constexpr,
    START: tl.constexpr,
    HALF: tl.constexpr,
    TABLE_STEP: tl.constexpr,
    PAGES_PER_SLOT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    NORMED: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Up to three parts of one token; BLOCKS of program_id(1) belong to each, one after the other.

    A part goes to `out`, to the token's row of `cache`, or to both. Constants in capitals from
    BLOCKS on have a value a part.
    """
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    row = token
    if slots is not None:
        row = cache_row(slots, positions, page_table, token, PAGES_PER_SLOT, PAGE_SIZE)
    block = tl.program_id(1)
    if block < BLOCKS[0]:
        _part(
            y,
            bias,
            norm_0,
            cos,
            sin,
            out_0,
            cache_0,
            row,
            token,
            block,
            N,
            HEADS[0],
            D[0],
            FIRST[0],
            NORMED[0],
            NORM_OF,
            EPS,
            TURNED[0],
            FORM,
            START,
            HALF,
            TABLE_STEP,
            BLOCK_D[0],
            BLOCK_HEADS[0],
        )
    elif block < BLOCKS[0] + BLOCKS[1]:
        if BLOCKS[1] > 0:
            _part(
                y,
                bias,
                norm_1,
                cos,
                sin,
                out_1,
                cache_1,
                row,
                token,
                block - BLOCKS[0],
                N,
                HEADS[1],
                D[1],
                FIRST[1],
                NORMED[1],
                NORM_OF,
                EPS,
                TURNED[1],
                FORM,
                START,
                HALF,
                TABLE_STEP,
                BLOCK_D[1],
                BLOCK_HEADS[1],
            )
    else:
        if BLOCKS[2] > 0:
            _part(
                y,
                bias,
                norm_2,
                cos,
                sin,
                out_2,
                cache_2,
                row,
                token,
                block - BLOCKS[0] - BLOCKS[1],
                N,
                HEADS[2],
                D[2],
                FIRST[2],
                NORMED[2],
                NORM_OF,
                EPS,
                TURNED[2],
                FORM,
                START,
                HALF,
                TABLE_STEP,
                BLOCK_D[2],
                BLOCK_HEADS[2],
            )


@triton.jit
def _part(
    y,
    bias,
    norm,
    cos,
    sin,
    out,
    cache,
    row,
    token,
    block,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    NORMED: tl.constexpr,
    NORM_OF: tl.constexpr,
    EPS: tl.constexpr,
    TURNED: tl.constexpr,
    FORM: tl.constexpr,
    START: tl.constexpr,
    HALF: tl.constexpr,
    TABLE_STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """A block of the HEADS heads of D of one part, from y f32 [T, N], columns FIRST and on."""
    OF_PART: tl.constexpr = NORMED and NORM_OF == "part"
    heads = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_D)
    inside = (heads < HEADS)[:, None] & (d < D)[None, :]
    # Where dim d's own value and its partner's are read: a turned pair is (a, b).
    place = d - START
    turned = (place >= 0) & (place < 2 * HALF) & (TURNED != 0)
    if not TURNED:
        pair = place * 0
        is_b = place < 0
        mine = d
        other = d
    elif FORM == "half":
        pair = place % HALF
        is_b = place >= HALF
        mine = d
        other = tl.where(is_b, d - HALF, d + HALF)
    elif FORM == "interleaved":
        pair = place // 2
        is_b = place % 2 == 1
        mine = d
        other = tl.where(is_b, d - 1, d + 1)
    else:
        pair = place % HALF
        is_b = place >= HALF
        mine = START + 2 * pair + is_b.to(tl.int32)
        other = START + 2 * pair + 1 - is_b.to(tl.int32)
    mine = tl.where(turned, mine, d)
    other = tl.where(turned, other, d)
    if OF_PART:
        total = tl.zeros((), tl.float32)
        for first in range(0, HEADS * D, BLOCK_D):
            at = first + d
            ok = at < HEADS * D
            value = tl.load(y + token * N + FIRST + at, mask=ok, other=0.0)
            if bias is not None:
                value += tl.load(bias + FIRST + at, mask=ok, other=0.0).to(tl.float32)
            total += tl.sum(value * value, 0)
        scale = tl.rsqrt(total / (HEADS * D) + EPS)
    value = _head_values(y, bias, norm, token, heads, mine, inside, D, N, FIRST, OF_PART)
    partner = _head_values(y, bias, norm, token, heads, other, inside, D, N, FIRST, OF_PART)
    if OF_PART:
        value *= scale
        partner *= scale
    if NORMED and NORM_OF == "head":
        # The sum over a head is the same in whatever order its dims are read.
        plain = _head_values(y, bias, None, token, heads, d, inside, D, N, FIRST, False)
        scales = tl.rsqrt(tl.sum(plain * plain, 1) / D + EPS)[:, None]
        value *= scales * tl.load(norm + mine, mask=d < D, other=0.0).to(tl.float32)[None, :]
        partner *= scales * tl.load(norm + other, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if TURNED:
        table = token * TABLE_STEP + pair
        c = tl.load(cos + table, mask=turned, other=1.0).to(tl.float32)[None, :]
        s = tl.load(sin + table, mask=turned, other=0.0).to(tl.float32)[None, :]
        # (a, b) becomes (a·cos - b·sin, b·cos + a·sin).
        value = value * c + tl.where(is_b, 1.0, -1.0)[None, :] * partner * s
    if NORMED and NORM_OF == "rotated head":
        scales = tl.rsqrt(tl.sum(value * value, 1) / D + EPS)[:, None]
        value *= scales * tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    at = heads[:, None] * D + d[None, :]
    if out is not None:
        to = out + token * (HEADS * D) + at
        tl.store(to, value.to(out.dtype.element_ty), mask=inside)
    if cache is not None:
        to = cache + row * (HEADS * D) + at
        tl.store(to, value.to(cache.dtype.element_ty), mask=inside & (row >= 0))


@triton.jit
def _head_values(
    y,
    bias,
    norm,
    token,
    heads,
    dims,
    inside,
    D: tl.constexpr,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    PART_NORM: tl.constexpr,
):
    """[heads, dims] of y with bias, times the weight of a norm over the whole part."""
    at = heads[:, None] * D + dims[None, :]
    value = tl.load(y + token * N + FIRST + at, mask=inside, other=0.0)
    if bias is not None:
        value += tl.load(bias + FIRST + at, mask=inside, other=0.0).to(tl.float32)
    if PART_NORM:
        value *= tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
    return value


# What one launch of heads_kernel takes.
_PARTS = 3


def project_heads(query: KernelQuery) -> Iterator[Candidate | Declined]:
    """project_heads: the product unrounded into scratch, then a launch for every three parts."""
    tokens, n = query.args[0].shape[0], query.args[1].shape[0]
    parts = range(len(query.attrs["heads"]))
    rest = tuple(_parts_call(query, parts[i : i + _PARTS], n) for i in parts[::_PARTS])
    more = 8 * tokens * n / query.target.bytes_per_second + len(rest) * LAUNCH_SECONDS
    into = ", written into the cache" if query.append else ""
    epilogue = epilogue_of(query, Temp("y"), n)
    for found in normed_products(query, epilogue, sum_result=len(parts)):
        if isinstance(found, Declined):
            yield found
            continue
        _, _, note = found.reason.partition(" weight")
        yield Candidate(
            (*found.calls, *rest),
            found.seconds + more,
            f"the product in f32{note}; then norms and rotation of all heads{into}",
            {**found.temps, "y": TensorType("f32", (tokens, n))},
        )


def _parts_call(query: KernelQuery, parts: range, n: int) -> Call:
    """The launch for parts of the product [T, n], at most _PARTS."""
    attrs = query.attrs
    rotate = attrs.get("rotate") or (False,) * len(attrs["heads"])
    widths = [h * d for h, d in zip(attrs["heads"], attrs["dims"], strict=True)]
    table = query.operand("cos") if any(rotate) else None
    per_part: dict[str, list[Any]] = {
        "BLOCKS": [],
        "HEADS": [],
        "D": [],
        "FIRST": [],
        "NORMED": [],
        "TURNED": [],
        "BLOCK_D": [],
        "BLOCK_HEADS": [],
    }
    operands: dict[str, Ref | None] = {n: query.ref(n) for n in ("bias", "cos", "sin")}
    args: dict[str, Any] = {"y": Temp("y")}
    constants: dict[str, Any] = {}
    stored: list[Ref] = []
    for place in range(_PARTS):
        part = parts[place] if place < len(parts) else None
        norm = None if part is None else query.ref(f"norm_{part}")
        operands[f"norm_{place}"] = norm
        own, cache = (None, None) if part is None else append_refs(query, part)
        for name, ref in ((f"out_{place}", own), (f"cache_{place}", cache)):
            if ref is None:
                constants[name] = None
            else:
                args[name] = ref
                stored.append(ref)
        if part is None:
            values = (0, 1, 1, 0, 0, 0, 1, 1)
        else:
            heads, size = attrs["heads"][part], attrs["dims"][part]
            block_d = triton.next_power_of_2(size)
            block_heads = max(1, min(triton.next_power_of_2(heads), 1024 // block_d))
            values = (
                triton.cdiv(heads, block_heads),
                heads,
                size,
                sum(widths[:part]),
                int(norm is not None),
                int(rotate[part]),
                block_d,
                block_heads,
            )
        for held, value in zip(per_part.values(), values, strict=True):
            held.append(value)
    given, missing = present(operands)
    args |= given
    constants |= missing
    index, pages = append_operands(query)
    args |= index
    constants |= pages
    constants |= {
        "N": n,
        "NORM_OF": attrs.get("norm_of", "head"),
        "EPS": attrs.get("head_eps") or 0.0,
        "FORM": attrs.get("form", ""),
        "START": attrs.get("start", 0),
        "HALF": table.shape[1] if table else 0,
        "TABLE_STEP": table.strides[0] if table else 0,
        **{name: tuple(values) for name, values in per_part.items()},
    }
    grid = (query.args[0].shape[0], sum(per_part["BLOCKS"]), 1)
    return Call(heads_kernel, args, grid, tuple(stored), constants)


TEMPLATES = {"project_heads": (project_heads,)}
