"""What drafting takes of a step: tokens that follow, where acceptance ends, what a smaller
model has not seen, the likeliest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....compiler.types import TensorType
from ...kernel_query import Arg, Call, Candidate, Declined, KernelQuery, Result, Temp
from ..arrival import arrivals_of, last_to_arrive
from ..pdl import pdl_wait

# Tokens of a program of `follow`, and logits of one of `likeliest`.
_TOKENS, _LOGITS = 64, 4096


class Steps(NamedTuple):
    """Slots and positions of the rows of each step; None for those that there are not."""

    slots_1: Any = None
    positions_1: Any = None
    slots_2: Any = None
    positions_2: Any = None
    slots_3: Any = None
    positions_3: Any = None
    slots_4: Any = None
    positions_4: Any = None


class Extended(NamedTuple):
    """Tokens, positions and slots of the places of a step and, behind them, of its rows."""

    tokens: Any
    positions: Any
    slots: Any
    rows: Any


@triton.jit
def follow_kernel(
    following,
    logit_rows,
    token,
    result,
    places,
    ROWS: tl.constexpr,
    ROWS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """BLOCK of `places` tokens; of each the first of ROWS rows that has its place."""
    pdl_wait(PROGRAMMATIC)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS_UP)
    of = tl.load(logit_rows + row, mask=row < ROWS, other=-1)
    first = tl.min(tl.where(of[None, :] == place[:, None], row[None, :], ROWS_UP), 1)
    known = tl.load(following + place, mask=place < places, other=0)
    sampled = tl.load(token + first, mask=first < ROWS, other=0)
    tl.store(
        result + place, tl.where(known < 0, tl.maximum(sampled, 0), known), mask=place < places
    )


@triton.jit
def _continued(tokens, slots, logit_rows, token, row, ROWS: tl.constexpr):
    """Whether rows continue the one before, and whether that gave the tokens of their places."""
    inside = (row > 0) & (row < ROWS)
    here = tl.load(logit_rows + row, mask=inside, other=0)
    before = tl.load(logit_rows + row - 1, mask=inside, other=0)
    slot = tl.load(slots + here, mask=inside, other=-1)
    continues = inside & (here == before + 1)
    continues = continues & (slot == tl.load(slots + before, mask=inside, other=-1))
    drafted = tl.load(tokens + here, mask=inside, other=-1)
    given = tl.load(token + row - 1, mask=inside, other=-1)
    return continues, continues & (given == drafted)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _accepted(tokens, slots, logit_rows, token, row, ROWS: tl.constexpr):
    """Whether rows are accepted, and whether a draft goes on behind them."""
    continues, matched = _continued(tokens, slots, logit_rows, token, row, ROWS)
    _, goes_on = _continued(tokens, slots, logit_rows, token, row + 1, ROWS)
    begun = tl.associative_scan(tl.where(continues, -1, row), 0, _larger)
    missed = tl.associative_scan(tl.where(continues & (matched == 0), row, -1), 0, _larger)
    chosen = tl.load(token + row, mask=row < ROWS, other=-1)
    return missed < begun, (missed < begun) & (goes_on == 0) & (chosen >= 0)


@triton.jit
def _behind(positions, slots, logit_rows, room, row, ends, ROWS: tl.constexpr):
    """Of rows where a draft goes on their slots, -1 of others; their positions and room."""
    place = tl.load(logit_rows + row, mask=row < ROWS, other=0)
    slot = tl.where(ends, tl.load(slots + place, mask=row < ROWS, other=-1), -1)
    position = tl.load(positions + place, mask=row < ROWS, other=0)
    return slot, position, tl.load(room + row, mask=row < ROWS, other=0)


@triton.jit
def _store_step(
    slots, positions, slot, position, free, row, STEP: tl.constexpr, ROWS: tl.constexpr
):
    """Step STEP, where it is asked for."""
    if slots is not None:
        tl.store(slots + row, tl.where(free >= STEP, slot, -1), mask=row < ROWS)
        tl.store(positions + row, position + STEP, mask=row < ROWS)


@triton.jit
def _store_steps(steps, slot, position, free, row, ROWS: tl.constexpr):
    _store_step(steps.slots_1, steps.positions_1, slot, position, free, row, 1, ROWS)
    _store_step(steps.slots_2, steps.positions_2, slot, position, free, row, 2, ROWS)
    _store_step(steps.slots_3, steps.positions_3, slot, position, free, row, 3, ROWS)
    _store_step(steps.slots_4, steps.positions_4, slot, position, free, row, 4, ROWS)


@triton.jit
def accept_kernel(
    tokens,
    positions,
    slots,
    logit_rows,
    token,
    room,
    steps,
    ROWS: tl.constexpr,
    ROWS_UP: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """All ROWS rows."""
    pdl_wait(PROGRAMMATIC)
    row = tl.arange(0, ROWS_UP)
    _, ends = _accepted(tokens, slots, logit_rows, token, row, ROWS)
    slot, position, free = _behind(positions, slots, logit_rows, room, row, ends, ROWS)
    _store_steps(steps, slot, position, free, row, ROWS)


@triton.jit
def extend_kernel(
    tokens,
    positions,
    slots,
    logit_rows,
    token,
    room,
    made,
    steps,
    places,
    ROWS: tl.constexpr,
    ROWS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """BLOCK of `places` tokens, and in the first program all ROWS rows, whose step 1 is written
    behind the places."""
    pdl_wait(PROGRAMMATIC)
    row = tl.arange(0, ROWS_UP)
    accepted, ends = _accepted(tokens, slots, logit_rows, token, row, ROWS)
    of = tl.load(logit_rows + row, mask=row < ROWS, other=-1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = place < places
    wrong = (of[None, :] == place[:, None]) & (accepted == 0)[None, :]
    slot = tl.load(slots + place, mask=here, other=-1)
    slot = tl.where(tl.max(wrong.to(tl.int32), 1) > 0, -1, slot)
    tl.store(made.slots + place, slot, mask=here)
    tl.store(made.tokens + place, tl.load(tokens + place, mask=here, other=0), mask=here)
    tl.store(made.positions + place, tl.load(positions + place, mask=here, other=0), mask=here)
    if tl.program_id(0) == 0:
        last, position, free = _behind(positions, slots, logit_rows, room, row, ends, ROWS)
        to_slots, to_positions = made.slots + places, made.positions + places
        _store_step(to_slots, to_positions, last, position, free, row, 1, ROWS)
        chosen = tl.load(token + row, mask=row < ROWS, other=0)
        tl.store(made.tokens + places + row, tl.maximum(chosen, 0), mask=row < ROWS)
        tl.store(made.rows + row, places + row, mask=row < ROWS)
        _store_steps(steps, last, position, free, row, ROWS)


@triton.jit
def likeliest_kernel(
    logits,
    best,
    best_at,
    result,
    arrivals,
    V: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Part program_id(0) of row program_id(1); the last of a row chooses among its PARTS."""
    pdl_wait(PROGRAMMATIC)
    part = tl.program_id(0)
    row = tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    x = tl.load(logits + row * STEP + at, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    highest = tl.max(x, 0)
    tl.store(best + row * PARTS + part, highest)
    tl.store(best_at + row * PARTS + part, tl.min(tl.where((x == highest) & inside, at, V), 0))
    if last_to_arrive(arrivals, row, PARTS):
        of = row * PARTS + tl.arange(0, PARTS_UP)
        here = tl.arange(0, PARTS_UP) < PARTS
        values = tl.load(best + of, mask=here, other=float("-inf"), cache_modifier=".cg")
        ids = tl.load(best_at + of, mask=here, other=V, cache_modifier=".cg")
        tl.store(result + row, tl.min(tl.where(values == tl.max(values, 0), ids, V), 0))


def follow(query: KernelQuery) -> Candidate | Declined:
    """follow(following, logit_rows, token)."""
    places, rows = query.args[0].shape[0], query.args[2].shape[0]
    numbers = {"places": places, "BLOCK": _TOKENS}
    return _of_rows(query, follow_kernel, rows, {"result": Result(0), **numbers}, places)


def accept(query: KernelQuery) -> Candidate | Declined:
    """accept(tokens, positions, slots, logit_rows, token, room, steps=)."""
    rows, steps = query.args[4].shape[0], int(query.attrs["steps"])
    made = Steps(*(Result(i) for i in range(2 * steps)))
    return _of_rows(query, accept_kernel, rows, {"steps": made}, _TOKENS)


def extend(query: KernelQuery) -> Candidate | Declined:
    """extend(tokens, positions, slots, logit_rows, token, room, steps=)."""
    places, rows = query.args[0].shape[0], query.args[4].shape[0]
    made = Extended(*(Result(i) for i in range(4)))
    steps = Steps(None, None, *(Result(i) for i in range(4, len(query.results))))
    more = {"made": made, "steps": steps, "places": places, "BLOCK": _TOKENS}
    return _of_rows(query, extend_kernel, rows, more, places)


def _of_rows(
    query: KernelQuery, kernel: Any, rows: int, more: Mapping[str, Any], tokens: int
) -> Candidate | Declined:
    """One launch of a program for each _TOKENS of `tokens`, each of which sees all rows."""
    if not all(x.dense for x in query.args):
        return Declined("expected dense operands")
    if not rows or not tokens:
        return Declined("expected rows and tokens")
    named = {name: Arg(i) for i, name in enumerate(query.op.required)}
    sizes = {"ROWS": rows, "ROWS_UP": max(triton.next_power_of_2(rows), 2)}
    written = tuple(Result(i) for i in range(len(query.results)))
    grid = (triton.cdiv(tokens, _TOKENS), 1, 1)
    call = Call(kernel, {**named, **more, **sizes}, grid, written, num_warps=4)
    return Candidate((call,), query.seconds(1), "every row in each program")


def likeliest(query: KernelQuery) -> Candidate | Declined:
    """likeliest(logits)."""
    (logits,) = query.args
    rows, vocab = logits.shape
    if logits.strides[1] != 1 or not rows:
        return Declined(f"expected dense rows, found {logits.type}")
    if rows * logits.strides[0] >= 2**31:
        return Declined(f"expected fewer than 2^31 logits, found {logits.type}")
    parts = triton.cdiv(vocab, _LOGITS)
    call = Call(
        likeliest_kernel,
        {
            "logits": Arg(0),
            "best": Temp("best"),
            "best_at": Temp("best_at"),
            "result": Result(0),
            "arrivals": arrivals_of(query.target, "arrived"),
            "V": vocab,
            "STEP": logits.strides[0],
            "PARTS": parts,
            "PARTS_UP": triton.next_power_of_2(parts),
            "BLOCK": _LOGITS,
        },
        (parts, rows, 1),
        (Temp("best"), Temp("best_at"), Result(0)),
        num_warps=8,
    )
    temps = {n: TensorType(d, (rows, parts)) for n, d in (("best", "f32"), ("best_at", "i32"))}
    reason = f"{parts} parts a row, the last joins them"
    return Candidate((call,), query.seconds(1), reason, temps, {"arrived": rows})


TEMPLATES = {
    "follow": (follow,),
    "accept": (accept,),
    "extend": (extend,),
    "likeliest": (likeliest,),
}
