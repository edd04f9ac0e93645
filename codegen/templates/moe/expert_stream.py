"""Experts of few tokens whose MXFP4 weights lie in fragments: two streams (Gluon, NVIDIA).

Every choice is a product of one row with its own expert's weight, as in gemm.mxfp4_stream for one
token; there is no sort and no padding. The first launch makes the hidden rows of all choices, the
second the sums of each token's choices. Of products by head (gemm.head_stream) every head is a
choice of each token, and its own expert.

- The tiles of 16 rows of all results, one result after the other, are shared evenly by the
  programs. A tile of a hidden row sums up PAIRS steps of 256 columns, one of a token's sum those of
  all its choices. The steps of a program are dealt to its warps in turn; each leaves its 16 sums in
  shared memory, and what they add up to in the end depends on the tile alone: not on how many
  choices there are, nor on what the program computes besides.
- The first launch reads nothing before the wait: which experts there are is what the launch before
  wrote. It lets the second begin only then: so that one, too, knows them, and fills its rings
  before its own wait. So do products by head, if the weight is a constant.
- A step's columns of x come with its weights through the ring. A lane copies what it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...kernel_query import Arg, Call, Declined, KernelQuery
from ..gemm.epilogue import activate
from ..gemm.stream_asm import (
    CODE_BYTES,
    REST,
    STEP_BYTES,
    copy_step,
    copy_words,
    folded,
    four_words,
    group_sums,
    number_at,
    on_their_way,
    put,
    raised_pairs,
    statement,
    sum_over,
    word_at,
)
from ..pdl import RESIDENT

# Bytes of a step in the ring: of the weight, and 256 columns of bf16.
SLOT = gl.constexpr(2688)
# Warps of a program, and steps in the ring of each at most.
WARPS, DEPTH = 8, 4
# Steps whose sums are in shared memory, twice: at most, and as many as are enough for a pass.
_MOST_STEPS, _STEPS = 208, 192
# The most choices a token, which are summed within a warp.
_MOST_CHOICES = 32


@gluon.constexpr_function
def lanes(count):
    """The power of two that holds `count`."""
    return triton.next_power_of_2(count)


@gluon.constexpr_function
def powers_below(limit):
    return tuple(1 << i for i in range(limit.bit_length() - 1))


@gluon.jit
def _turn(
    first,
    last,
    n,
    JOINED: gl.constexpr,
    DOWN: gl.constexpr,
    PAIRS: gl.constexpr,
    STEPS: gl.constexpr,
):
    """Of step `n` of a program: its choice, the tile of its expert, its pair of tiles across, and
    whether there is such a step."""
    tile, step = first + n // STEPS, n % STEPS
    there = (tile < last) & (step < JOINED * PAIRS)
    return tile // DOWN * JOINED + step // PAIRS, tile % DOWN, step % PAIRS, there


@gluon.jit
def _expert(indices, choice, there, EACH: gl.constexpr, AHEAD: gl.constexpr):
    """i64; AHEAD of the wait past the L1, which may hold what was there before."""
    if indices is None:
        found = (choice % EACH).to(gl.int64)
    else:
        found = gl.load(indices + choice, mask=there, other=0, volatile=AHEAD).to(gl.int64)
    return found


@gluon.jit
def _copy_x(x, to, choice, pair, there, thread, EACH: gl.constexpr, WIDTH: gl.constexpr):
    """The lane's eight columns of a step of x."""
    lane = thread & 31
    column = pair * 256 + lane * 8
    at = (choice // EACH).to(gl.int64) * x.STEP + (choice % EACH).to(gl.int64) * x.HEAD
    at += column.to(gl.int64)
    inside = (column < WIDTH).to(gl.int32)
    copy_words(to, x.data.to(gl.int64) + at * 2, there.to(gl.int32), inside)


@gluon.jit
def _copy_weight(weight, ring, expert, tile, pair, there, thread, DOWN: gl.constexpr):
    """The lane's part of a step of the weight: the end of a group of copies."""
    TILES: gl.constexpr = weight.TILES
    lane = thread & 31
    q = lane & 3
    at = (expert * DOWN + tile.to(gl.int64)) * TILES + (pair * 2).to(gl.int64)
    parts = (pair * 2 + 1 < TILES).to(gl.int32) * 2 + 1
    parts += (pair * 2 + (q >> 1) < TILES).to(gl.int32) * 4
    of_lane = (q >> 1) * 64 + (lane >> 2) * 8 + (q & 1) * 4
    copy_step(
        ring,
        ring + CODE_BYTES - lane * 12,
        weight.data.to(gl.int64) + at * 1024 + (lane * 16).to(gl.int64),
        weight.scales.to(gl.int64) + at * 64 + of_lane.to(gl.int64),
        there.to(gl.int32),
        parts,
        TILES % 2 != 0,
    )


@gluon.jit
def expert_stream_kernel(
    x,
    indices,
    weights,
    weight,
    bias,
    epilogue,
    N: gl.constexpr,
    EACH: gl.constexpr,
    Y_HEAD: gl.constexpr,
    JOINED: gl.constexpr,
    RESULTS: gl.constexpr,
    DOWN: gl.constexpr,
    STEPS: gl.constexpr,
    PROGRAMS: gl.constexpr,
    W: gl.constexpr,
    DEPTH: gl.constexpr,
    MOST: gl.constexpr,
    AHEAD: gl.constexpr,
    PROGRAMMATIC: gl.constexpr,
):
    """y [RESULTS, N]. Without `weights`: epilogue of the row of x times the weight of the choice's
    expert, and its bias. With them: sum over the JOINED choices of a token of weight · (the
    choice's row of x times its expert's weight, and its bias), and the residual.

    Of every EACH choices, or results, x (Rows) has rows HEAD apart, or one if that is 0, and y rows
    Y_HEAD apart. `indices` are the choices' experts; None: the first, second … of every EACH. An
    expert's weight has DOWN times 16 rows. A program, of W warps with rings of DEPTH steps, sums up
    MOST tiles in a pass, each in STEPS, of which the last may be none; those of a pass are a
    multiple of W. AHEAD says that the weight is a constant, and that of `indices` the launch before
    lets this one begin when it has waited itself.
    """
    TILES: gl.constexpr = weight.TILES
    HALVED: gl.constexpr = weight.HALVED
    ROWS: gl.constexpr = 8 if HALVED else 16
    PAIRS: gl.constexpr = (TILES + 1) // 2
    RING: gl.constexpr = W * DEPTH * SLOT
    PART: gl.constexpr = MOST * STEPS * 64
    # Whether a warp has more steps than its ring.
    REFILLED: gl.constexpr = (RESULTS * DOWN + PROGRAMS - 1) // PROGRAMS * STEPS > W * DEPTH
    # Shared memory: the ring; of two passes the sums [tile, step, 16]; a line of no use.
    LINES: gl.constexpr = (RING + 2 * PART + 128 * W - 1) // (128 * W) + 1
    # LANES, a power of two, have a choice of a row each.
    LANES: gl.constexpr = lanes(JOINED)
    ENDS: gl.constexpr = (MOST * ROWS * LANES + 32 * W - 1) // (32 * W)
    one_each: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    thread = gl.arange(0, 32 * W, layout=one_each)
    if PROGRAMMATIC:
        if AHEAD:
            statement("griddepcontrol.launch_dependents; mov.b32 $0, 0;", thread)
        else:
            statement("griddepcontrol.wait; mov.b32 $0, 0;", thread)
            statement("griddepcontrol.launch_dependents; mov.b32 $0, 0;", thread)
    memory = gl.allocate_shared_memory(
        gl.int32, [LINES, 32 * W], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    # Without a use of Triton's own the symbol would not be there. It is the only allocation.
    memory.index(LINES - 1).store(thread)
    base = statement("mov.b32 $0, global_smem;", thread)
    lane = thread & 31
    warp = thread >> 5
    r = lane >> 2
    q = lane & 3
    ring = base + warp * (DEPTH * SLOT) + lane * 16
    # A lane's scales lie four bytes apart.
    ring_scales = ring + CODE_BYTES - lane * 12
    program = gl.program_id(0)
    first = program * (RESULTS * DOWN) // PROGRAMS
    last = (program + 1) * (RESULTS * DOWN) // PROGRAMS
    experts = ()
    for turn in gl.static_range(DEPTH):
        n = warp + turn * W
        choice, tile, pair, there = _turn(first, last, n, JOINED, DOWN, PAIRS, STEPS)
        experts = experts + (_expert(indices, choice, there, EACH, AHEAD),)
    for turn in gl.static_range(DEPTH):
        n = warp + turn * W
        choice, tile, pair, there = _turn(first, last, n, JOINED, DOWN, PAIRS, STEPS)
        to = ring + turn * SLOT
        if not AHEAD:
            _copy_x(x, to + STEP_BYTES, choice, pair, there, thread, EACH, weight.K)
        _copy_weight(weight, to, experts[turn], tile, pair, there, thread, DOWN)
    if AHEAD:
        if PROGRAMMATIC:
            statement("griddepcontrol.wait; mov.b32 $0, 0;", thread)
        # In groups of their own: once one is there, so is every weight.
        for turn in gl.static_range(DEPTH):
            n = warp + turn * W
            choice, tile, pair, there = _turn(first, last, n, JOINED, DOWN, PAIRS, STEPS)
            to = ring + turn * SLOT + STEP_BYTES
            _copy_x(x, to, choice, pair, there, thread, EACH, weight.K)
            statement("cp.async.commit_group; mov.b32 $0, 0;", thread)
    zero = gl.zeros([32 * W], gl.float32, layout=one_each)
    none = (zero, zero, zero, zero, zero, zero, zero, zero)
    statement(on_their_way(DEPTH - 1), thread)
    upper0 = four_words(ring)
    lower0 = four_words(ring + 512)
    upper1 = four_words(ring + 1024)
    lower1 = four_words(ring + 1536)
    xs = raised_pairs(four_words(ring + STEP_BYTES))
    scale = word_at(ring_scales)
    n = warp
    place = 0
    side = 0
    begin = first
    while begin < last:
        held = gl.minimum(last - begin, MOST)
        of_pass = base + RING + side * PART
        # What the ends of the pass add and multiply with is on its way meanwhile.
        ends = ()
        for i in gl.static_range(ENDS):
            at = i * (32 * W) + thread
            tile = begin + at // (ROWS * LANES)
            column = tile % DOWN * ROWS + at // LANES % ROWS
            live = (tile < begin + held) & (column < N) & (at % LANES < JOINED)
            result = tile // DOWN
            choice = result * JOINED + at % LANES
            added = zero
            of_up = zero
            factor = zero
            residual = zero
            if bias is not None:
                row = _expert(indices, choice, live, EACH, False) * weight.N + column.to(gl.int64)
                added = gl.load(bias + row, mask=live, other=0.0).to(gl.float32)
                if HALVED:
                    of_up = gl.load(bias + row + N, mask=live, other=0.0).to(gl.float32)
            if weights is not None:
                factor = gl.load(weights + choice, mask=live, other=0.0).to(gl.float32)
            if epilogue.residual is not None:
                where = result.to(gl.int64) * epilogue.RESIDUAL_STEP + column.to(gl.int64)
                alone = live & (at % LANES == 0)
                residual = gl.load(epilogue.residual + where, mask=alone, other=0.0)
                residual = residual.to(gl.float32)
            ends = ends + ((added, of_up, factor, residual),)
        for _ in range((held * STEPS + W - 1) // W):
            if REFILLED:
                choice, tile, pair, there = _turn(
                    first, last, n + DEPTH * W, JOINED, DOWN, PAIRS, STEPS
                )
                to = ring + place * SLOT
                expert = _expert(indices, choice, there, EACH, False)
                _copy_x(x, to + STEP_BYTES, choice, pair, there, thread, EACH, weight.K)
                _copy_weight(weight, to, expert, tile, pair, there, thread, DOWN)
            else:
                statement("cp.async.commit_group; mov.b32 $0, 0;", thread)
            place += 1
            if place == DEPTH:
                place = 0
            c = none
            for g in gl.static_range(8):
                # The group's columns of x are in the lanes of its r, the others' are zero.
                mine = r == g
                v = (
                    gl.where(mine, xs[0], 0),
                    gl.where(mine, xs[1], 0),
                    gl.where(mine, xs[2], 0),
                    gl.where(mine, xs[3], 0),
                )
                if g == 4:
                    statement(on_their_way(DEPTH - 1), thread)
                    upper0 = four_words(ring + place * SLOT)
                    lower0 = four_words(ring + place * SLOT + 512)
                if g < 4:
                    c = group_sums(upper0[g], lower0[g], v, c)
                elif TILES > 1:
                    c = group_sums(upper1[g - 4], lower1[g - 4], v, c)
            total = folded((zero, zero, zero, zero), c, scale, q, 0, 1)
            upper1 = four_words(ring + place * SLOT + 1024)
            lower1 = four_words(ring + place * SLOT + 1536)
            xs = raised_pairs(four_words(ring + place * SLOT + STEP_BYTES))
            scale = word_at(ring_scales + place * SLOT)
            to = of_pass + (n - (begin - first) * STEPS) * 64 + r * 4
            mine = ((q == 0) & (n < (last - first) * STEPS)).to(gl.int32)
            put(to, sum_over(total[0], (1, 2)), mine)
            put(to + 32, sum_over(total[2], (1, 2)), mine)
            n += W
        statement("bar.sync 0; mov.b32 $0, 0;", thread)
        for i in gl.static_range(ENDS):
            at = i * (32 * W) + thread
            of_tile = at // (ROWS * LANES)
            tile = begin + of_tile
            column = tile % DOWN * ROWS + at // LANES % ROWS
            live = (of_tile < held) & (column < N) & (at % LANES < JOINED)
            from_ = of_pass + gl.minimum(of_tile, MOST - 1) * (STEPS * 64)
            from_ += gl.minimum(at % LANES, JOINED - 1) * (PAIRS * 64) + at // LANES % ROWS * 4
            sum_ = zero
            up = zero
            for k in gl.static_range(PAIRS):
                sum_ += number_at(from_ + k * 64)
                if HALVED:
                    up += number_at(from_ + k * 64 + 32)
            added, of_up, factor, residual = ends[i]
            sum_ = sum_ * REST + added
            if weights is not None:
                sum_ = sum_over(gl.where(live, sum_ * factor, 0.0), powers_below(LANES))
            value = activate(epilogue, sum_, up * REST + of_up, column, live, N) + residual
            result = tile // DOWN
            to = result // EACH * epilogue.STEP + result % EACH * Y_HEAD + column
            stored = live & (at % LANES == 0)
            gl.store(epilogue.y + to, value.to(epilogue.y.dtype.element_ty), mask=stored)
        side = 1 - side
        begin += MOST
    memory._keep_alive()


def constants(
    results: int, joined: int, down: int, across: int, multiprocessors: int
) -> dict[str, int] | Declined:
    """How `results` of `down` tiles, each of `joined` choices and `across` tiles, are shared by
    programs and warps."""
    least = joined * -(-across // 2)
    needed = -(-results * down // multiprocessors)
    if least > _MOST_STEPS:
        return Declined(f"stream: {least} steps a tile, expected at most {_MOST_STEPS}")
    steps, most = least, needed
    if needed * least > _STEPS:
        # All warps have as many steps of a pass, of which there are several.
        steps, even = next(
            (steps, even)
            for steps in range(least, least + WARPS)
            if (even := WARPS // gcd(WARPS, steps)) * steps <= _MOST_STEPS
        )
        most = min(needed, even * max(1, _STEPS // (steps * even)))
    return {
        "JOINED": joined,
        "RESULTS": results,
        "DOWN": down,
        "STEPS": steps,
        "PROGRAMS": multiprocessors,
        "W": WARPS,
        # No more than a warp has at all.
        "DEPTH": min(DEPTH, -(-needed * least // WARPS)),
        "MOST": most,
    }


def calls(
    query: KernelQuery, hidden: Mapping[str, Any], summed: Mapping[str, Any], k: int
) -> tuple[Call, Call] | Declined:
    """The two launches; `hidden` and `summed` have what the kernel reads and writes: x, weights,
    weight, bias, epilogue, N and Y_HEAD. Every token has `k` choices."""
    x, indices, *held = (query.args[i] for i in (0, 2, 3, 4))
    for weight in held:
        if weight.packed is None or not weight.packed.fragments:
            return Declined(f"stream: {weight.type} does not lie in fragments")
    if not x.aligned or x.strides[0] % 8:
        return Declined("stream: the rows of x do not begin at multiples of 16 bytes")
    if k > _MOST_CHOICES:
        return Declined(f"stream: {k} choices a token, expected at most {_MOST_CHOICES}")
    made: list[Call] = []
    tokens = indices.shape[0]
    for args, weight, results, joined, each in (
        (hidden, held[0], tokens * k, 1, k),
        (summed, held[1], tokens, k, 1),
    ):
        assert weight.packed is not None
        down, across = weight.packed.tiles
        shares = constants(results, joined, down, across, query.target.multiprocessors)
        if isinstance(shares, Declined):
            return shares
        made.append(
            Call(
                expert_stream_kernel,
                {**args, "indices": Arg(2), "EACH": each, **shares, "AHEAD": args is summed},
                (shares["PROGRAMS"], 1, 1),
                (args["epilogue"].y,),
                num_warps=WARPS,
                resident=RESIDENT,
                spreads=args is hidden,
            )
        )
    return made[0], made[1]
