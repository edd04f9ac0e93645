"""Products of few tokens with an MXFP4 weight that lies as tensor cores take it (Gluon, NVIDIA).

The weight (see compiler.ops.mxfp4_fragments) is the left operand of mma.m16n8k16. Every lane loads
16 bytes at once and makes the fragments of them in registers: nothing goes through shared memory,
and each group of 32 columns is scaled after its own sum, in f32. A program computes one tile of 16
rows for up to 16 tokens; its warps share K (split-K within a program), and their sums are added at
the end.

Codes become bf16 numbers 2^126 times too small. So that their products stay normal numbers, x is
taken 2^64 times too large; 2^62 is left for the end. (An x beyond 2^63 overflows.)

A norm of x is taken along: x is multiplied by the norm's weight where it is read, and the sums at
the end by 1 / rms of their token, found then: x is near, and registers are free.
"""

from __future__ import annotations

from collections.abc import Iterator

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ...kernel_query import Call, Declined
from .epilogue import finish
from .product import GemmLaunch, Product

# Programs that fill a GPU several times over: fewer share each tile among more warps.
_MANY_PROGRAMS = 528
_REST = gl.constexpr(4611686018427387904.0)  # 2^62


@gluon.constexpr_function
def _vector(size, registers, lanes, warps):
    """A layout of `size` elements in one dim; each bit of the three indices steps so many on."""
    bases = [[[step] for step in steps] for steps in (registers, lanes, warps)]
    return gl.DistributedLinearLayout(*bases, [], [size])


