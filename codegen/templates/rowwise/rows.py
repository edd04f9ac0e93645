"""Whole rows: looked up by index, and appended to a paged cache."""

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
    Ref,
    Result,
    dense_strides,
)
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
        {
            "table": Arg(table),
            "index": Arg(index),
            "out": Result(0),
            "rows": x.shape[0],
            "WIDTH": width,
            "STEP": x.strides[0],
            "BLOCK": block,
        },
        (int(chosen.type.numel), triton.cdiv(width, block), 1),
        (Result(0),),
    )
    moved = 2 * query.results[0].nbytes
    seconds = moved / query.target.bytes_per_second + query.target.launch_seconds
    return Candidate((call,), seconds, "a program a row")


def embedding(query: KernelQuery) -> Candidate | Declined:
    """embedding(ids, table)."""
    return _looked_up(query, 1, 0)


def take(query: KernelQuery) -> Candidate | Declined:
    """take(x, rows)."""
    return _looked_up(query, 0, 1)


# ---- kv_append: token t's rows go to place positions[t] of its slot; slot -1 is stored nowhere


class Pages(NamedTuple):
    """A paged cache's index: `slots` and `positions` [T], and `table` [slots, PER_SLOT] of pages of
    SIZE rows."""

    slots: Any
    positions: Any
    table: Any
    PER_SLOT: Any
    SIZE: Any


@triton.jit
def cache_row(pages, token):
    """Which row of a cache [pages · SIZE, ...] a token's is, i64; -1 for padding."""
    slot = tl.load(pages.slots + token)
    position = tl.load(pages.positions + token)
    at = pages.table + slot * pages.PER_SLOT + position // pages.SIZE
    page = tl.load(at, mask=slot >= 0, other=0).to(tl.int64)
    return tl.where(slot >= 0, page * pages.SIZE + position % pages.SIZE, -1)


@triton.jit
def append_kernel(
    cache_0,
    cache_1,
    rows_0,
    rows_1,
    pages,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Rows of WIDTH elements, STEP elements apart; a page of `pages` holds them dense.

    One or two caches, by program_id(2); WIDTH and STEP have a value a cache.
    """
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0)
    to = cache_row(pages, token)
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
    seconds = moved / query.target.bytes_per_second + len(calls) * query.target.launch_seconds
    return Candidate(tuple(calls), seconds, "a program a token")


def _append_call(query: KernelQuery, count: int, caches: range) -> Call:
    """The launch that appends to one or two of `count` caches."""
    rows = [query.args[count + i] for i in caches]
    widths = [prod(r.shape[1:]) for r in rows]
    index = (Arg(2 * count + i) for i in range(3))
    args: dict[str, Any] = {
        "pages": Pages(*index, query.args[-1].shape[1], query.results[0].shape[1]),
        "WIDTH": tuple(widths),
        "STEP": tuple(r.strides[0] for r in rows),
        "BLOCK": min(_BLOCK, triton.next_power_of_2(max(widths))),
    }
    for place in range(2):
        at = caches[place] if place < len(caches) else None
        args[f"cache_{place}"] = None if at is None else Result(at)
        args[f"rows_{place}"] = None if at is None else Arg(count + at)
    grid = (rows[0].shape[0], triton.cdiv(max(widths), args["BLOCK"]), len(caches))
    return Call(append_kernel, args, grid, tuple(Result(i) for i in caches))


def append_pages(query: KernelQuery) -> Pages | None:
    """The index of the caches that a node's launches append to; None where there is no append."""
    append = query.append
    if append is None:
        return None
    cache = query.results[min(append.caches.values())]
    per_slot = query.args[append.page_table.index].shape[1]
    return Pages(append.slots, append.positions, append.page_table, per_slot, cache.shape[1])


def append_refs(query: KernelQuery, result: int) -> tuple[Ref | None, Ref | None]:
    """Where a result of a node goes: memory of its own, and its cache; None: not there."""
    append = query.append
    if append is None:
        return Result(result), None
    cache = append.caches.get(result)
    own = Result(result) if result in append.kept else None
    return own, None if cache is None else Result(cache)


TEMPLATES = {"embedding": (embedding,), "take": (take,), "kv_append": (kv_append,)}
