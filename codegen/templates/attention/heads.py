"""Attention heads: the product in f32, then bias, norms and rotation of each part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....compiler.types import TensorType
from ...kernel_query import Call, Candidate, Declined, KernelQuery, Temp
from ..gemm.epilogue import epilogue_of
from ..gemm.linear import normed_products
from ..pdl import pdl_wait, spread
from ..rowwise.rows import append_pages, append_refs, cache_row
from .rope import Rotation


class HeadPart(NamedTuple):
    """HEADS heads of D dims, columns FIRST and on of the product, which BLOCKS programs compute.

    They go to `out`, to the token's row of `cache`, or to both. They are normed by `norm` where it
    is given, and rotated where TURNED. BLOCK_D and BLOCK_HEADS are a program's.
    """

    norm: Any
    out: Any
    cache: Any
    BLOCKS: Any
    HEADS: Any
    D: Any
    FIRST: Any
    TURNED: Any
    BLOCK_D: Any
    BLOCK_HEADS: Any


class Product(NamedTuple):
    """y f32 [T, N], to which `bias` [N] is added. Norms with EPS are of a head, a rotated head or a
    part: NORM_OF."""

    y: Any
    bias: Any
    N: Any
    NORM_OF: Any
    EPS: Any


@triton.jit
def heads_kernel(product, part_0, part_1, part_2, rotation, pages, PROGRAMMATIC: tl.constexpr):
    """Up to three HeadParts of one token; program_id(1) counts through the blocks of one after the
    other, and then through programs that do nothing."""
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    row = token
    if pages is not None:
        row = cache_row(pages, token)
    block = tl.program_id(1)
    if block < part_0.BLOCKS:
        _part(product, part_0, rotation, row, token, block)
    elif block < part_0.BLOCKS + part_1.BLOCKS:
        if part_1.BLOCKS > 0:
            block -= part_0.BLOCKS
            _part(product, part_1, rotation, row, token, block)
    else:
        if part_2.BLOCKS > 0:
            block = block - part_0.BLOCKS - part_1.BLOCKS
            _part(product, part_2, rotation, row, token, block)


@triton.jit
def _part(product, part, rotation, row, token, block):
    """A block of heads of a HeadPart."""
    HEADS: tl.constexpr = part.HEADS
    D: tl.constexpr = part.D
    OF_PART: tl.constexpr = part.norm is not None and product.NORM_OF == "part"
    heads = block * part.BLOCK_HEADS + tl.arange(0, part.BLOCK_HEADS)
    d = tl.arange(0, part.BLOCK_D)
    scale = None
    if OF_PART:
        total = tl.zeros((), tl.float32)
        for first in range(0, HEADS * D, part.BLOCK_D):
            at = first + d
            ok = at < HEADS * D
            value = _values(product, part, token, at, ok)
            total += tl.sum(value * value, 0)
        scale = tl.rsqrt(total / (HEADS * D) + product.EPS)
    value = head_rows(product, part, rotation, token, heads, heads < HEADS, scale)
    inside = (heads < HEADS)[:, None] & (d < D)[None, :]
    at = heads[:, None] * D + d[None, :]
    if part.out is not None:
        to = part.out + token * (HEADS * D) + at
        tl.store(to, value.to(part.out.dtype.element_ty), mask=inside)
    if part.cache is not None:
        to = part.cache + row * (HEADS * D) + at
        tl.store(to, value.to(part.cache.dtype.element_ty), mask=inside & (row >= 0))


@triton.jit
def head_rows(product, part, rotation, token, heads, mine, scale):
    """[M, BLOCK_D] f32: the `heads` [M] of a HeadPart that are `mine` [M], normed and rotated; 0
    beyond D dims. `token` (i64) is that of all, or [M, 1] that of each; `scale` is that of a norm
    of the part (or None)."""
    read = read_heads(product, part, rotation, token, heads, mine)
    return finish_heads(product, part, rotation, read, scale)


@triton.jit
def _pairs(part, rotation):
    """Of dims d [1, BLOCK_D]: d, where d's own value and its partner's are read, the number of the
    pair, whether d is the second of it, and whether it is rotated. A pair is (a, b)."""
    START: tl.constexpr = rotation.START
    HALF: tl.constexpr = rotation.HALF
    FORM: tl.constexpr = rotation.FORM
    d = tl.arange(0, part.BLOCK_D)[None, :]
    place = d - START
    turned = (place >= 0) & (place < 2 * HALF) & (part.TURNED != 0)
    if not part.TURNED:
        pair = place * 0
        is_b = place < 0
        own = d
        other = d
    elif FORM == "half":
        pair = place % HALF
        is_b = place >= HALF
        own = d
        other = tl.where(turned, tl.where(is_b, d - HALF, d + HALF), d)
    elif FORM == "interleaved":
        pair = place // 2
        is_b = place % 2 == 1
        own = d
        other = tl.where(turned, tl.where(is_b, d - 1, d + 1), d)
    else:
        pair = place % HALF
        is_b = place >= HALF
        own = tl.where(turned, START + 2 * pair + is_b.to(tl.int32), d)
        other = tl.where(turned, START + 2 * pair + 1 - is_b.to(tl.int32), d)
    return d, own, other, pair, is_b, turned


@triton.jit
def read_heads(product, part, rotation, token, heads, mine):
    """All that head_rows reads, for finish_heads; one in another's place where it reads less.

    Tiles are [M, BLOCK_D] throughout: a row that all have, a norm's, would be brought into the
    layout of the others through shared memory, behind a barrier that waits for it.
    """
    D: tl.constexpr = part.D
    NORM_OF: tl.constexpr = product.NORM_OF
    NORMED: tl.constexpr = part.norm is not None
    d, own, other, pair, _, turned = _pairs(part, rotation)
    inside = mine[:, None] & (d < D)
    at_own = heads[:, None] * D + own
    at_other = heads[:, None] * D + other
    value = _values(product, part, token, at_own, inside)
    partner = value
    plain = value
    gain = value
    other_gain = value
    c = value
    s = value
    if part.TURNED:
        partner = _values(product, part, token, at_other, inside)
        table = token * rotation.STEP + pair
        c = tl.load(rotation.cos + table, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(rotation.sin + table, mask=turned, other=0.0).to(tl.float32)
        if NORMED and NORM_OF == "head" and rotation.FORM == "deinterleaved":
            plain = _values(product, part, token, heads[:, None] * D + d, inside)
    if NORMED:
        row = heads[:, None] * (D if NORM_OF == "part" else 0)
        at = row + (d if NORM_OF == "rotated head" else own)
        gain = tl.load(part.norm + at, mask=inside, other=0.0).to(tl.float32)
        if part.TURNED and NORM_OF != "rotated head":
            other_gain = tl.load(part.norm + row + other, mask=inside, other=0.0).to(tl.float32)
    return value, partner, plain, gain, other_gain, c, s


@triton.jit
def finish_heads(product, part, rotation, read, scale):
    """What head_rows gives, of what read_heads does.

    A norm sums the dims of a head in an order that BLOCK_D alone decides, where M · BLOCK_D are at
    least THREAD_ELEMENTS a thread.
    """
    D: tl.constexpr = part.D
    NORM_OF: tl.constexpr = product.NORM_OF
    EPS: tl.constexpr = product.EPS
    NORMED: tl.constexpr = part.norm is not None
    value, partner, plain, gain, other_gain, c, s = read
    _, _, _, _, is_b, _ = _pairs(part, rotation)
    if NORMED and NORM_OF == "part":
        value *= gain
        partner *= other_gain
        value *= scale
        partner *= scale
    if NORMED and NORM_OF == "head":
        # The sum over a head is the same in whatever order its dims are read.
        scales = tl.rsqrt(tl.sum(plain * plain, 1) / D + EPS)[:, None]
        value *= scales * gain
        partner *= scales * other_gain
    if part.TURNED:
        # (a, b) becomes (a·cos - b·sin, b·cos + a·sin).
        value = value * c + tl.where(is_b, 1.0, -1.0) * partner * s
    if NORMED and NORM_OF == "rotated head":
        scales = tl.rsqrt(tl.sum(value * value, 1) / D + EPS)[:, None]
        value *= scales * gain
    return value


@triton.jit
def _values(product, part, token, at, inside):
    """The elements `at` of a token's part of the product, with bias; 0 outside."""
    column = part.FIRST + at
    value = tl.load(product.y + token * product.N + column, mask=inside, other=0.0)
    if product.bias is not None:
        value += tl.load(product.bias + column, mask=inside, other=0.0).to(tl.float32)
    return value


