"""Products of few tokens with an MXFP4 weight on AMD's matrix cores (Gluon).

The weight lies by rows, as it was stored. It is the right operand of v_mfma_f32_16x16x{16,32}_bf16,
in which lane 16·q + r holds eight columns of row r: here the same eighth of a group of 32 columns
of its own, so that a lane loads a whole group, 16 bytes, and one scale. Numbers are made of them in
registers; nothing goes through LDS but the sums of the warps, which take turns along K.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import AMDMFMALayout
from triton.experimental.gluon.language.amd.cdna3 import mfma

from ..request import Arg, Call, Codes, Declined, Ref, Request, Scales
from .activations import gated
from .mxfp4_decode import e8m0, scaled_numbers
from .norms import row_step

# The most tokens of one launch, and columns that share a scale.
FEW, GROUP = 16, 32
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
def _columns(t_bits, w_bits):
    """Layout of x [16, columns]; bits of a column: place in a word 0-2, g 3-4, q 5-6, t, w."""
    registers = [[0, p] for p in (1, 2, 4, 8, 16, *_powers(7, t_bits))]
    lanes = [[1, 0], [2, 0], [4, 0], [8, 0], [0, 32], [0, 64]]
    warps = [[0, p] for p in _powers(7 + t_bits, w_bits)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [16, 128 << t_bits + w_bits])


@gluon.jit
def _moved(words, scale):
    """Words i32 [...] of eight codes times `scale` -> bf16 [..., 2, 2, 2], by moving their bits.

    A pair holds codes i and i + 4 of a word, 2^126 times too small. All products are exact in bf16,
    which cuts nothing of them off.
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
    return gl.join(_cut(low), _cut(high))


@gluon.jit
def _cut(number):
    """The bf16 that is the high half of an f32."""
    return (number.to(gl.int32, bitcast=True) >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)


