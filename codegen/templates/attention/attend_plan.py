"""Launches of the attention kernels: blocks of rows, parts of contexts, and slots shared out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import triton

from ....compiler.dtypes import DTYPES
from ....compiler.types import TensorType
from ...kernel_query import Call, Candidate, Declined, KernelQuery, Result, Temp
from ...prices import ROUND_TRIP_SECONDS
from ..arrival import arrivals_of
from ..pdl import spread
from ..rowwise.rows import Pages
from .attend import Keys, Query, Variant, attend_kernel
from .decode import decode_kernel
from .parts import Join, Parts, combine_kernel
from .rope import NOT_ROTATED

# Up to so many tokens rows go in blocks of 16 and contexts in parts; above, blocks fill the device.
_FEW_TOKENS = 64
_FEW_ROWS = 16
# Programs that keep every compute unit of AMD's devices busy; more would mostly be of slots and
# parts that a batch has not, and would leave again after a microsecond or two.
_PROGRAMS = 512
# Parts of a context, at most: their sums are written and read again.
_MOST_PARTS = 128
# Numbers of parts that a thread loads at once where it joins them, and parts at most.
_JOINED, _MOST_AT_ONCE = 64, 16
# Positions of a context by which joining is priced: what a step of decoding mostly has.
_SHORT_CONTEXT = 1024
# Products want at least so many of each dim.
_LEAST = 16


@dataclass(frozen=True)
class Attention:
    """What is attended to: see attend_kernel. `rest` is None where keys have the dims of `query`
    alone, `values` where they are the first dims of the keys, `pages` for one sequence."""

    node: KernelQuery
    kv_heads: int
    query: Query
    rest: Query | None
    keys: Keys
    values: Keys | None
    variant: Variant
    pages: Pages | None

    @property
    def tokens(self) -> int:
        return self.node.args[0].shape[0]

    @property
    def heads(self) -> int:
        return self.node.args[0].shape[1]

    @property
    def v(self) -> int:
        """Dims of a value."""
        return (self.values or self.keys).D

    @property
    def group(self) -> int:
        """Query heads a key/value head."""
        return self.heads // self.kv_heads

    @property
    def context(self) -> int:
        """The most positions of a sequence."""
        if self.pages:
            return self.pages.PER_SLOT * self.pages.SIZE
        return self.node.args[self.keys.data.index].shape[0]

    @property
    def sequences(self) -> int:
        """How many there may be: one, or one a slot."""
        table = self.node.operand("page_table")
        return min(self.tokens, table.shape[0]) if table else 1


@dataclass(frozen=True)
class Tile:
    """Sizes of a program: rows, context positions, warps, stages of the pipeline, and how many
    warps walk contexts by themselves (1: all together)."""

    m: int
    n: int
    warps: int
    stages: int
    walks: int = 1


def plan(job: Attention) -> Iterator[Candidate | Declined]:
    """One launch; where contexts are in parts, two, or one whose last programs join the parts."""
    tile = _tile(job)
    blocks = triton.cdiv(job.tokens * job.group, tile.m)
    slots = _slots(job, tile)
    # A program for every slot that a block may meet, while that does not crowd the device.
    most = _most_programs(job)
    lanes = max(1, min(slots, most // (blocks * job.kv_heads)))
    args = {
        "query": job.query,
        "query_rest": job.rest,
        "rotation": NOT_ROTATED,
        "keys": job.keys,
        "values": job.values,
        "pages": job.pages,
        "variant": job.variant,
        "out": Result(0),
        "tokens": job.tokens,
        "lanes": lanes,
        "HEADS": job.heads,
        "GROUP": job.group,
        "SLOTS": 1 if slots == 1 else tile.m,
        "BLOCK_M": tile.m,
    }
    seconds = _seconds(job) + job.node.target.launch_seconds
    reason = f"blocks of {tile.m} rows and {tile.n} positions"
    tiles = triton.cdiv(job.context, tile.n)
    count = max(1, min(most // (blocks * job.kv_heads * lanes), tiles, _MOST_PARTS))
    if _few(job):
        yield from _in_parts(job, tile, count, blocks, args, seconds, reason)
        return
    whole = Call(
        attend_kernel,
        {**args, "context": job.context, "BLOCK_N": tile.n},
        (blocks, job.kv_heads, lanes),
        (Result(0),),
        num_warps=tile.warps,
        num_stages=tile.stages,
        overlaps=tile.m <= _FEW_ROWS,
    )
    yield Candidate((whole,), seconds, f"{reason}, contexts whole")


def _in_parts(
    job: Attention,
    tile: Tile,
    count: int,
    blocks: int,
    given: Mapping[str, Any],
    seconds: float,
    reason: str,
) -> Iterator[Candidate | Declined]:
    """Contexts in `count` parts, joined by a launch of their own or by the last program; one part
    is the result."""
    target = job.node.target
    shape = (job.tokens, job.heads, count)
    temps = {
        "sums": TensorType("f32", (*shape, job.v)),
        "tops": TensorType("f32", shape),
        "totals": TensorType("f32", shape),
    }
    sizes = (job.v, count, tile.n, triton.next_power_of_2(count))
    groups = blocks * job.kv_heads * given["lanes"]
    programs, resident = spread(target, groups * count)
    made = {"heads": None, "latent": None, "MAKES": "", "arrivals": None, "join": None}
    made |= {"parts": Parts(None, None, None, *sizes), "blocks": blocks}
    whole = Call(
        decode_kernel,
        {**given, **made, "WALKS": tile.walks, "AHEAD": _known(job.node)},
        (programs, 1, 1),
        (Result(0),),
        num_warps=tile.warps,
        num_stages=tile.stages,
        resident=resident,
    )
    if count == 1:
        yield Candidate((whole,), seconds, f"{reason}, contexts whole")
        return
    parts = Parts(*map(Temp, temps), *sizes)
    # The sinks of a context in parts come where the parts are joined.
    alone = {"out": None, "variant": job.variant._replace(sinks=None), "parts": parts}
    attend = replace(whole, args={**whole.args, **alone}, writes=tuple(map(Temp, temps)))
    v = min(128, triton.next_power_of_2(job.v))
    by_row = Join(1, v, min(_MOST_AT_ONCE, parts.BLOCK))
    combine = _combine(job, parts, by_row)
    reason = f"{reason}, {count} parts"
    # First a small launch waits for its index.
    small = target.launch_seconds + ROUND_TRIP_SECONDS + _joining(job, parts, by_row, 1)
    yield Candidate((attend, combine), seconds + small, reason, temps)
    if why := _not_joined(job, given["SLOTS"]):
        yield Declined(f"parts joined by the last program: {why}")
        return
    rows = min(tile.m, triton.next_power_of_2(job.tokens * job.group))
    fit = max(1, _JOINED * tile.warps * target.warp // (rows * v))
    most = min(by_row.AT_ONCE, 8) if target.name.startswith("hip") else by_row.AT_ONCE
    join = Join(rows, v, min(fit, most))
    folded = {
        "out": Result(0),
        "variant": job.variant,
        "arrivals": arrivals_of(target, "arrived"),
        "join": join,
    }
    once = replace(attend, args={**attend.args, **folded}, writes=(Result(0), *attend.writes))
    last = target.arrival_seconds + _joining(job, parts, join, triton.cdiv(job.v, v))
    reason = f"{reason}, which the last joins"
    yield Candidate((once,), seconds + last, reason, temps, {"arrived": groups})


def _known(query: KernelQuery) -> bool:
    """Whether the index of the pages can be read before the launches before have ended."""
    index = (query.operand(name) for name in ("slots", "positions", "page_table"))
    return all(x is not None and x.early for x in index)


def _not_joined(job: Attention, slots: int) -> str:
    """Why no program that attends joins parts too; empty where one may."""
    wide = max(job.keys.D, job.v) > 256 and job.values is not None
    bounds = job.variant.WINDOW and (slots > 1 or job.rest is not None)
    if job.node.target.name.startswith("hip") and (wide or bounds):
        return "its masks, which are scalars, would spill"
    return ""


def _combine(job: Attention, parts: Parts, join: Join) -> Call:
    """The launch that joins parts, a program for each row and some of its dims."""
    assert job.pages
    args = {
        "parts": parts,
        "pages": job.pages._replace(table=None),
        "variant": job.variant,
        "join": join,
        "out": Result(0),
        "HEADS": job.heads,
        "AHEAD": _known(job.node),
    }
    rows = job.tokens * job.heads
    programs, resident = spread(job.node.target, rows * triton.cdiv(job.v, join.V))
    grid = (job.tokens, job.heads, programs // rows)
    return Call(combine_kernel, args, grid, (Result(0),), resident=resident)


def _joining(job: Attention, parts: Parts, join: Join, steps: int) -> float:
    """Seconds that a program waits for tops, and then for parts, so many at once in each of its
    steps, of a short context. A long one takes longer."""
    count = min(parts.COUNT, triton.cdiv(min(job.context, _SHORT_CONTEXT), parts.TILE))
    return (1 + steps * triton.cdiv(count, join.AT_ONCE)) * ROUND_TRIP_SECONDS


def padded(size: int) -> int:
    """The power of two that a dim of `size` takes in a product."""
    return max(_LEAST, triton.next_power_of_2(size))


def _few(job: Attention) -> bool:
    """Whether blocks are small and contexts in parts."""
    return job.pages is not None and job.variant.CAUSAL and job.tokens <= _FEW_TOKENS


def _wide_latent(job: Attention) -> bool:
    """Whether values are dims of keys that are wide, as MLA's latent is."""
    return job.values is None and padded(job.keys.D) > 256