# What one launch of heads_kernel takes, and its warps.
_PARTS, _WARPS = 3, 4
# Dims that a thread adds up by itself: the 16 bytes of f16 or bf16 that it loads or stores at once.
THREAD_ELEMENTS = 8


def project_heads(query: KernelQuery) -> Iterator[Candidate | Declined]:
    """project_heads: the product unrounded into scratch, then a launch for every three parts."""
    parts = range(len(query.attrs["heads"]))
    rest = tuple(_parts_call(query, parts[i : i + _PARTS]) for i in parts[::_PARTS])
    into = ", written into the cache" if query.append else ""
    reason = f"the product in f32{{note}}; then norms and rotation of all heads{into}"
    for found in products(query, reason):
        if isinstance(found, Declined):
            yield found
            continue
        seconds = found.seconds + len(rest) * query.target.launch_seconds
        yield replace(found, calls=(*found.calls, *rest), seconds=seconds)


def products(query: KernelQuery, reason: str) -> Iterator[Candidate | Declined]:
    """Ways to make the product f32 [T, N] in the scratch `y`, with what it takes to write and read
    that."""
    tokens, n = query.args[0].shape[0], query.args[1].shape[0]
    epilogue = epilogue_of(query, Temp("y"), n)
    more = 8 * tokens * n / query.target.bytes_per_second
    sum_result = len(query.attrs["heads"])
    for found in normed_products(query, epilogue, sum_result=sum_result, reason=reason):
        if isinstance(found, Declined):
            yield found
            continue
        temps = {**found.temps, "y": TensorType("f32", (tokens, n))}
        yield replace(found, seconds=found.seconds + more, temps=temps)


