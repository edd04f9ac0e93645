"""Launches of the attention kernels: how rows are blocked, contexts split, and slots shared out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton

from ....compiler.dtypes import DTYPES
from ....compiler.types import TensorType
from ...kernel_query import Call, Candidate, KernelQuery, Ref, Result, Temp
from ...prices import LAUNCH_SECONDS
from .attend import attend_kernel, combine_kernel, splits_of

# Up to so many tokens contexts are split and rows go in blocks of 16, so that every bucket of
# decoding sums alike; above, and where the splits' sums take more memory, blocks fill the device.
_FEW_TOKENS = 64
_SPLIT_BYTES = 256 << 20
_FEW_ROWS = 16
# Programs that keep every multiprocessor of the largest device busy; more would mostly be of slots
# and splits that a batch has not, and would leave again after a microsecond or two.
_PROGRAMS = 512
# Splits double their length after every so many; see attend.split_start.
_STEADY = 32
# Products want at least so many of each dim.
_LEAST = 16


@dataclass(frozen=True)
class Query:
    """Part of the queries: `ref`, strides in elements of tokens and heads, and where it begins."""

    ref: Ref
    token: int
    head: int
    skip: int = 0


@dataclass(frozen=True)
class Rows:
    """Keys or values: `ref`, strides in elements of rows and heads."""

    ref: Ref
    row: int
    head: int


@dataclass(frozen=True)
class Pages:
    """A paged cache's index: memory, and `slots` slots of `per_slot` pages of `size` rows."""

    slots_ref: Ref
    positions_ref: Ref
    table_ref: Ref
    slots: int
    per_slot: int
    size: int


