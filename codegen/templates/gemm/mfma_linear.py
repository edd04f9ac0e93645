"""Products of few tokens with a weight, dense or in MXFP4, on AMD's matrix cores (Gluon).

The weight lies by rows, as it was stored. It is the right operand of v_mfma_f32_16x16x{16,32}, in
which lane 16·q + r holds eight columns of row r. Which eight is free, if x has the same: in MXFP4 a
quarter of a group of 32 columns of the lane's own, so that it loads a whole group, 16 bytes, and
one scale; else those beside the next lane's. Codes become numbers in registers; nothing goes
through LDS but the sums of the warps, which share K (split-K within a program), and normed rows.

A norm of x is taken along where there are few tokens: every program norms its rows, each element in
one lane, and lays them out for all. So a launch is saved, which takes longer than all of that.
"""

from __future__ import annotations

from collections.abc import Iterator

from triton import next_power_of_2
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import AMDMFMALayout
from triton.experimental.gluon.language.amd.cdna3 import mfma

from ...kernel_query import Call, Declined, KernelQuery
from ..pdl import pdl_wait
from .epilogue import finish
from .fragment_linear import powers
from .mxfp4_decode import e8m0, narrowed, scaled_numbers
from .product import FEW, GemmLaunch, Product

# Programs that fill a GPU several times over: fewer share each tile among more warps.
_MANY_PROGRAMS = 608
_TO_ONE = gl.constexpr(8.507059173023462e37)  # 2^126


@gluon.constexpr_function
def _words(R, T, W):
    """Layout of words of eight codes; bits of a place: g 0-1, q 2-3, row 4-7, r, t, w."""
    registers = [[p] for p in (1, 2, *powers(256, R * T))]
    lanes = [[16], [32], [64], [128], [4], [8]]
    warps = [[p] for p in powers(256 * R * T, W)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [256 * R * T * W])


@gluon.constexpr_function
def _columns(R, T, W, q_first):
    """Layout of rows of numbers [16·R, columns], a lane's eight columns at once.

    Bits of a column: place in its eight 0-2, q and g (with `q_first`) or g and q 3-6, t, w.
    """
    q, g = ([8, 16], [32, 64]) if q_first else ([32, 64], [8, 16])
    registers = [[0, p] for p in (1, 2, 4, *g, *powers(128, T))]
    registers += [[p, 0] for p in powers(16, R)]
    lanes = [[1, 0], [2, 0], [4, 0], [8, 0], *([0, p] for p in q)]
    warps = [[0, p] for p in powers(128 * T, W)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [16 * R, 128 * T * W])


