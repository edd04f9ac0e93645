"""The inputs of the next step, written where those of this one lie: one program a row."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl

from ....compiler.ops.sampling import WORD
from ...kernel_query import Arg, Call, Candidate, Declined, KernelQuery, Result
from ..pdl import pdl_wait

_WORD = tl.constexpr(WORD)


@triton.jit
def uniform(seed, number):
    """The draw f32 in [0, 1), rounded down, of i64 `seed` and `number`: see compiler.ops.feed."""
    zero = (seed * 0).to(tl.uint64)
    # The first block of numpy's generator: its counter is 1.
    raw, _, _, _ = philox_impl(
        zero + 1, zero, zero, zero, seed.to(tl.uint64, bitcast=True), number.to(tl.uint64)
    )
    exact = (raw >> 11).to(tl.float64) * 1.1102230246251565e-16
    near = exact.to(tl.float32)
    less = (near.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    return tl.where(near.to(tl.float64) > exact, less, near)


@triton.jit
def feed_kernel(
    tokens,
    positions,
    draw,
    seen,
    slots,
    logit_rows,
    token,
    seed,
    prompt,
    places,
    ROWS_UP: tl.constexpr,
    WORDS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Row program_id(0) of at most ROWS_UP, over `places` tokens."""
    pdl_wait(PROGRAMMATIC)
    row = tl.program_id(0)
    place = tl.load(logit_rows + row)
    chosen = tl.load(token + row)
    other = tl.arange(0, ROWS_UP)
    earlier = other < row
    same = tl.load(logit_rows + other, mask=earlier, other=-1) == place
    alone = tl.sum((same & earlier).to(tl.int32), 0) == 0
    inside = (place >= 0) & (place < places) & (chosen >= 0) & (chosen < WORDS * _WORD)
    slot = tl.load(slots + place, mask=inside, other=-1)
    if alone & inside & (slot >= 0):
        position = tl.load(positions + place) + 1
        tl.store(tokens + place, chosen)
        tl.store(positions + place, position)
        number = position.to(tl.int64) + 1 - tl.load(prompt + row)
        tl.store(draw + row, uniform(tl.load(seed + row), number))
        word = seen + row * WORDS + chosen // _WORD
        bit = (tl.full((), 1, tl.uint32) << (chosen % _WORD).to(tl.uint32)).to(
            tl.int32, bitcast=True
        )
        tl.store(word, tl.load(word) | bit)


def feed(query: KernelQuery) -> Candidate | Declined:
    """feed(tokens, positions, draw, seen, slots, logit_rows, token, seed, prompt)."""
    if not all(x.dense for x in query.args):
        return Declined("expected dense operands")
    rows, words = query.args[3].shape
    if not rows:
        return Candidate((), 0.0, "no rows")
    named = {name: Arg(i) for i, name in enumerate(query.op.required)}
    call = Call(
        feed_kernel,
        {
            **named,
            "places": query.args[0].shape[0],
            "ROWS_UP": triton.next_power_of_2(rows),
            "WORDS": words,
        },
        (rows, 1, 1),
        tuple(Result(i) for i in range(len(query.results))),
        num_warps=1,
    )
    return Candidate((call,), query.seconds(1), "one program a row")


TEMPLATES = {"feed": (feed,)}