@gluon.constexpr_function
def powers(first, count):
    """first · 1, 2, 4, … below first · count, a power of two."""
    return [first << i for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def _columns_by_k(W, T):
    """Layout of x [8, W·T·128]: the right operand's fragments, a lane's eight columns at once."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], *([0, p] for p in powers(128, T))]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    warps = [[0, p] for p in powers(128 * T, W)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [8, W * T * 128])


@gluon.jit
def unpacked(codes):
    """Bytes of words (in registers, four at a time) -> bf16 of their columns 0 … 3 and 4 … 7."""
    first, second = gl.inline_asm_elementwise(
        """{
        .reg .b32 b, c, d, e;
        and.b32 $0, $4, 0x81C081C0;
        shf.r.wrap.b32 b, $4, $4, 6;
        and.b32 $1, b, 0x81C081C0;
        shl.b32 c, $4, 6;
        and.b32 $2, c, 0x81C081C0;
        shl.b32 d, $4, 4;
        and.b32 d, d, 0x81808180;
        shr.b32 e, $4, 4;
        and.b32 e, e, 0x00400040;
        or.b32 $3, d, e;
        }""",
        "=&r,=&r,=&r,=&r,r",
        [codes],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=4,
    )
    return first, second


@gluon.jit
def raised(x):
    """bf16 times 2^64."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 c; mov.b32 c, 0x5F805F80; mul.rn.bf16x2 $0, $1, c; }",
        "=r,r",
        [x],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def times(x, y):
    """The product of two bf16, rounded once."""
    return gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def arrived(zero):
    """Let the launches that follow begin, wait for those before; 0, for addresses to depend on."""
    return gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, 0;",
        "=r,r",
        [zero],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _sums(
    a,
    x,
    s,
    acc,
    la: gl.constexpr,
    lb: gl.constexpr,
    mma: gl.constexpr,
    W: gl.constexpr,
    G: gl.constexpr,
):
    """acc + Σ over G groups of (a [W, 16, G, 32] · x [W, G, 32, 8]) · s [W, 16, G].

    Halved until one group is left: which registers hold it is known then.
    """
    if G == 1:
        left = gl.convert_layout(a.reshape([W, 16, 32]), la, assert_trivial=True)
        right = gl.convert_layout(x.reshape([W, 32, 8]), lb, assert_trivial=True)
        part = mma_v2(left, right, gl.zeros([W, 16, 8], gl.float32, layout=mma))
        scale = gl.convert_layout(s.reshape([W, 16]), gl.SliceLayout(2, mma), assert_trivial=True)
        acc = acc + part * gl.expand_dims(scale, 2)
    else:
        a0, a1 = gl.split(a.reshape([W, 16, 2, G // 2, 32]).permute(0, 1, 3, 4, 2))
        x0, x1 = gl.split(x.reshape([W, 2, G // 2, 32, 8]).permute(0, 2, 3, 4, 1))
        s0, s1 = gl.split(s.reshape([W, 16, 2, G // 2]).permute(0, 1, 3, 2))
        acc = _sums(a0, x0, s0, acc, la, lb, mma, W, G // 2)
        acc = _sums(a1, x1, s1, acc, la, lb, mma, W, G // 2)
    return acc


@gluon.jit
def _in_groups(x, W: gl.constexpr, T: gl.constexpr):
    """Columns of x [8, W·T·128] as [W, T·4, 32, 8], in the order of the fragments."""
    # n, w, t, g, q, s, b1, b0 -> w, t, g, (s, b1, q, b0), n
    x = x.reshape([8, W, T, 4, 4, 2, 2, 2]).permute(1, 2, 3, 5, 6, 4, 7, 0)
    return x.reshape([W, T * 4, 32, 8])


@gluon.jit
def _weights(codes, scales, W: gl.constexpr, T: gl.constexpr):
    """Numbers bf16 [W, 16, T·4, 32] and scales f32 [W, 16, T·4] of W·T tiles."""
    # w, t, rh, r, q, g, byte -> w, rh, r, q, byte, t, g; a byte's place is (b1, b0)
    words = codes.reshape([W, T, 2, 8, 4, 4, 4]).permute(0, 2, 3, 4, 6, 1, 5)
    first, second = unpacked(words)
    both = gl.join(first, second).reshape([W, 2, 8, 4, 2, 2, T, 4, 2])
    # w, rh, r, q, b1, b0, t, g, s -> w, (rh, r), (t, g), (s, b1, q, b0)
    numbers = both.permute(0, 1, 2, 6, 7, 8, 4, 3, 5).reshape([W, 16, T * 4, 32])
    # w, t, r, g / 2, rh, g % 2 -> w, (rh, r), (t, g)
    exponent = scales.reshape([W, T, 8, 2, 2, 2]).permute(0, 4, 2, 1, 3, 5).reshape([W, 16, T * 4])
    bits = exponent.to(gl.int32) << 23
    # 0 stands for 2^-127, which is subnormal. 255, which is NaN, gives infinity: no finite result.
    bits = gl.maximum(bits, 0x00400000)
    return numbers, bits.to(gl.float32, bitcast=True)


@gluon.jit
def _scales_of(
    x,
    norm,
    first,
    stop,
    of: gl.constexpr,
    K: gl.constexpr,
    W: gl.constexpr,
):
    """1 / rms of tokens `first` to `stop`, eight at most, in the layout `of`.

    Each lane has partial sums of all eight: lanes and warps meet once.
    """
    CHUNK: gl.constexpr = 256 * W
    across: gl.constexpr = gl.BlockedLayout([8], [32], [W], [0])
    held: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [1, W], [0, 1])
    column = gl.arange(0, CHUNK, layout=across)
    token = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(1, held)), 1)
    sums = gl.zeros([8, CHUNK // 8], gl.float32, layout=held)
    for t in range(first, stop):
        squares = gl.zeros([CHUNK], gl.float32, layout=across)
        for i in gl.static_range((K + CHUNK - 1) // CHUNK):
            at = i * CHUNK + column
            value = gl.load(x.data + t * x.STEP + at, mask=at < K, other=0.0).to(gl.float32)
            squares += value * value
        mine = gl.sum(squares.reshape([CHUNK // 8, 8]), 1)
        mine = gl.convert_layout(mine, gl.SliceLayout(0, held), assert_trivial=True)
        sums = gl.where(first + token == t, gl.expand_dims(mine, 0), sums)
    return gl.rsqrt(gl.convert_layout(gl.sum(sums, 1), of) / K + norm.EPS)


@gluon.jit
def fragment_kernel(
    x,
    weight,
    norm,
    epilogue,
    tokens,
    N: gl.constexpr,
    W: gl.constexpr,
    T: gl.constexpr,
    BLOCKS: gl.constexpr,
    PROGRAMMATIC: gl.constexpr,
):
    """y [tokens, N] = epilogue(x [tokens, K] · wᵀ), 16 rows of the weight a program; `x` are Rows.

    W warps of T tiles make a step. BLOCKS is 1 or 2 blocks of eight tokens. Of a HALVED weight a
    tile is eight gate rows and their up rows. With a `norm` rows of x are normed by it first.
    """
    K: gl.constexpr = weight.K
    TILES: gl.constexpr = weight.TILES
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], instr_shape=[1, 16, 8])
    la: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    lb: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    of_sums: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, mma))
    # Bits of a place in a step's codes: byte 0-1, g 2-3, q 4-5, r 6-8, rh 9, t, w.
    in_codes: gl.constexpr = _vector(
        W * T * 1024,
        [1, 2, 4, 8, 512] + powers(1024, T),
        [16, 32, 64, 128, 256],
        powers(1024 * T, W),
    )
    # Of its scales: g % 2 0, rh 1, g / 2 2, r 3-5, t, w; the lanes of one r hold the same.
    in_scales: gl.constexpr = _vector(
        W * T * 64,
        [1, 2, 4] + powers(64, T),
        [0, 0, 8, 16, 32],
        powers(64 * T, W),
    )
    in_x: gl.constexpr = _columns_by_k(W, T)
    STEPS: gl.constexpr = (TILES + W * T - 1) // (W * T)

    block = gl.program_id(0)
    at_code = gl.arange(0, W * T * 1024, layout=in_codes)
    at_scale = gl.arange(0, W * T * 64, layout=in_scales)
    code_base = weight.data + block.to(gl.int64) * (TILES * 1024)
    scale_base = weight.scales + block.to(gl.int64) * (TILES * 64)
    column = gl.expand_dims(gl.arange(0, W * T * 128, layout=gl.SliceLayout(0, in_x)), 0)
    token = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(1, in_x)), 1)

    # What does not depend on the launches before: the first step's weights.
    step_codes = gl.load(code_base + at_code, mask=at_code < TILES * 1024, other=0)
    step_scales = gl.load(scale_base + at_scale, mask=at_scale < TILES * 64, other=127)
    first = 0
    if PROGRAMMATIC:
        first = arrived(block)
        token = token + first

    acc0 = gl.zeros([W, 16, 8], gl.float32, layout=mma)
    acc1 = gl.zeros([W, 16, 8], gl.float32, layout=mma)
    for i in range(STEPS):
        start = i * (W * T * 128)
        inside = start + column < K
        offsets = token * x.STEP + start + column
        # x comes first, and is raised, not the weight of the norm: that way 128 registers do.
        xs = raised(gl.load(x.data + offsets, mask=inside & (token < tokens), other=0.0))
        if norm is not None:
            gain = gl.load(norm.weight + start + column, mask=inside, other=0.0)
            xs = times(xs, gain)
        w, s = _weights(step_codes, step_scales, W, T)
        # The next step's weights are asked for before this one's are used.
        code = (i + 1) * (W * T * 1024) + at_code
        step_codes = gl.load(code_base + code, mask=code < TILES * 1024, other=0)
        scale = (i + 1) * (W * T * 64) + at_scale
        step_scales = gl.load(scale_base + scale, mask=scale < TILES * 64, other=127)
        acc0 = _sums(w, _in_groups(xs, W, T), s, acc0, la, lb, mma, W, T * 4)
        if BLOCKS == 2:
            offsets = (token + 8) * x.STEP + start + column
            xs = raised(gl.load(x.data + offsets, mask=inside & (token + 8 < tokens), other=0.0))
            if norm is not None:
                xs = times(xs, gain)
            acc1 = _sums(w, _in_groups(xs, W, T), s, acc1, la, lb, mma, W, T * 4)
    for b in gl.static_range(BLOCKS):
        total = gl.sum(acc0 if b == 0 else acc1, 0) * _REST
        if norm is not None:
            stop = tokens if b == BLOCKS - 1 else 8
            of_tokens = _scales_of(x, norm, first + b * 8, stop, of_sums, K, W)
            total *= gl.expand_dims(of_tokens, 0)
        _finished(total, weight, epilogue, block, b * 8, tokens, N, W)


@gluon.jit
def _finished(total, weight, epilogue, block, first, tokens, N: gl.constexpr, W: gl.constexpr):
    """The sums [16, 8], with what follows the product, stored for tokens `first` and on."""
    ROWS: gl.constexpr = 8 if weight.HALVED else 16
    stored: gl.constexpr = gl.BlockedLayout([1, 1], [ROWS, 32 // ROWS], [1, W], [0, 1])
    up = total
    if weight.HALVED:
        total, up = gl.split(total.reshape([2, 8, 8]).permute(1, 2, 0))
        up = gl.convert_layout(up, stored)
    total = gl.convert_layout(total, stored)
    row = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, stored))
    token = first + gl.arange(0, 8, layout=gl.SliceLayout(0, stored))
    row, token = gl.expand_dims(row, 1), gl.expand_dims(token, 0)
    inside = (row < N) & (token < tokens)
    finish(epilogue, epilogue.y, total, up, token, row, row, row < N, inside, N)


def variant(product: Product) -> Iterator[GemmLaunch | Declined]:
    """One launch for few tokens of bf16 and a weight in fragments."""
    packed = product.held.packed
    if packed is None or not packed.fragments:
        yield Declined("fragments: the weight does not lie in fragments")
    elif not product.few:
        yield Declined("fragments are for few tokens")
    elif product.heads > 1:
        yield Declined("fragments: a head has a weight of its own")
    elif product.x_dtype != "bf16" or product.norm_dtype not in ("", "bf16"):
        yield Declined(f"fragments are of bf16, found x {product.x_dtype} {product.norm_dtype}")
    else:
        down, across = packed.tiles
        warps = 4 if down >= _MANY_PROGRAMS else 8
        args = {
            "x": product.x,
            "weight": product.weight,
            "norm": product.norm,
            "epilogue": product.epilogue,
            "tokens": product.tokens,
            "N": product.n,
            "W": warps,
            "T": 2 if across >= 2 * warps else 1,
            "BLOCKS": -(-product.tokens // 8),
        }
        call = Call(fragment_kernel, args, (down, 1, 1), (product.epilogue.y,), num_warps=warps)
        yield GemmLaunch(call, "fragments", "fragments in registers for few tokens")