@gluon.constexpr_function
def _repeated(T, W, q_first, room):
    """_columns of a token's row number in `room` rows: [16 / room, room, columns]."""
    held = _columns(1, T, W, q_first)
    bases = [
        [[token // room, token % room, column] for token, column in part]
        for part in (held.reg_bases, held.lane_bases, held.warp_bases)
    ]
    return gl.DistributedLinearLayout(*bases, [], [16 // room, room, W * T * 128])


@gluon.jit
def _scales_of(
    rows, norm, column, K: gl.constexpr, STEP: gl.constexpr, ROOM: gl.constexpr, held: gl.constexpr
):
    """1 / rms [ROOM, 1] of the rows at `rows` [ROOM, STEP], whose first STEP columns are `column`.

    A column's squares are added up first, whatever ROOM is: a token's sum is the same in all.
    """
    squares = gl.zeros([ROOM, STEP], gl.float32, layout=held)
    for i in range((K + STEP - 1) // STEP):
        value = _inside(rows, column, i, K, STEP).to(gl.float32)
        squares += value * value
    return gl.rsqrt(gl.expand_dims(gl.sum(squares, 1), 1) / K + norm.EPS)


@gluon.jit
def _inside(at, column, i, K: gl.constexpr, STEP: gl.constexpr):
    """Step i of rows of K columns, 0 beyond them; `column` has the shape of `at`."""
    if K % STEP == 0:
        return gl.load(at + i * STEP)
    else:
        return gl.load(at + i * STEP, mask=column < K - i * STEP, other=0.0)


@gluon.jit
def _moved(words, scale):
    """Words i32 [...] of eight codes times `scale` -> bf16 [..., 2, 2, 2], by moving their bits.

    A pair holds codes i and i + 4 of a word, 2^126 times too small.
    """
    sign: gl.constexpr = -2147450880  # 0x80008000
    rest: gl.constexpr = 29360576  # 0x01C001C0
    a = _times((words << 12) & sign | (words << 6) & rest, scale)
    b = _times((words << 8) & sign | (words << 2) & rest, scale)
    c = _times((words << 4) & sign | (words >> 2) & rest, scale)
    d = _times(words & sign | (words >> 6) & rest, scale)
    return gl.join(gl.join(a, c), gl.join(b, d))


@gluon.jit
def _times(pair, scale):
    low = (pair << 16).to(gl.float32, bitcast=True) * _TO_ONE * scale
    high = (pair & -65536).to(gl.float32, bitcast=True) * _TO_ONE * scale
    return gl.join(narrowed(low, gl.bfloat16), narrowed(high, gl.bfloat16))


@gluon.jit
def _sums(
    x,
    w,
    acc,
    lx: gl.constexpr,
    lw: gl.constexpr,
    W: gl.constexpr,
    ROWS: gl.constexpr,
    G: gl.constexpr,
):
    """acc + Σ over G of x [W, 16, 32, G] · w [W, 32, ROWS, G], halved until one is left."""
    if G == 1:
        left = gl.convert_layout(x.reshape([W, 16, 32]), lx, assert_trivial=True)
        right = gl.convert_layout(w.reshape([W, 32, ROWS]), lw, assert_trivial=True)
        acc = mfma(left, right, acc)
    else:
        x0, x1 = gl.split(x.reshape([W, 16, 32, 2, G // 2]).permute(0, 1, 2, 4, 3))
        w0, w1 = gl.split(w.reshape([W, 32, ROWS, 2, G // 2]).permute(0, 1, 2, 4, 3))
        acc = _sums(x0, w0, acc, lx, lw, W, ROWS, G // 2)
        acc = _sums(x1, w1, acc, lx, lw, W, ROWS, G // 2)
    return acc


@gluon.jit
def _loaded(at_w, at_scale, unit, K: gl.constexpr, STEP: gl.constexpr, GROUP: gl.constexpr):
    """Words and scales of groups, or numbers of eights of columns; past the last it is the last
    again, for x is zero there."""
    columns: gl.constexpr = 8 if GROUP == 0 else GROUP
    if K % STEP != 0:
        unit = gl.minimum(unit, K // columns - 1)
    if GROUP == 0:
        return gl.load(at_w + unit * 8), 0
    else:
        return gl.load(at_w + unit * (GROUP // 8)), gl.load(at_scale + unit)


@gluon.jit
def _numbers(
    held,
    scale,
    GROUP: gl.constexpr,
    SCALED: gl.constexpr,
    W: gl.constexpr,
    T: gl.constexpr,
    ROWS: gl.constexpr,
):
    """What _loaded gave as an operand [W, 32, ROWS, T * 4], the last dim of MFMAs."""
    if GROUP == 0:
        # row, w, t, g, q, column -> w, (q, column), row, (t, g)
        found = held.reshape([ROWS, W, T, 4, 4, 8]).permute(1, 4, 5, 0, 2, 3)
    else:
        if SCALED:
            four: gl.constexpr = [W * T * ROWS * 4, 2, 2]
            scale = e8m0(scale).reshape(four)
            found = scaled_numbers(held.reshape(four), scale, gl.bfloat16)
        else:
            found = _moved(held, e8m0(scale))
        # w, t, row, q, g, column -> w, (q, column), row, (t, g)
        found = found.reshape([W, T, ROWS, 4, 4, 8]).permute(0, 3, 5, 2, 1, 4)
    return found.reshape([W, 32, ROWS, T * 4])


@gluon.jit
def mfma_kernel(
    x,
    weight,
    norm,
    epilogue,
    tokens,
    N: gl.constexpr,
    VERSION: gl.constexpr,
    W: gl.constexpr,
    T: gl.constexpr,
    R: gl.constexpr,
    ROOM: gl.constexpr,
    PROGRAMMATIC: gl.constexpr,
):
    """y [tokens, N] = epilogue(x [tokens, K] · wᵀ) for a weight by rows; `x` are Rows.

    W warps of T times 128 columns make a step, R times 16 rows a program. Of a HALVED weight half
    of them are gate rows, the others their up rows. VERSION is of the matrix cores. With a `norm`
    rows of x are normed by it first, ROOM (a power of two, not below `tokens`) at once.
    """
    pdl_wait(PROGRAMMATIC)
    K: gl.constexpr = weight.K
    GROUP: gl.constexpr = weight.GROUP
    ROWS: gl.constexpr = 16 * R
    mma: gl.constexpr = AMDMFMALayout(
        VERSION, [16, 16, 32 if VERSION == 4 else 16], False, [W, 1, 1]
    )
    lx: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    lw: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    in_x: gl.constexpr = _columns(1, T, W, GROUP == 0)
    STEP: gl.constexpr = W * T * 128
    STEPS: gl.constexpr = (K + STEP - 1) // STEP
    UNITS: gl.constexpr = STEP // (8 if GROUP == 0 else GROUP)

    # Rows and tokens past the last are the last again, and are not stored: no load has a mask but
    # of x where columns end within a step.
    block = gl.program_id(0)
    if GROUP == 0:
        in_w: gl.constexpr = _columns(R, T, W, True)
        row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, in_w)), 1)
        place = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, in_w)), 0)
        unit = place // 8
    else:
        place = gl.arange(0, W * T * R * 256, layout=_words(R, T, W))
        row = place // 16 % ROWS
        unit = place // (16 * ROWS) * 4 + place // 4 % 4
    if not weight.HALVED:
        row = gl.minimum(block * ROWS + row, N - 1)
    else:
        column = gl.minimum(block * (ROWS // 2) + row % (ROWS // 2), N - 1)
        row = column + row // (ROWS // 2) * N
    if GROUP == 0:
        at_w = weight.data + (row.to(gl.int64) * K + place % 8)
        at_scale = weight.data
    else:
        at_w = weight.data.to(gl.pointer_type(gl.int32)) + (row.to(gl.int64) * (K // 8) + place % 4)
        at_scale = weight.scales + row.to(gl.int64) * (K // GROUP)
    column = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, in_x)), 0)
    token = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(1, in_x)), 1)
    column = token * 0 + column
    at_x = x.data + (gl.minimum(token, tokens - 1) * x.STEP + column)

    held, scale = _loaded(at_w, at_scale, unit, K, STEP, GROUP)
    if norm is not None:
        flat: gl.constexpr = gl.BlockedLayout([1, 2 * T], [1, 64], [1, W], [1, 0])
        spread: gl.constexpr = _repeated(T, W, GROUP == 0, ROOM)
        column = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, flat)), 0)
        at_gain = norm.weight + column
        first = column
        token = gl.expand_dims(gl.arange(0, ROOM, layout=gl.SliceLayout(1, flat)), 1)
        column = token * 0 + column
        at_x = x.data + (gl.minimum(token, tokens - 1) * x.STEP + column)
        of_tokens = _scales_of(at_x, norm, column, K, STEP, ROOM, flat)
        copies = gl.zeros([16 // ROOM, ROOM, STEP], x.data.dtype.element_ty, layout=spread)
    acc = gl.zeros([W, 16, ROWS], gl.float32, layout=mma)
    for i in range(STEPS):
        xs = _inside(at_x, column, i, K, STEP)
        if norm is not None:
            gain = _inside(at_gain, first, i, K, STEP).to(gl.float32)
            xs = (xs.to(gl.float32) * of_tokens * gain).to(xs.dtype)
            xs = gl.expand_dims(gl.convert_layout(xs, gl.SliceLayout(0, spread)), 0)
            xs = gl.broadcast(xs, copies)[0].reshape([16, STEP])
            xs = gl.convert_layout(xs, in_x, assert_trivial=True)
        numbers = _numbers(held, scale, GROUP, weight.SCALED, W, T, ROWS)
        # The next step's weights are asked for before this one's are used.
        ahead = gl.minimum(i + 1, STEPS - 1) * UNITS
        held, scale = _loaded(at_w, at_scale, ahead + unit, K, STEP, GROUP)
        # token, w, t, two of q and g, column -> w, token, (q, column), (t, g)
        if GROUP == 0:
            xs = xs.reshape([16, W, T, 4, 4, 8]).permute(1, 0, 4, 5, 2, 3)
        else:
            xs = xs.reshape([16, W, T, 4, 4, 8]).permute(1, 0, 3, 5, 2, 4)
        acc = _sums(xs.reshape([W, 16, 32, T * 4]), numbers, acc, lx, lw, W, ROWS, T * 4)

    total = gl.sum(acc, 0)
    up = total
    if not weight.HALVED:
        WIDTH: gl.constexpr = ROWS
        stored: gl.constexpr = gl.BlockedLayout([1, 1], [4, 16], [W, 1], [1, 0])
    else:
        WIDTH: gl.constexpr = ROWS // 2
        stored: gl.constexpr = gl.BlockedLayout([1, 1], [8, 8], [W, 1], [1, 0])
        # A lane has both halves of a token.
        whole: gl.constexpr = gl.BlockedLayout([1, ROWS], [16, 4], [1, W], [1, 0])
        total = gl.convert_layout(total, whole)
        total, up = gl.split(total.reshape([16, 2, ROWS // 2]).permute(0, 2, 1))
        up = gl.convert_layout(up, stored)
    total = gl.convert_layout(total, stored)
    column = block * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, stored))
    token = gl.arange(0, 16, layout=gl.SliceLayout(1, stored))
    column, token = gl.expand_dims(column, 0), gl.expand_dims(token, 1)
    inside = (column < N) & (token < tokens)
    finish(epilogue, epilogue.y, total, up, token, column, column, column < N, inside, N)


def on_matrix_cores(query: KernelQuery, tokens: int) -> str:
    """Why the kernel does not multiply `tokens` tokens by argument 1; empty where it does."""
    x, w = query.args[:2]
    dtype = w.type.dtype
    if not query.target.mfma:
        return "the target has no MFMA"
    if tokens > FEW or len(w.shape) != 2:
        return f"{tokens} tokens by {w.type}: expected at most {FEW} and one matrix"
    if w.packed:
        fits = w.packed.group == 32 and dtype == "bf16"
    else:
        fits = w.dense and w.shape[1] % 8 == 0 and dtype in ("bf16", "f16")
    if not fits or dtype != x.type.dtype:
        return f"x {x.type} by {w.type}: expected rows of eights of bf16 or f16, or groups of 32"
    return ""


def variant(product: Product) -> Iterator[GemmLaunch | Declined]:
    """One launch for few tokens."""
    query, weight = product.query, product.weight
    if why := on_matrix_cores(query, product.tokens):
        yield Declined(f"mfma: {why}")
    elif weight.COLUMN != 1:
        yield Declined("mfma: expected rows of a weight")
    else:
        tall = 2 if weight.N >= 32 * _MANY_PROGRAMS else 1
        programs = -(-weight.N // (16 * tall))
        warps = 4 if programs >= _MANY_PROGRAMS else 8
        args = {
            "x": product.x,
            "weight": weight,
            "norm": product.norm,
            "epilogue": product.epilogue,
            "tokens": product.tokens,
            "N": product.n,
            "VERSION": query.target.mfma,
            "W": warps,
            "T": 2 if 256 * warps <= weight.K else 1,
            "R": tall,
            "ROOM": next_power_of_2(product.tokens) if product.norm else 1,
        }
        call = Call(mfma_kernel, args, (programs, 1, 1), (product.epilogue.y,), num_warps=warps)
        yield GemmLaunch(call, "mfma", "fragments in registers for few tokens")
