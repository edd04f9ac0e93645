"""Products of few tokens with an MXFP4 weight in fragments, which is a stream (Gluon, NVIDIA).

The programs, one on every multiprocessor, share the rows of the weight evenly; each reads its part
in the order in which it uses it. The code is SIMT: tensors have one element a thread, and
PTX does the rest.

- A step of a warp is 16 rows by 256 columns: two tiles of compiler.ops.mxfp4_fragments beside each
  other, 2048 bytes of codes and 128 of scales. Warps share K (split-K within a program). A lane
  copies (cp.async) exactly the bytes that it reads later, so that nothing but cp.async.wait_group
  stands between both: no barrier.
- What a step needs is in registers when it begins: its place in the ring takes the step DEPTH later
  at once.
- x stays in registers for all tiles, as right operands of mma.m16n8k16, which have eight columns. T
  tokens (1, 2, 4 or 8) leave room for 8 / T groups of 32 columns of x beside each other: each in
  columns of its own, in which x is zero for the other groups. So the mma of those groups, a set,
  add to the same sums, and for one token a lane scales four sums a step instead of 32.
- A weight that is a constant does not depend on the launches before: the ring is filled before the
  wait (templates.pdl), with at most PACE steps on their way, so that what the launch before reads
  gets through. A program takes half of a multiprocessor: while one works, the next launch's fills
  its ring (templates.pdl).

x is taken 2^64 times too large, as the codes are 2^126 too small; 2^62 is left for the end. (An x
beyond 2^63 overflows.) A norm of x is taken along as in fragment_linear.
"""

from __future__ import annotations

from collections.abc import Iterator

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...kernel_query import Call, Declined
from ..pdl import RESIDENT
from .epilogue import finish
from .fragment_linear import raised, times
from .product import GemmLaunch, Product
from .stream_asm import (
    CODE_BYTES,
    REST,
    STEP_BYTES,
    copy_step,
    folded,
    four_words,
    group_sums,
    number_at,
    on_their_way,
    put,
    statement,
    sum_over,
    word_at,
)

# Steps on their way before the launch before has ended.
_PACE = 2
# Warps of a program: two programs are on a multiprocessor.
_WARPS = 8
# The most tokens, and the most tiles times tokens whose sums a pass holds.
_MOST_TOKENS = 8
_MOST_SUMS = 16


@gluon.jit
def _pairs(x, W: gl.constexpr, one_each: gl.constexpr):
    """bf16 [W·32, 8] as four words of two, each [W·32]."""
    low, high = gl.split(x.reshape([W * 32, 2, 2, 2]))
    low = low.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    words = low | (high.to(gl.int16, bitcast=True).to(gl.int32) << 16)
    even, odd = gl.split(words)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, one_each, assert_trivial=True),
        gl.convert_layout(second, one_each, assert_trivial=True),
        gl.convert_layout(third, one_each, assert_trivial=True),
        gl.convert_layout(fourth, one_each, assert_trivial=True),
    )


@gluon.jit
def _inputs(x, norm, token, column, there, W: gl.constexpr, one_each: gl.constexpr):
    """Eight columns a lane, 2^64 times too large, as pairs; and the sum of their squares."""
    value = gl.load(x.data + token * x.STEP + column, mask=there, other=0.0)
    squares = gl.zeros([W * 32], gl.float32, layout=one_each)
    large = raised(value)
    if norm is not None:
        wide = value.to(gl.float32)
        squares = gl.convert_layout(gl.sum(wide * wide, 1), one_each, assert_trivial=True)
        large = times(large, gl.load(norm.weight + column, mask=there, other=0.0))
    return _pairs(large, W, one_each), squares


@gluon.constexpr_function
def _same_token(tokens):
    """How far the lanes lie apart that have x of the same token."""
    return tuple(d for d in (1, 2, 4, 8, 16) if d < 4 or d >= 4 * tokens)


