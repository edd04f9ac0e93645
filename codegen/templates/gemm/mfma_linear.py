"""Products of few tokens with a weight, dense or in MXFP4, on AMD's matrix cores (Gluon).

The weight lies by rows, as it was stored. It is the right operand of v_mfma_f32_16x16x{16,32}, in
which lane 16·q + r holds eight columns of row r. Which eight is free, if x has the same: in MXFP4 a
quarter of a group of 32 columns of the lane's own, so that it loads a whole group, 16 bytes, and
one scale; else those beside the next lane's. Codes become numbers in registers; nothing goes
through LDS but the sums of the warps, which take turns along K.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import AMDMFMALayout
from triton.experimental.gluon.language.amd.cdna3 import mfma

from ...kernel_query import Arg, Call, Codes, Declined, KernelQuery, Ref, Scales, present
from ..pdl import pdl_wait
from ..rowwise.norms import row_step
from .activations import gated
from .fragment_linear import FEW
from .mxfp4_decode import e8m0, narrowed, scaled_numbers

# Programs that fill a GPU several times over: fewer share each tile among more warps.
_MANY_PROGRAMS = 608
_TO_ONE = gl.constexpr(8.507059173023462e37)  # 2^126


@gluon.constexpr_function
def _powers(first, count):
    return [1 << (first + i) for i in range(count)]


@gluon.constexpr_function
def _words(r_bits, t_bits, w_bits):
    """Layout of words of eight codes; bits of a place: g 0-1, q 2-3, row 4-7, r, t, w."""
    registers = [[p] for p in (1, 2, *_powers(8, r_bits + t_bits))]
    lanes = [[16], [32], [64], [128], [4], [8]]
    warps = [[p] for p in _powers(8 + r_bits + t_bits, w_bits)]
    return gl.DistributedLinearLayout(
        registers, lanes, warps, [], [256 << r_bits + t_bits + w_bits]
    )


@gluon.constexpr_function
def _columns(r_bits, t_bits, w_bits, q_first):
    """Layout of rows of numbers [16 << r_bits, columns], a lane's eight columns at once.

    Bits of a column: place in its eight 0-2, q and g (with `q_first`) or g and q 3-6, t, w.
    """
    q, g = ([8, 16], [32, 64]) if q_first else ([32, 64], [8, 16])
    registers = [[0, p] for p in (1, 2, 4, *g, *_powers(7, t_bits))]
    registers += [[p, 0] for p in _powers(4, r_bits)]
    lanes = [[1, 0], [2, 0], [4, 0], [8, 0], *([0, p] for p in q)]
    warps = [[0, p] for p in _powers(7 + t_bits, w_bits)]
    shape = [16 << r_bits, 128 << t_bits + w_bits]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


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
    w,
    scales,
    bias,
    residual,
    y,
    tokens,
    N: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    X_STEP: gl.constexpr,
    RESIDUAL_STEP: gl.constexpr,
    GATE: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    VERSION: gl.constexpr,
    SCALED: gl.constexpr,
    W: gl.constexpr,
    W_BITS: gl.constexpr,
    T: gl.constexpr,
    T_BITS: gl.constexpr,
    R: gl.constexpr,
    R_BITS: gl.constexpr,
    PROGRAMMATIC: gl.constexpr,
):
    """y [tokens, N] = x [tokens, K] · wᵀ (+ bias, + residual) for a weight by rows.

    W warps of T times 128 columns make a step, R times 16 rows a program. With a GATE half of them
    are gate rows, the others their up rows, and y = act(gate) · up. GROUP is 0 for a dense weight.
    VERSION is of the matrix cores, SCALED says whether the target has scaled conversions.
    """
    pdl_wait(PROGRAMMATIC)
    ROWS: gl.constexpr = 16 * R
    mma: gl.constexpr = AMDMFMALayout(
        VERSION, [16, 16, 32 if VERSION == 4 else 16], False, [W, 1, 1]
    )
    lx: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    lw: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    in_x: gl.constexpr = _columns(0, T_BITS, W_BITS, GROUP == 0)
    STEP: gl.constexpr = W * T * 128
    STEPS: gl.constexpr = (K + STEP - 1) // STEP
    UNITS: gl.constexpr = STEP // (8 if GROUP == 0 else GROUP)

    # Rows and tokens past the last are the last again, and are not stored: no load has a mask but
    # of x where columns end within a step.
    block = gl.program_id(0)
    if GROUP == 0:
        in_w: gl.constexpr = _columns(R_BITS, T_BITS, W_BITS, True)
        row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, in_w)), 1)
        place = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, in_w)), 0)
        unit = place // 8
    else:
        place = gl.arange(0, W * T * R * 256, layout=_words(R_BITS, T_BITS, W_BITS))
        row = place // 16 % ROWS
        unit = place // (16 * ROWS) * 4 + place // 4 % 4
    if GATE is None:
        row = gl.minimum(block * ROWS + row, N - 1)
    else:
        column = gl.minimum(block * (ROWS // 2) + row % (ROWS // 2), N - 1)
        row = column + row // (ROWS // 2) * N
    if GROUP == 0:
        at_w = w + (row.to(gl.int64) * K + place % 8)
        at_scale = w
    else:
        at_w = w.to(gl.pointer_type(gl.int32)) + (row.to(gl.int64) * (K // 8) + place % 4)
        at_scale = scales + row.to(gl.int64) * (K // GROUP)
    column = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, in_x)), 0)
    token = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(1, in_x)), 1)
    at_x = x + (gl.minimum(token, tokens - 1) * X_STEP + column)

    held, scale = _loaded(at_w, at_scale, unit, K, STEP, GROUP)
    acc = gl.zeros([W, 16, ROWS], gl.float32, layout=mma)
    for i in range(STEPS):
        if K % STEP == 0:
            xs = gl.load(at_x + i * STEP)
        else:
            xs = gl.load(at_x + i * STEP, mask=token * 0 + column < K - i * STEP, other=0.0)
        numbers = _numbers(held, scale, GROUP, SCALED, W, T, ROWS)
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
    if GATE is None:
        stored: gl.constexpr = gl.BlockedLayout([1, 1], [4, 16], [W, 1], [1, 0])
        total = gl.convert_layout(total, stored)
        row = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(0, stored))
        token = gl.arange(0, 16, layout=gl.SliceLayout(1, stored))
        row, token = gl.expand_dims(row, 0), gl.expand_dims(token, 1)
        inside = (row < N) & (token < tokens)
        if bias is not None:
            total += gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32)
        if residual is not None:
            at = residual + token.to(gl.int64) * RESIDUAL_STEP + row
            total += gl.load(at, mask=inside, other=0.0).to(gl.float32)
    else:
        halves: gl.constexpr = gl.BlockedLayout([1, 1], [8, 8], [W, 1], [1, 0])
        # A lane has both halves of a token.
        whole: gl.constexpr = gl.BlockedLayout([1, ROWS], [16, 4], [1, W], [1, 0])
        total = gl.convert_layout(total, whole)
        gate, up = gl.split(total.reshape([16, 2, ROWS // 2]).permute(0, 2, 1))
        gate = gl.convert_layout(gate, halves)
        up = gl.convert_layout(up, halves)
        row = block * (ROWS // 2) + gl.arange(0, ROWS // 2, layout=gl.SliceLayout(0, halves))
        token = gl.arange(0, 16, layout=gl.SliceLayout(1, halves))
        row, token = gl.expand_dims(row, 0), gl.expand_dims(token, 1)
        inside = (row < N) & (token < tokens)
        if bias is not None:
            gate += gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32)
            up += gl.load(bias + N + row, mask=row < N, other=0.0).to(gl.float32)
        total = gated(gate, up, GATE, ALPHA, LIMIT)
    gl.store(y + token.to(gl.int64) * N + row, total.to(y.dtype.element_ty), mask=inside)


def takes(query: KernelQuery, tokens: int, weight: int) -> bool:
    """Whether mfma_call computes the product of `tokens` tokens with argument `weight`."""
    w = query.args[weight]
    dtype = w.type.dtype
    if tokens > FEW or len(w.shape) != 2 or dtype != query.args[0].type.dtype:
        return False
    if w.packed:
        fits = w.packed.group == 32 and dtype == "bf16"
    else:
        fits = w.dense and w.shape[1] % 8 == 0 and dtype in ("bf16", "f16")
    return fits and query.target.mfma > 0


def mfma_call(
    query: KernelQuery,
    x: Ref,
    x_step: int,
    tokens: int,
    weight: int,
    y: Ref,
    *,
    bias: Arg | None,
    residual: Arg | None,
    gate: str | None,
) -> Call | Declined:
    """The launch of a product that `takes` approves."""
    packed = query.args[weight].packed
    n, k = query.args[weight].shape
    tall = 2 if n >= 32 * _MANY_PROGRAMS else 1
    programs = -(-n // (16 * tall))
    warps = 4 if programs >= _MANY_PROGRAMS else 8
    wide = 2 if k >= 256 * warps else 1
    args: dict[str, Any] = {
        "x": x,
        "w": Codes(weight) if packed else Arg(weight),
        "y": y,
        "tokens": tokens,
    }
    constants: dict[str, Any] = {
        "N": n // 2 if gate else n,
        "K": k,
        "GROUP": packed.group if packed else 0,
        "X_STEP": x_step,
        "RESIDUAL_STEP": 0,
        "GATE": gate,
        "ALPHA": float(query.attrs.get("alpha", 0.0)),
        "LIMIT": float(query.attrs.get("limit", 0.0)),
        "VERSION": query.target.mfma,
        "SCALED": packed is not None and query.target.scaled_conversions,
        "W": warps,
        "W_BITS": warps.bit_length() - 1,
        "T": wide,
        "T_BITS": wide.bit_length() - 1,
        "R": tall,
        "R_BITS": tall.bit_length() - 1,
    }
    (args if packed else constants)["scales"] = Scales(weight) if packed else None
    if residual is not None:
        step = row_step(query.args[residual.index])
        if step is None:
            return Declined("the rows of the residual do not lie in one step")
        constants["RESIDUAL_STEP"] = step
    given, missing = present({"bias": bias, "residual": residual})
    args |= given
    constants |= missing
    return Call(mfma_kernel, args, (programs, 1, 1), (y,), constants, num_warps=warps)
