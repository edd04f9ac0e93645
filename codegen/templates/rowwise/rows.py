"""Whole rows: looked up by index, and appended to a paged cache."""

from __future__ import annotations

from math import prod
from typing import Any

import triton
import triton.language as tl

from ...kernel_query import (
    Arg,
    Call,
    Candidate,
    Declined,
    KernelQuery,
    Operand,
    Ref,
    Result,
    dense_strides,
)
from ...prices import LAUNCH_SECONDS
from ..pdl import pdl_wait

_BLOCK = 1024


def _dense_rows(x: Operand) -> bool:
    return x.packed is None and x.strides[1:] == dense_strides(x.shape[1:])


# ---- embedding and take: result[i] = table[index[i]]


@triton.jit
def take_kernel(
    table,
    index,
    out,
    rows,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Rows of WIDTH elements, STEP elements apart in the table of `rows` rows. An index outside it,
    which no caller gives, reads row 0."""
    pdl_wait(PROGRAMMATIC)
    place = tl.program_id(0)
    row = tl.load(index + place).to(tl.int64)
    row = tl.where((row >= 0) & (row < rows), row, 0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(table + row * STEP + at, mask=at < WIDTH)
    tl.store(out + place.to(tl.int64) * WIDTH + at, value, mask=at < WIDTH)


def _looked_up(query: KernelQuery, table: int, index: int) -> Candidate | Declined:
    x, chosen = query.args[table], query.args[index]
    if not _dense_rows(x) or not chosen.dense:
        return Declined(f"rows of {x.type} or indices {chosen.type} are not dense")
    width = prod(x.shape[1:])
    block = min(_BLOCK, triton.next_power_of_2(width))
    call = Call(
        take_kernel,
        {"table": Arg(table), "index": Arg(index), "out": Result(0), "rows": x.shape[0]},
        (int(chosen.type.numel), triton.cdiv(width, block), 1),
        (Result(0),),
        {"WIDTH": width, "STEP": x.strides[0], "BLOCK": block},
    )
    moved = 2 * query.results[0].nbytes
    seconds = moved / query.target.bytes_per_second + LAUNCH_SECONDS
    return Candidate((call,), seconds, "a program a row")


def embedding(query: KernelQuery) -> Candidate | Declined:
    """embedding(ids, table)."""
    return _looked_up(query, 1, 0)


def take(query: KernelQuery) -> Candidate | Declined:
    """take(x, rows)."""
    return _looked_up(query, 0, 1)


# ---- kv_append: token t's rows go to place positions[t] of its slot; slot -1 is stored nowhere


@triton.jit
def cache_row(
    slots,
    positions,
    page_table,
    token,
    PAGES_PER_SLOT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Which row of a cache [pages · PAGE_SIZE, ...] a token's is, i64; -1 for padding."""
    slot = tl.load(slots + token)
    position = tl.load(positions + token)
    at = page_table + slot * PAGES_PER_SLOT + position // PAGE_SIZE
    page = tl.load(at, mask=slot >= 0, other=0).to(tl.int64)
    return tl.where(slot >= 0, page * PAGE_SIZE + position % PAGE_SIZE, -1)


@triton.jit
def append_kernel(
    cache_0,
    cache_1,
    rows_0,
    rows_1,
    slots,
    positions,
    page_table,
    PAGES_PER_SLOT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Rows of WIDTH elements, STEP elements apart; a page holds PAGE_SIZE of them, dense.

    One or two caches, by program_id(2); WIDTH and STEP have a value a cache.
    """
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0)
    to = cache_row(slots, positions, page_table, token, PAGES_PER_SLOT, PAGE_SIZE)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if to >= 0:
        row = token.to(tl.int64)
        if tl.program_id(2) == 0:
            value = tl.load(rows_0 + row * STEP[0] + at, mask=at < WIDTH[0])
            tl.store(cache_0 + to * WIDTH[0] + at, value, mask=at < WIDTH[0])
        elif cache_1 is not None:
            value = tl.load(rows_1 + row * STEP[1] + at, mask=at < WIDTH[1])
            tl.store(cache_1 + to * WIDTH[1] + at, value, mask=at < WIDTH[1])


def kv_append(query: KernelQuery) -> Candidate | Declined:
    """kv_append(caches..., rows..., slots, positions, page_table), in place."""
    count = len(query.results)
    table = query.args[-1]
    for cache, rows in zip(query.results, query.args[count : 2 * count], strict=True):
        if not _dense_rows(rows) or not cache.dense or not table.dense:
            return Declined(f"rows {rows.type} or cache {cache.type} are not dense")
    calls = [_append_call(query, count, range(i, min(i + 2, count))) for i in range(0, count, 2)]
    moved = 2 * sum(a.nbytes for a in query.args[count : 2 * count])
    seconds = moved / query.target.bytes_per_second + len(calls) * LAUNCH_SECONDS
    return Candidate(tuple(calls), seconds, "a program a token")


def _append_call(query: KernelQuery, count: int, caches: range) -> Call:
    """The launch that appends to one or two of `count` caches."""
    rows = [query.args[count + i] for i in caches]
    widths = [prod(r.shape[1:]) for r in rows]
    index = {"slots": 2 * count, "positions": 2 * count + 1, "page_table": 2 * count + 2}
    args = {name: Arg(at) for name, at in index.items()}
    constants: dict[str, object] = {}
    for place in range(2):
        there = place < len(caches)
        for name, ref in (("cache", Result), ("rows", Arg)):
            if not there:
                constants[f"{name}_{place}"] = None
                continue
            at = caches[place]
            args[f"{name}_{place}"] = ref(at) if name == "cache" else ref(count + at)
    block = min(_BLOCK, triton.next_power_of_2(max(widths)))
    constants |= {
        "PAGES_PER_SLOT": query.args[-1].shape[1],
        "PAGE_SIZE": query.results[0].shape[1],
        "WIDTH": tuple(widths),
        "STEP": tuple(r.strides[0] for r in rows),
        "BLOCK": block,
    }
    grid = (rows[0].shape[0], triton.cdiv(max(widths), block), len(caches))
    return Call(append_kernel, args, grid, tuple(Result(i) for i in caches), constants)


def append_operands(query: KernelQuery) -> tuple[dict[str, Ref], dict[str, Any]]:
    """What a kernel that writes into the caches of `query.append` needs to find a token's row:
    operands by name, and constants."""
    names, sizes = ("slots", "positions", "page_table"), ("PAGES_PER_SLOT", "PAGE_SIZE")
    append = query.append
    if append is None:
        return {}, {**dict.fromkeys(names), **dict.fromkeys(sizes, 0)}
    cache = query.results[min(append.caches.values())]
    pages = query.args[append.page_table.index].shape[1]
    args: dict[str, Ref] = dict(
        zip(names, (append.slots, append.positions, append.page_table), strict=True)
    )
    return args, dict(zip(sizes, (pages, cache.shape[1]), strict=True))


def append_refs(query: KernelQuery, result: int) -> tuple[Ref | None, Ref | None]:
    """Where a result of a node goes: memory of its own, and its cache; None: not there."""
    append = query.append
    if append is None:
        return Result(result), None
    cache = append.caches.get(result)
    own = Result(result) if result in append.kept else None
    return own, None if cache is None else Result(cache)


TEMPLATES = {"embedding": (embedding,), "take": (take,), "kv_append": (kv_append,)}