def _most_programs(job: Attention) -> int:
    """On NVIDIA one a multiprocessor, so that launches overlap (templates.pdl)."""
    target = job.node.target
    return target.multiprocessors if target.name.startswith("cuda") else _PROGRAMS


def _slots(job: Attention, tile: Tile) -> int:
    """How many slots the rows of a block may be of."""
    straddling = tile.m % job.group > 0 and job.group % tile.m > 0
    return min(triton.cdiv(tile.m, job.group) + straddling, job.sequences)


def _tile(job: Attention) -> Tile:
    tile = _widest(job)
    if job.pages:
        tile = replace(tile, n=min(tile.n, job.pages.SIZE))
    while tile.n > _LEAST and _shared_bytes(job, tile) > job.node.target.shared_bytes:
        tile = replace(tile, n=tile.n // 2)
    # Warps that walk by themselves take a product's least each, in Triton 3.6 as later.
    return tile if tile.n >= tile.walks * _LEAST else replace(tile, walks=1)


def _shared_bytes(job: Attention, tile: Tile) -> int:
    """Bytes of shared memory that a program takes, on NVIDIA or a few more. There every two stages
    hold a tile of keys and, where they are of their own, one of values; with them lie the queries,
    and the sums where they are written. On AMD one stage holds one tile at a time, two one of each.
    """
    size = DTYPES[job.node.args[0].type.dtype].bits // 8
    keys = [job.query.BLOCK, job.rest.BLOCK if job.rest else 0]
    parts = [*keys, padded(job.v) if job.values else 0]
    if not job.node.target.name.startswith("cuda"):
        return tile.n * size * (sum(parts) if tile.stages > 1 else max(parts))
    staged = (tile.stages - 1) // 2 * tile.n * sum(parts) * size
    return staged + tile.m * (sum(keys) * size + padded(job.v) * 4)


def _widest(job: Attention) -> Tile:
    """The tile if pages are not smaller: chosen so that nothing spills registers. Stages of the
    pipeline on NVIDIA: one for the page's number, and enough to hold the next tile while one is in
    use. On AMD a lane holds twice as much: more than 64 rows spill masks, which are scalars, and
    with 8 warps, two on each SIMD, there are 256 registers a lane; shared memory is little."""
    nvidia = job.node.target.name.startswith("cuda")
    rows = job.tokens * job.group
    width = max(padded(job.keys.D), padded(job.v))
    if job.node.args[0].type.dtype == "f32":
        if width <= 128 or not nvidia:
            return Tile(_FEW_ROWS, 32 if width <= 256 else 16, 4, 1)
        return Tile(_FEW_ROWS, 16, 8 if width <= 256 else 16, 1)
    if _few(job) or rows <= _FEW_ROWS:
        if nvidia:
            # Of a latent only short tiles leave half of the multiprocessor (Call.resident).
            if _wide_latent(job):
                return Tile(_FEW_ROWS, 16, 4, 5)
            # Sums of a wide head have no room in one warp.
            return Tile(_FEW_ROWS, 32, 8, 5) if width > 128 else Tile(_FEW_ROWS, 64, 4, 5, 4)
        # The bounds of a window are scalars that wide tiles leave no registers for.
        if width > 256:
            return Tile(_FEW_ROWS, 16 if job.variant.WINDOW else 32, 4, 1)
        return Tile(_FEW_ROWS, 32 if job.variant.WINDOW else 64, 4, 2)
    if not nvidia:
        # Rows of one head each are of more slots, whose masks take scalars; keys in two parts do.
        alone = job.group == 1
        if width > 256:  # longer tiles take all 512 registers of a lane, and with Triton 3.6 more
            return Tile(32, 16, 4, 1)
        if width > 128:
            return Tile(16 if alone else 32, 32, 4, 1)
        if width > 64:
            return Tile(64, 32, 8, 1)
        return Tile(32 if alone or job.rest else 64, 32 if job.variant.WINDOW else 64, 8, 1)
    if width > 256:
        # A second tile of keys and values on its way would take registers that 512 dims need.
        return Tile(32, 32, 8, 3 if job.values else 5)
    m = 128 if rows >= 1024 and width <= 128 else 64
    # For sm_100 keys in two parts spill within the loop where tiles are longer.
    n = 32 if job.rest and job.node.target.name == "cuda:sm_100" else 64
    return Tile(m, n, 8 if m == 128 or width > 128 else 4, 3)


def _seconds(job: Attention) -> float:
    """Queries and results moved once, and a full context of every sequence that there can be."""
    q, *_ = job.node.args
    rest = job.rest.D if job.rest else 0
    width = job.kv_heads * (job.keys.D + rest + (job.v if job.values else 0))
    moved = q.nbytes + job.node.results[0].nbytes
    moved += job.sequences * job.context * width * DTYPES[q.type.dtype].bits // 8
    return moved / job.node.target.bytes_per_second
