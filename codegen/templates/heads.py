"""Attention heads: the product in f32, then bias, norms and rotation of each part."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...compiler.types import TensorType
from ..request import Arg, Call, Chosen, Declined, Request, Result, Temp
from .linear import product_call
from .prologue import normed_input


@triton.jit
def heads_kernel(
    y,
    bias,
    norm,
    cos,
    sin,
    out,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    NORM_OF: tl.constexpr,
    EPS: tl.constexpr,
    FORM: tl.constexpr,
    START: tl.constexpr,
    HALF: tl.constexpr,
    TABLE_STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """One part of one token: its HEADS heads of D from y f32 [T, N], columns FIRST and on."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_D)
    inside = (heads < HEADS)[:, None] & (d < D)[None, :]
    # Where dim d's own value and its partner's are read: a turned pair is (a, b).
    place = d - START
    turned = (place >= 0) & (place < 2 * HALF) & (FORM != "")
    if FORM == "half":
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
        pair = place % (HALF if HALF > 0 else 1)
        is_b = place >= HALF
        mine = START + 2 * pair + is_b.to(tl.int32)
        other = START + 2 * pair + 1 - is_b.to(tl.int32)
    mine = tl.where(turned, mine, d)
    other = tl.where(turned, other, d)
    if NORM_OF == "part":
        total = tl.zeros((), tl.float32)
        for first in range(0, HEADS * D, BLOCK_D):
            at = first + d
            ok = at < HEADS * D
            value = tl.load(y + token * N + FIRST + at, mask=ok, other=0.0)
            if bias is not None:
                value += tl.load(bias + FIRST + at, mask=ok, other=0.0).to(tl.float32)
            total += tl.sum(value * value, 0)
        scale = tl.rsqrt(total / (HEADS * D) + EPS)
    value = _head_values(y, bias, norm, token, heads, mine, inside, D, N, FIRST, NORM_OF == "part")
    partner = _head_values(
        y, bias, norm, token, heads, other, inside, D, N, FIRST, NORM_OF == "part"
    )
    if NORM_OF == "part":
        value *= scale
        partner *= scale
    if NORM_OF == "head":
        # The sum over a head is the same in whatever order its dims are read.
        plain = _head_values(y, bias, None, token, heads, d, inside, D, N, FIRST, False)
        scales = tl.rsqrt(tl.sum(plain * plain, 1) / D + EPS)[:, None]
        value *= scales * tl.load(norm + mine, mask=d < D, other=0.0).to(tl.float32)[None, :]
        partner *= scales * tl.load(norm + other, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if FORM != "":
        table = token * TABLE_STEP + pair
        c = tl.load(cos + table, mask=turned, other=1.0).to(tl.float32)[None, :]
        s = tl.load(sin + table, mask=turned, other=0.0).to(tl.float32)[None, :]
        # (a, b) becomes (a·cos - b·sin, b·cos + a·sin).
        value = value * c + tl.where(is_b, 1.0, -1.0)[None, :] * partner * s
    if NORM_OF == "rotated head":
        scales = tl.rsqrt(tl.sum(value * value, 1) / D + EPS)[:, None]
        value *= scales * tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    to = out + token * (HEADS * D) + heads[:, None] * D + d[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=inside)


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


def project_heads(request: Request) -> Chosen | Declined:
    """project_heads: the product unrounded into scratch, then a launch for each part."""
    named, attrs = request.named(2), request.attrs
    heads, dims = attrs["heads"], attrs["dims"]
    found = normed_input(request, named, Result(len(heads)) if "delta" in named else None)
    if isinstance(found, Declined):
        return found
    calls, x, step, temps = found
    tokens, n = request.args[0].shape[0], request.args[1].shape[0]
    call = product_call(request, x, (step, 0), tokens, 1, Temp("y"), (n, 0))
    if isinstance(call, Declined):
        return call
    calls.append(call)
    first = 0
    for i, (count, size) in enumerate(zip(heads, dims, strict=True)):
        calls.append(_part_call(request, named, i, count, size, first, n))
        first += count * size
    temps = {**temps, "y": TensorType("f32", (tokens, n))}
    reason = f"the product in f32, then a launch for each of {len(heads)} parts"
    return Chosen(tuple(calls), request.seconds(len(calls), 8 * tokens * n), reason, temps)


def _part_call(
    request: Request, named: dict[str, int], part: int, heads: int, size: int, first: int, n: int
) -> Call:
    attrs = request.attrs
    turned = bool(attrs.get("rotate")) and attrs["rotate"][part]
    norm = named.get(f"norm_{part}")
    operands = {
        "bias": named.get("bias"),
        "norm": norm,
        "cos": named["cos"] if turned else None,
        "sin": named["sin"] if turned else None,
    }
    table = request.args[named["cos"]] if turned else None
    block_d = triton.next_power_of_2(size)
    block_heads = max(1, min(triton.next_power_of_2(heads), 1024 // block_d))
    args: dict[str, Any] = {"y": Temp("y"), "out": Result(part)}
    args |= {name: Arg(at) for name, at in operands.items() if at is not None}
    constants: dict[str, Any] = {name: None for name, at in operands.items() if at is None}
    constants |= {
        "HEADS": heads,
        "D": size,
        "N": n,
        "FIRST": first,
        "NORM_OF": attrs.get("norm_of", "head") if norm is not None else "",
        "EPS": attrs.get("head_eps") or 0.0,
        "FORM": attrs["form"] if turned else "",
        "START": attrs.get("start", 0) if turned else 0,
        "HALF": table.shape[1] if table else 0,
        "TABLE_STEP": table.strides[0] if table else 0,
        "BLOCK_D": block_d,
        "BLOCK_HEADS": block_heads,
    }
    grid = (request.args[0].shape[0], triton.cdiv(heads, block_heads), 1)
    return Call(heads_kernel, args, grid, (Result(part),), constants)


TEMPLATES = {"project_heads": (project_heads,)}