def product_of(query: KernelQuery) -> Product:
    """The product in the scratch `y`."""
    attrs = query.attrs
    eps = attrs.get("head_eps") or 0.0
    n = query.args[1].shape[0]
    return Product(Temp("y"), query.ref("bias"), n, attrs.get("norm_of", "head"), eps)


def rotation_of(query: KernelQuery) -> Rotation:
    attrs = query.attrs
    table = query.operand("cos") if any(attrs.get("rotate") or ()) else None
    return Rotation(
        query.ref("cos"),
        query.ref("sin"),
        attrs.get("form", ""),
        attrs.get("start", 0),
        table.shape[1] if table else 0,
        table.strides[0] if table else 0,
    )


def _parts_call(query: KernelQuery, parts: range) -> Call:
    """The launch for parts of the product [T, N], at most _PARTS."""
    held = [head_part(query, part) for part in parts]
    empty = HeadPart(None, None, None, 0, 1, 1, 0, False, 1, 1)
    args = {f"part_{i}": p for i, p in enumerate((*held, *(empty,) * (_PARTS - len(held))))}
    tokens, blocks = query.args[0].shape[0], sum(p.BLOCKS for p in held)
    programs, resident = spread(query.target, tokens * blocks)
    return Call(
        heads_kernel,
        {
            "product": product_of(query),
            **args,
            "rotation": rotation_of(query),
            "pages": append_pages(query),
        },
        (tokens, programs // tokens, 1),
        tuple(ref for p in held for ref in (p.out, p.cache) if ref is not None),
        num_warps=_WARPS,
        resident=resident,
    )


def head_part(query: KernelQuery, part: int) -> HeadPart:
    attrs = query.attrs
    heads, size = attrs["heads"][part], attrs["dims"][part]
    out, cache = append_refs(query, part)
    block_d = triton.next_power_of_2(size)
    # As many rows for few heads as for many: so norms add up alike, see head_rows.
    block_heads = max(1, THREAD_ELEMENTS * _WARPS * query.target.warp // block_d)
    widths = [h * d for h, d in zip(attrs["heads"], attrs["dims"], strict=True)]
    return HeadPart(
        query.ref(f"norm_{part}"),
        out,
        cache,
        triton.cdiv(heads, block_heads),
        heads,
        size,
        sum(widths[:part]),
        bool((attrs.get("rotate") or (False,) * len(widths))[part]),
        block_d,
        block_heads,
    )


TEMPLATES = {"project_heads": (project_heads,)}
# Operands that are read in packed form.
PACKED_WEIGHTS = {"project_heads": ("weight",)}