@dataclass(frozen=True)
class Attention:
    """What is attended to: see attend_kernel. `rest` is None where keys have d dims alone, `values`
    where they are the first d dims of the keys."""

    tokens: int
    heads: int
    kv_heads: int
    d: int
    d_rest: int
    v: int
    dtype: str
    query: Query
    rest: Query | None
    keys: Rows
    values: Rows | None
    context: int
    scale: float
    pages: Pages | None = None
    sinks: Ref | None = None
    window: int = 0
    softcap: float = 0.0
    causal: bool = True

    @property
    def group(self) -> int:
        """Query heads a key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Tile:
    """Sizes of a program: rows, context positions, warps, stages of the pipeline."""

    m: int
    n: int
    warps: int
    stages: int


def plan(job: Attention, query: KernelQuery) -> Candidate:
    """One launch, or two where the context is split."""
    splits = _splits(job)
    tile = _tile(job, query)
    blocks = triton.cdiv(job.tokens * job.group, tile.m)
    slots = _slots(job, tile)
    # A program for every slot that a block may meet, while that does not crowd the device.
    lanes = max(1, min(slots, _PROGRAMS // (blocks * job.kv_heads)))
    parts = max(1, min(splits, _PROGRAMS // (blocks * job.kv_heads * lanes)))
    shape = (job.tokens, job.heads, splits)
    temps = {
        "sums": TensorType("f32", (*shape, job.v)),
        "tops": TensorType("f32", shape),
        "totals": TensorType("f32", shape),
    }
    split = splits > 1
    out = Temp("sums") if split else Result(0)
    pages = job.pages
    given: dict[str, Ref | int | None] = {
        "q": job.query.ref,
        "q_rest": job.rest.ref if job.rest else None,
        "k": job.keys.ref,
        "v": job.values.ref if job.values else None,
        "slots": pages.slots_ref if pages else None,
        "positions": pages.positions_ref if pages else None,
        "page_table": pages.table_ref if pages else None,
        "sinks": None if split else job.sinks,
        "out": out,
        "tops": Temp("tops") if split else None,
        "totals": Temp("totals") if split else None,
        "tokens": job.tokens,
        "context": job.context,
        "lanes": lanes,
    }
    block_splits = triton.next_power_of_2(splits)
    attend = Call(
        attend_kernel,
        {n: a for n, a in given.items() if a is not None},
        (blocks, job.kv_heads * lanes, parts),
        (out, Temp("tops"), Temp("totals")) if split else (out,),
        {
            **{n: None for n, a in given.items() if a is None},
            **_sizes(job),
            "SLOTS": 1 if slots == 1 else tile.m,
            "SPLITS": splits,
            "SPLIT": _split(job),
            "STEADY": _STEADY,
            "BLOCK_SPLITS": block_splits,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
        },
        tile.warps,
        tile.stages,
        overlaps=tile.m <= _FEW_ROWS,
    )
    seconds = _seconds(job, query)
    reason = f"blocks of {tile.m} rows and {tile.n} positions"
    if not split:
        return Candidate((attend,), seconds + LAUNCH_SECONDS, f"{reason}, contexts whole")
    calls = (attend, _combine(job, splits, block_splits))
    reason = f"{reason}, {splits} splits in {parts} parts"
    return Candidate(calls, seconds + 2 * LAUNCH_SECONDS, reason, temps)


def _combine(job: Attention, splits: int, block_splits: int) -> Call:
    assert job.pages
    block = min(128, max(1, 8192 // block_splits), triton.next_power_of_2(job.v))
    args: dict[str, Ref | int] = {
        "sums": Temp("sums"),
        "tops": Temp("tops"),
        "totals": Temp("totals"),
        "slots": job.pages.slots_ref,
        "positions": job.pages.positions_ref,
        "out": Result(0),
    }
    if job.sinks:
        args["sinks"] = job.sinks
    return Call(
        combine_kernel,
        args,
        (job.tokens, job.heads, triton.cdiv(job.v, block)),
        (Result(0),),
        {
            **({} if job.sinks else {"sinks": None}),
            "HEADS": job.heads,
            "V": job.v,
            "WINDOW": job.window,
            "SPLITS": splits,
            "SPLIT": _split(job),
            "STEADY": _STEADY,
            "BLOCK_SPLITS": block_splits,
            "BLOCK_V": block,
        },
    )


def _sizes(job: Attention) -> dict[str, Any]:
    """The constants that the node alone fixes."""
    rest, values, pages = job.rest, job.values, job.pages
    return {
        "HEADS": job.heads,
        "GROUP": job.group,
        "Q_TOKEN": job.query.token,
        "Q_HEAD": job.query.head,
        "Q_REST_TOKEN": rest.token if rest else 0,
        "Q_REST_HEAD": rest.head if rest else 0,
        "Q_REST_SKIP": rest.skip if rest else 0,
        "K_ROW": job.keys.row,
        "K_HEAD": job.keys.head,
        "V_ROW": values.row if values else 0,
        "V_HEAD": values.head if values else 0,
        "D": job.d,
        "D_REST": job.d_rest,
        "V": job.v,
        "BLOCK_D": padded(job.d),
        "BLOCK_REST": padded(job.d_rest),
        "BLOCK_V": padded(job.v),
        "PAGE_SIZE": pages.size if pages else 0,
        "PAGES_PER_SLOT": pages.per_slot if pages else 0,
        "SCALE": job.scale,
        "WINDOW": job.window,
        "SOFTCAP": job.softcap,
        "CAUSAL": job.causal,
    }


def padded(size: int) -> int:
    """The power of two that a dim of `size` takes in a product."""
    return max(_LEAST, triton.next_power_of_2(size))


def _split(job: Attention) -> int:
    """Positions in a first split: the fewer blocks a token has, the shorter."""
    blocks = job.kv_heads * triton.cdiv(job.group, _FEW_ROWS)
    return 128 if blocks >= 8 else 64


def _few(job: Attention) -> bool:
    """Whether blocks are small and contexts split."""
    splits = splits_of(job.context, _split(job), _STEADY)
    small = 4 * job.tokens * job.heads * splits * job.v <= _SPLIT_BYTES
    return job.pages is not None and job.tokens <= _FEW_TOKENS and small


def _splits(job: Attention) -> int:
    """How many splits; 1 where the context stays whole."""
    return splits_of(job.context, _split(job), _STEADY) if _few(job) else 1


def _slots(job: Attention, tile: Tile) -> int:
    """How many slots the rows of a block may be of."""
    if not job.pages:
        return 1
    straddling = tile.m % job.group > 0 and job.group % tile.m > 0
    return min(triton.cdiv(tile.m, job.group) + straddling, job.tokens, job.pages.slots)


def _tile(job: Attention, query: KernelQuery) -> Tile:
    tile = _widest(job, query)
    return replace(tile, n=min(tile.n, job.pages.size)) if job.pages else tile


def _widest(job: Attention, query: KernelQuery) -> Tile:
    """The tile if pages are not smaller: chosen so that nothing spills registers. Stages of the
    pipeline on NVIDIA: one for the page's number, and enough to hold the next tile while one is in
    use. On AMD a lane holds twice as much: more than 64 rows spill masks, which are scalars, and
    with 8 warps, two on each SIMD, there are 256 registers a lane; shared memory is little."""
    nvidia = query.target.name.startswith("cuda")
    rows = job.tokens * job.group
    width = max(padded(job.d), padded(job.v))
    if DTYPES[job.dtype].bits == 32:
        if width <= 128 or not nvidia:
            return Tile(_FEW_ROWS, 32 if width <= 256 else 16, 4, 1)
        return Tile(_FEW_ROWS, 16, 8 if width <= 256 else 16, 1)
    if _few(job) or rows <= _FEW_ROWS:
        if nvidia:
            return Tile(_FEW_ROWS, 64, 8 if width > 256 else 4, 5)
        if width > 256:
            return Tile(_FEW_ROWS, 32, 4, 1)
        # The bounds of a window are scalars that wide tiles leave no registers for.
        return Tile(_FEW_ROWS, 32 if job.window else 64, 4, 2)
    if not nvidia:
        return Tile(32, 32, 4, 1) if width > 128 else Tile(64, 64 if width <= 64 else 32, 8, 1)
    if width > 256:
        return Tile(32, 32, 8, 5)
    m = 128 if rows >= 1024 and width <= 128 else 64
    return Tile(m, 64, 8 if m == 128 or width > 128 else 4, 3)


def _seconds(job: Attention, query: KernelQuery) -> float:
    """Queries and results moved once, and a full context of every sequence that there can be."""
    size = DTYPES[job.dtype].bits // 8
    sequences = min(job.tokens, job.pages.slots) if job.pages else 1
    width = job.kv_heads * (job.d + job.d_rest + (job.v if job.values else 0))
    moved = query.args[0].nbytes + query.results[0].nbytes
    moved += sequences * job.context * width * size
    return moved / query.target.bytes_per_second
