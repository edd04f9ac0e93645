"""Launches of the attention kernels: how rows are blocked, contexts split, and slots shared out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton

from ....compiler.dtypes import DTYPES
from ....compiler.types import TensorType
from ...kernel_query import Call, Candidate, KernelQuery, Result, Temp
from ...prices import LAUNCH_SECONDS
from ..rowwise.rows import Pages
from .attend import Keys, Query, Splits, Variant, attend_kernel, combine_kernel, splits_of

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
    """Sizes of a program: rows, context positions, warps, stages of the pipeline."""

    m: int
    n: int
    warps: int
    stages: int


def plan(job: Attention) -> Candidate:
    """One launch, or two where the context is split."""
    splits = _splits(job)
    tile = _tile(job)
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
    held = Splits(splits, _split(job), _STEADY, triton.next_power_of_2(splits))
    attend = Call(
        attend_kernel,
        {
            "query": job.query,
            "query_rest": job.rest,
            "keys": job.keys,
            "values": job.values,
            "pages": job.pages,
            # The sinks of a split context come where the splits are joined.
            "variant": job.variant._replace(sinks=None) if split else job.variant,
            "splits": held,
            "out": out,
            "tops": Temp("tops") if split else None,
            "totals": Temp("totals") if split else None,
            "tokens": job.tokens,
            "context": job.context,
            "lanes": lanes,
            "HEADS": job.heads,
            "GROUP": job.group,
            "SLOTS": 1 if slots == 1 else tile.m,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
        },
        (blocks, job.kv_heads * lanes, parts),
        (out, Temp("tops"), Temp("totals")) if split else (out,),
        num_warps=tile.warps,
        num_stages=tile.stages,
        overlaps=tile.m <= _FEW_ROWS,
    )
    seconds = _seconds(job)
    reason = f"blocks of {tile.m} rows and {tile.n} positions"
    if not split:
        return Candidate((attend,), seconds + LAUNCH_SECONDS, f"{reason}, contexts whole")
    calls = (attend, _combine(job, held))
    reason = f"{reason}, {splits} splits in {parts} parts"
    return Candidate(calls, seconds + 2 * LAUNCH_SECONDS, reason, temps)


def _combine(job: Attention, splits: Splits) -> Call:
    assert job.pages
    block = min(128, max(1, 8192 // splits.BLOCK), triton.next_power_of_2(job.v))
    args = {
        "sums": Temp("sums"),
        "tops": Temp("tops"),
        "totals": Temp("totals"),
        "pages": job.pages._replace(table=None),
        "variant": job.variant,
        "splits": splits,
        "out": Result(0),
        "HEADS": job.heads,
        "V": job.v,
        "BLOCK_V": block,
    }
    grid = (job.tokens, job.heads, triton.cdiv(job.v, block))
    return Call(combine_kernel, args, grid, (Result(0),))


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
    straddling = tile.m % job.group > 0 and job.group % tile.m > 0
    return min(triton.cdiv(tile.m, job.group) + straddling, job.sequences)


def _tile(job: Attention) -> Tile:
    tile = _widest(job)
    if job.pages:
        tile = replace(tile, n=min(tile.n, job.pages.SIZE))
    while tile.n > _LEAST and _shared_bytes(job, tile) > job.node.target.shared_bytes:
        tile = replace(tile, n=tile.n // 2)
    return tile


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
            return Tile(_FEW_ROWS, 64, 8 if width > 128 else 4, 5)
        # The bounds of a window are scalars that wide tiles leave no registers for.
        if width > 256:
            return Tile(_FEW_ROWS, 16 if job.variant.WINDOW else 32, 4, 1)
        return Tile(_FEW_ROWS, 32 if job.variant.WINDOW else 64, 4, 2)
    if not nvidia:
        # Rows of one head each are of more slots, whose masks take scalars.
        alone = job.group == 1
        if width > 256:  # longer tiles take all 512 registers of a lane, and with Triton 3.6 more
            return Tile(32, 16, 4, 1)
        if width > 128:
            return Tile(16 if alone else 32, 32, 4, 1)
        if width > 64:
            return Tile(64, 32, 8, 1)
        return Tile(32 if alone else 64, 32 if job.variant.WINDOW else 64, 8, 1)
    if width > 256:
        return Tile(32, 32, 8, 5)
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