@gluon.jit
def _block(
    x,
    norm,
    b,
    r,
    column,
    of_x,
    TOKENS: gl.constexpr,
    T: gl.constexpr,
    W: gl.constexpr,
    S: gl.constexpr,
    K: gl.constexpr,
    one_each: gl.constexpr,
):
    """The right operands of a block of columns, by step and group; the lane's sum of squares.

    A lane's eight columns of x for a set are of token r % T and of group r / T of the set.
    """
    xs = ()
    squares = gl.zeros([W * 32], gl.float32, layout=one_each)
    for s in gl.static_range(S):
        for i in gl.static_range(T):
            columns = column + b * (256 * S * W) + (s * 256 + i * (256 // T))
            there = (columns < K) & (of_x < TOKENS)
            v, more = _inputs(x, norm, of_x, columns, there, W, one_each)
            squares += more
            for g in gl.static_range(8 // T):
                mine = r // T == g
                xs = xs + (
                    (
                        gl.where(mine, v[0], 0),
                        gl.where(mine, v[1], 0),
                        gl.where(mine, v[2], 0),
                        gl.where(mine, v[3], 0),
                    ),
                )
    return xs, squares


@gluon.jit
def _next_turn(
    at,
    tile,
    block,
    count,
    left,
    TILES: gl.constexpr,
    ACROSS: gl.constexpr,
    BLOCKS: gl.constexpr,
    MOST: gl.constexpr,
):
    """Where the stream goes on after a tile's steps of a block: the tile below; after the `count`
    tiles of a pass the next block of columns, then the next pass over the `left` tiles."""
    at += TILES
    if BLOCKS > 1:
        tile += 1
        if tile == count:
            tile = 0
            block += 1
            at += ACROSS - count * TILES
            if block == BLOCKS:
                block = 0
                at += count * TILES - BLOCKS * ACROSS
                left -= count
                count = gl.minimum(left, MOST)
    return at, tile, block, count, left


@gluon.jit
def _parts_there(block, warp, q, s: gl.constexpr, S: gl.constexpr, W: gl.constexpr, TILES):
    """Which parts of a step there are, for `copy_step`."""
    first = ((block * W + warp) * S + s) * 2
    both = (first < TILES).to(gl.int32) + (first + 1 < TILES).to(gl.int32) * 2
    return both + (first + (q >> 1) < TILES).to(gl.int32) * 4


@gluon.jit
def stream_kernel(
    x,
    weight,
    norm,
    epilogue,
    N: gl.constexpr,
    TOKENS: gl.constexpr,
    T: gl.constexpr,
    DOWN: gl.constexpr,
    PROGRAMS: gl.constexpr,
    W: gl.constexpr,
    S: gl.constexpr,
    DEPTH: gl.constexpr,
    PACE: gl.constexpr,
    MOST: gl.constexpr,
    AHEAD: gl.constexpr,
    PROGRAMMATIC: gl.constexpr,
):
    """y [TOKENS, N] = epilogue(x [TOKENS, K] · wᵀ); `x` are Rows, w has DOWN times 16 rows.

    T is 1, 2, 4 or 8, at least TOKENS. Each of W warps has x of S steps of a block of columns in
    its registers and DEPTH steps, a multiple of S, in its ring. A program sums up MOST tiles in a
    pass. AHEAD says that the weight is a constant. Of a HALVED weight a tile is eight gate rows and
    their up rows. With a `norm` x is normed by it first.
    """
    K: gl.constexpr = weight.K
    TILES: gl.constexpr = weight.TILES
    ROWS: gl.constexpr = 8 if weight.HALVED else 16
    ACROSS: gl.constexpr = 2 * S * W
    BLOCKS: gl.constexpr = (TILES + ACROSS - 1) // ACROSS
    RAGGED: gl.constexpr = TILES % ACROSS != 0
    RING: gl.constexpr = W * DEPTH * STEP_BYTES
    PART: gl.constexpr = MOST * W * T * 64
    SQUARES: gl.constexpr = W * T * 4
    # Shared memory: the ring; of two passes the sums [tile, warp, 16, T] and the squares [warp, T];
    # a line that nothing else uses.
    USED: gl.constexpr = RING + 2 * PART + 2 * SQUARES
    LINES: gl.constexpr = (USED + 128 * W - 1) // (128 * W) + 1
    # Groups of a set.
    G: gl.constexpr = 8 // T
    one_each: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    eight_each: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [W, 1], [1, 0])

    thread = gl.arange(0, 32 * W, layout=one_each)
    if PROGRAMMATIC:
        statement("griddepcontrol.launch_dependents; mov.b32 $0, 0;", thread)
        if not AHEAD:
            statement("griddepcontrol.wait; mov.b32 $0, 0;", thread)
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
    ring = base + warp * (DEPTH * STEP_BYTES) + lane * 16
    ring_scales = base + warp * (DEPTH * STEP_BYTES) + CODE_BYTES + lane * 4
    sums = base + RING + warp * (T * 64) + (r * T + q * 2 % T) * 4
    program = gl.program_id(0)
    first = program * DOWN // PROGRAMS
    last = (program + 1) * DOWN // PROGRAMS
    steps = (last - first) * (BLOCKS * S)

    codes = weight.data.to(gl.int64) + (warp * (S * CODE_BYTES) + lane * 16).to(gl.int64)
    of_lane = warp * (S * 128) + (q >> 1) * 64 + r * 8 + (q & 1) * 4
    scales = weight.scales.to(gl.int64) + of_lane.to(gl.int64)
    at = first * TILES
    tile = 0
    block = 0
    left = last - first
    count = gl.minimum(left, MOST)
    for turn in gl.static_range(DEPTH // S):
        for s in gl.static_range(S):
            if AHEAD and turn * S + s >= PACE:
                statement(on_their_way(PACE - 1), thread)
            parts = thread
            if RAGGED:
                parts = _parts_there(block, warp, q, s, S, W, TILES)
            copy_step(
                ring + (turn * S + s) * STEP_BYTES,
                ring_scales + (turn * S + s) * STEP_BYTES,
                codes + at.to(gl.int64) * 1024 + s * CODE_BYTES,
                scales + at.to(gl.int64) * 64 + s * 128,
                thread * 0 + (turn * S + s < steps).to(gl.int32),
                parts,
                RAGGED,
            )
        at, tile, block, count, left = _next_turn(
            at, tile, block, count, left, TILES, ACROSS, BLOCKS, MOST
        )
    if PROGRAMMATIC and AHEAD:
        statement("griddepcontrol.wait; mov.b32 $0, 0;", thread)

    place = gl.expand_dims(gl.arange(0, 32 * W, layout=gl.SliceLayout(1, eight_each)), 1)
    eight = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, eight_each)), 0)
    of_x = place // 4 % T
    column = place // 32 * (256 * S) + place % 32 // 4 // T * 32 + place % 4 * 8 + eight
    zero = gl.zeros([32 * W], gl.float32, layout=one_each)
    none = (zero, zero, zero, zero)
    if T <= 2:
        none = none + none
    statement(on_their_way(DEPTH - 1), thread)
    upper0 = four_words(ring)
    lower0 = four_words(ring + 512)
    upper1 = four_words(ring + 1024)
    lower1 = four_words(ring + 1536)
    scale = word_at(ring_scales)
    squares = zero
    if BLOCKS == 1:
        xs, squares = _block(x, norm, 0, r, column, of_x, TOKENS, T, W, S, K, one_each)
        if norm is not None:
            squares = sum_over(squares, _same_token(T))
    place = 0
    done = 0
    side = 0
    begin = first
    while begin < last:
        held = gl.minimum(last - begin, MOST)
        of_pass = base + RING + 2 * PART + side * SQUARES
        if BLOCKS > 1:
            squares = zero
        for b in range(BLOCKS):
            if BLOCKS > 1:
                xs, more = _block(x, norm, b, r, column, of_x, TOKENS, T, W, S, K, one_each)
                squares += more
            to = sums + side * PART
            for _ in range(held):
                total = (zero, zero, zero, zero)
                for s in gl.static_range(S):
                    parts = thread
                    if RAGGED:
                        parts = _parts_there(block, warp, q, s, S, W, TILES)
                    copy_step(
                        ring + place * STEP_BYTES,
                        ring_scales + place * STEP_BYTES,
                        codes + at.to(gl.int64) * 1024 + s * CODE_BYTES,
                        scales + at.to(gl.int64) * 64 + s * 128,
                        thread * 0 + (done + DEPTH < steps).to(gl.int32),
                        parts,
                        RAGGED,
                    )
                    if s == S - 1:
                        at, tile, block, count, left = _next_turn(
                            at, tile, block, count, left, TILES, ACROSS, BLOCKS, MOST
                        )
                    done += 1
                    place += 1
                    if place == DEPTH:
                        place = 0
                    c = none
                    for g in gl.static_range(8):
                        if g == 4:
                            statement(on_their_way(DEPTH - 1), thread)
                            upper0 = four_words(ring + place * STEP_BYTES)
                            lower0 = four_words(ring + place * STEP_BYTES + 512)
                        if g < 4:
                            c = group_sums(upper0[g], lower0[g], xs[8 * s + g], c)
                        else:
                            c = group_sums(upper1[g - 4], lower1[g - 4], xs[8 * s + g], c)
                        if g % G == G - 1:
                            total = folded(total, c, scale, q, g // G, T)
                            c = none
                    upper1 = four_words(ring + place * STEP_BYTES + 1024)
                    lower1 = four_words(ring + place * STEP_BYTES + 1536)
                    scale = word_at(ring_scales + place * STEP_BYTES)
                for i in gl.static_range(4):
                    if T > 1 or i % 2 == 0:
                        number = total[i]
                        if T <= 2:
                            number = sum_over(number, (1, 2))
                        elif T == 4:
                            number = sum_over(number, (2,))
                        # Token i % 2 of the lane's two, row r or r + 8.
                        where = to + (i % 2 + i // 2 * 8 * T) * 4
                        if b > 0:
                            number += number_at(where)
                        put(where, number, (q * 2 < T).to(gl.int32))
                to += W * T * 64
        if norm is not None:
            if BLOCKS > 1:
                squares = sum_over(squares, _same_token(T))
            mine = (q == 0) & (r < T)
            put(of_pass + (warp * T + r % T) * 4, squares, mine.to(gl.int32))
        statement("bar.sync 0; mov.b32 $0, 0;", thread)
        for i in gl.static_range((MOST * T * ROWS + 32 * W - 1) // (32 * W)):
            at_sum = i * (32 * W) + thread
            of_tile = at_sum // (T * ROWS)
            of_y = at_sum // ROWS % T
            j = at_sum % ROWS
            from_ = base + RING + side * PART
            from_ += (gl.minimum(of_tile, MOST - 1) * (W * 16 * T) + j * T + of_y) * 4
            sum_ = zero
            up = zero
            for k in gl.static_range(W):
                sum_ += number_at(from_ + k * (64 * T))
                if weight.HALVED:
                    up += number_at(from_ + k * (64 * T) + 32 * T)
            sum_ *= REST
            up *= REST
            if norm is not None:
                rms = zero
                for k in gl.static_range(W):
                    rms += number_at(of_pass + (k * T + of_y) * 4)
                rms = gl.rsqrt(rms / K + norm.EPS)
                sum_ *= rms
                up *= rms
            row = (begin + of_tile) * ROWS + j
            in_rows = (of_tile < held) & (row < N)
            inside = in_rows & (of_y < TOKENS)
            finish(epilogue, epilogue.y, sum_, up, of_y, row, row, in_rows, inside, N)
        side = 1 - side
        begin += MOST
    memory._keep_alive()


def variant(product: Product) -> Iterator[GemmLaunch | Declined]:
    """One launch for up to eight tokens of bf16 and a weight in fragments."""
    packed = product.held.packed
    if packed is None or not packed.fragments:
        yield Declined("stream: the weight does not lie in fragments")
    elif product.heads > 1:
        yield Declined("stream: a head has a weight of its own")
    elif product.tokens > _MOST_TOKENS:
        yield Declined(f"stream: {product.tokens} tokens, expected at most {_MOST_TOKENS}")
    elif product.x_dtype != "bf16" or product.norm_dtype not in ("", "bf16"):
        yield Declined(f"stream: expected bf16, found x {product.x_dtype} {product.norm_dtype}")
    else:
        down, across = packed.tiles
        target = product.query.target
        shares = constants(product.tokens, down, across, target.multiprocessors)
        args = {
            "x": product.x,
            "weight": product.weight,
            "norm": product.norm,
            "epilogue": product.epilogue,
            "N": product.n,
            **shares,
            "AHEAD": product.held.constant,
        }
        call = Call(
            stream_kernel,
            args,
            (shares["PROGRAMS"], 1, 1),
            (product.epilogue.y,),
            num_warps=shares["W"],
            resident=RESIDENT,
            spreads=product.weight.HALVED,
        )
        yield GemmLaunch(call, "stream", "a stream of fragments for few tokens")


def constants(tokens: int, down: int, across: int, multiprocessors: int) -> dict[str, int]:
    """How a weight of `down` by `across` tiles is shared by programs and warps."""
    columns = 1 << (tokens - 1).bit_length()
    # For several tokens two steps' x does not fit into the registers.
    steps = (2, 1) if columns == 1 else (1,)
    # The fewest idle warps at the end of a row.
    pairs = -(-across // 2)
    held = min(steps, key=lambda held: -pairs % (_WARPS * held))
    return {
        "TOKENS": tokens,
        "T": columns,
        "DOWN": down,
        "PROGRAMS": multiprocessors,
        "W": _WARPS,
        "S": held,
        "DEPTH": 4 if held == 2 else 5,
        "PACE": _PACE,
        "MOST": min(-(-down // multiprocessors), _MOST_SUMS // columns),
    }