@gluon.jit
def _sums(
    x,
    a,
    acc,
    lx: gl.constexpr,
    la: gl.constexpr,
    W: gl.constexpr,
    ROWS: gl.constexpr,
    G: gl.constexpr,
):
    """acc + Σ over G of x [W, 16, 32, G] · a [W, 32, ROWS, G], halved until one is left."""
    if G == 1:
        left = gl.convert_layout(x.reshape([W, 16, 32]), lx, assert_trivial=True)
        right = gl.convert_layout(a.reshape([W, 32, ROWS]), la, assert_trivial=True)
        acc = mfma(left, right, acc)
    else:
        x0, x1 = gl.split(x.reshape([W, 16, 32, 2, G // 2]).permute(0, 1, 2, 4, 3))
        a0, a1 = gl.split(a.reshape([W, 32, ROWS, 2, G // 2]).permute(0, 1, 2, 4, 3))
        acc = _sums(x0, a0, acc, lx, la, W, ROWS, G // 2)
        acc = _sums(x1, a1, acc, lx, la, W, ROWS, G // 2)
    return acc


@gluon.jit
def _loaded(at_word, at_scale, group, K: gl.constexpr, STEP: gl.constexpr):
    """Words and scales of groups; past the last it is the last again, for x is zero there."""
    if K % STEP != 0:
        group = gl.minimum(group, K // 32 - 1)
    return gl.load(at_word + group * 4), gl.load(at_scale + group)


@gluon.jit
def mfma_kernel(
    x,
    codes,
    scales,
    bias,
    residual,
    y,
    tokens,
    N: gl.constexpr,
    K: gl.constexpr,
    X_STEP: gl.constexpr,
    RESIDUAL_STEP: gl.constexpr,
    GATE: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    SCALED: gl.constexpr,
    W: gl.constexpr,
    W_BITS: gl.constexpr,
    T: gl.constexpr,
    T_BITS: gl.constexpr,
    R: gl.constexpr,
    R_BITS: gl.constexpr,
):
    """y [tokens, N] = x [tokens, K] · wᵀ (+ bias, + residual) for a weight by rows.

    W warps of T times 128 columns make a step, R times 16 rows a program. With a GATE half of them
    are gate rows, the others their up rows, and y = act(gate) · up. SCALED says whether the target
    has scaled conversions; if so, it has MFMAs of 32 columns too.
    """
    ROWS: gl.constexpr = 16 * R
    mma: gl.constexpr = AMDMFMALayout(
        4 if SCALED else 3, [16, 16, 32 if SCALED else 16], False, [W, 1, 1]
    )
    lx: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    la: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    in_words: gl.constexpr = _words(R_BITS, T_BITS, W_BITS)
    in_x: gl.constexpr = _columns(T_BITS, W_BITS)
    STEP: gl.constexpr = W * T * 128
    STEPS: gl.constexpr = (K + STEP - 1) // STEP

    # Rows and tokens past the last are the last again, and are not stored: no load has a mask but
    # of x where columns end within a step.
    block = gl.program_id(0)
    place = gl.arange(0, W * T * R * 256, layout=in_words)
    row = place // 16 % ROWS
    if GATE is None:
        row = gl.minimum(block * ROWS + row, N - 1)
    else:
        column = gl.minimum(block * (ROWS // 2) + row % (ROWS // 2), N - 1)
        row = column + row // (ROWS // 2) * N
    group = place // (16 * ROWS) * 4 + place // 4 % 4
    at_word = codes.to(gl.pointer_type(gl.int32)) + (row.to(gl.int64) * (K // 8) + place % 4)
    at_scale = scales + row.to(gl.int64) * (K // 32)
    column = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, in_x)), 0)
    token = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(1, in_x)), 1)
    at_x = x + (gl.minimum(token, tokens - 1) * X_STEP + column)

    words, scale = _loaded(at_word, at_scale, group, K, STEP)
    acc = gl.zeros([W, 16, ROWS], gl.float32, layout=mma)
    for i in range(STEPS):
        if K % STEP == 0:
            xs = gl.load(at_x + i * STEP)
        else:
            xs = gl.load(at_x + i * STEP, mask=token * 0 + column < K - i * STEP, other=0.0)
        if SCALED:
            numbers = scaled_numbers(words, e8m0(scale), gl.bfloat16)
        else:
            numbers = _moved(words, e8m0(scale))
        # The next step's weights are asked for before this one's are used.
        ahead = gl.minimum(i + 1, STEPS - 1) * (STEP // 32)
        words, scale = _loaded(at_word, at_scale, ahead + group, K, STEP)
        # w, t, row, q, g, column -> w, (q, column), row, (t, g)
        numbers = numbers.reshape([W, T, ROWS, 4, 4, 8]).permute(0, 3, 5, 2, 1, 4)
        # token, w, t, q, g, column -> w, token, (q, column), (t, g)
        xs = xs.reshape([16, W, T, 4, 4, 8]).permute(1, 0, 3, 5, 2, 4)
        numbers = numbers.reshape([W, 32, ROWS, T * 4])
        acc = _sums(xs.reshape([W, 16, 32, T * 4]), numbers, acc, lx, la, W, ROWS, T * 4)

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


def takes(request: Request, tokens: int, weight: int) -> bool:
    """Whether mfma_call computes the product of `tokens` tokens with argument `weight`."""
    w = request.args[weight]
    return (
        request.target.name.startswith("hip")
        and tokens <= FEW
        and w.packed is not None
        and w.packed.group == GROUP
        and len(w.shape) == 2
        and w.type.dtype == request.args[0].type.dtype == "bf16"
    )


def mfma_call(
    request: Request,
    x: Ref,
    x_step: int,
    tokens: int,
    weight: int,
    y: Ref,
    *,
    bias: int | None,
    residual: int | None,
    gate: str | None,
) -> Call | Declined:
    """The launch of a product that `takes` approves."""
    n, k = request.args[weight].shape
    tall = 2 if n >= 32 * _MANY_PROGRAMS else 1
    programs = -(-n // (16 * tall))
    warps = 4 if programs >= _MANY_PROGRAMS else 8
    wide = 2 if k >= 256 * warps else 1
    args: dict[str, Any] = {
        "x": x,
        "codes": Codes(weight),
        "scales": Scales(weight),
        "y": y,
        "tokens": tokens,
    }
    constants: dict[str, Any] = {
        "N": n // 2 if gate else n,
        "K": k,
        "X_STEP": x_step,
        "RESIDUAL_STEP": 0,
        "GATE": gate,
        "ALPHA": float(request.attrs.get("alpha", 0.0)),
        "LIMIT": float(request.attrs.get("limit", 0.0)),
        "SCALED": request.target.scaled_conversions,
        "W": warps,
        "W_BITS": warps.bit_length() - 1,
        "T": wide,
        "T_BITS": wide.bit_length() - 1,
        "R": tall,
        "R_BITS": tall.bit_length() - 1,
    }
    if residual is not None:
        step = row_step(request.args[residual])
        if step is None:
            return Declined("the rows of the residual do not lie in one step")
        constants["RESIDUAL_STEP"] = step
    for name, position in (("bias", bias), ("residual", residual)):
        (constants if position is None else args)[name] = (
            None if position is None else Arg(position)
        )
    return Call(mfma_kernel, args, (programs, 1, 1), (y,), constants, num_warps=warps)
