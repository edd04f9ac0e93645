"""PTX of streams of MXFP4 fragments, in which a tensor has one element a thread (Gluon, NVIDIA).

A step of a warp is 16 rows by 256 columns: two tiles of compiler.ops.mxfp4_fragments beside each
other, first their codes, then their scales. A lane copies exactly the bytes that it reads later.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Bytes of a warp's step, and of its codes.
STEP_BYTES = gl.constexpr(2176)
CODE_BYTES = gl.constexpr(2048)
REST = gl.constexpr(4611686018427387904.0)  # 2^62


@gluon.jit
def statement(code: gl.constexpr, thread):
    """What `code` does, which sets the i32 $0."""
    return gl.inline_asm_elementwise(code, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def on_their_way(steps):
    """Waits until at most so many of the lane's steps are."""
    return f"cp.async.wait_group {steps}; mov.b32 $0, 0;"


@gluon.constexpr_function
def _copies(ragged):
    lines = ["{ .reg .pred p, a, b, c; setp.ne.b32 p, $5, 0;"]
    if ragged:
        lines += ["and.b32 $0, $6, 1; setp.eq.b32 a, $0, 0;"]
        lines += ["and.b32 $0, $6, 2; setp.eq.b32 b, $0, 0;"]
        lines += ["and.b32 $0, $6, 4; setp.eq.b32 c, $0, 0;"]
    first, second, scale = (", a", ", b", ", c") if ragged else ("", "", "")
    lines += [
        f"@p cp.async.cg.shared.global [$1], [$3], 16{first};",
        f"@p cp.async.cg.shared.global [$1+512], [$3+512], 16{first};",
        f"@p cp.async.cg.shared.global [$1+1024], [$3+1024], 16{second};",
        f"@p cp.async.cg.shared.global [$1+1536], [$3+1536], 16{second};",
        f"@p cp.async.ca.shared.global [$2], [$4], 4{scale};",
        "cp.async.commit_group; mov.b32 $0, 0; }",
    ]
    return "\n".join(lines)


@gluon.jit
def copy_step(codes_to, scales_to, codes, scales, there, parts, RAGGED: gl.constexpr):
    """This lane's part of a step: 4 x 16 bytes of codes, 4 of scales. Always a group of copies,
    empty where the step is not `there`. Of a RAGGED weight `parts` says which there are: bits 0 and
    1 the tiles, 2 the scales; zeros stand for the others."""
    return gl.inline_asm_elementwise(
        _copies(RAGGED),
        "=&r,r,r,l,l,r,r",
        [codes_to, scales_to, codes, scales, there, parts],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def four_words(at):
    """Four words of shared memory."""
    return gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r",
        [at],
        dtype=(gl.int32,) * 4,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def word_at(at):
    return gl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [at], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def number_at(at):
    return word_at(at).to(gl.float32, bitcast=True)


@gluon.jit
def put(at, number, there):
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, 0; }",
        "=r,r,f,r",
        [at, number, there],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def _butterfly(distances):
    adds = [
        f"shfl.sync.bfly.b32 t, $0, {distance}, 31, 0xffffffff; add.f32 $0, $0, t;"
        for distance in distances
    ]
    return "\n".join(["{ .reg .f32 t; mov.b32 $0, $1;", *adds, "}"])


@gluon.jit
def sum_over(number, DISTANCES: gl.constexpr):
    """The sum over the lanes whose numbers differ from this one's by sums of DISTANCES."""
    return gl.inline_asm_elementwise(
        _butterfly(DISTANCES), "=&f,f", [number], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def _group_text(sums):
    """Both words' codes as bf16, and two mma: with eight `sums` onto four each, else onto all."""
    lines = ["{ .reg .b32 t, u, a0, a1, a2, a3, b0, b1, b2, b3;"]
    for word, to in ((f"${sums}", "a"), (f"${sums + 1}", "b")):
        lines += [
            f"and.b32 {to}0, {word}, 0x81C081C0;",
            f"shf.r.wrap.b32 t, {word}, {word}, 6; and.b32 {to}1, t, 0x81C081C0;",
            f"shl.b32 t, {word}, 6; and.b32 {to}2, t, 0x81C081C0;",
            f"shl.b32 t, {word}, 4; and.b32 t, t, 0x81808180;",
            f"shr.b32 u, {word}, 4; and.b32 u, u, 0x00400040; or.b32 {to}3, t, u;",
        ]
    for i in range(2):
        a, b, x = 2 * i, 2 * i + 1, sums + 2 + 2 * i
        into = 4 * i if sums == 8 else 0
        before = into if sums == 4 and i else sums + 6 + into
        to, onto = (",".join(f"${first + j}" for j in range(4)) for first in (into, before))
        lines += [
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
            f"{{{to}}}, {{a{a},b{a},a{b},b{b}}}, {{${x},${x + 1}}}, {{{onto}}};",
        ]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _group_constraints(sums):
    return ",".join(["=&f"] * sums + ["r"] * 6 + ["f"] * sums)


@gluon.jit
def group_sums(upper, lower, x, sums):
    """`sums`, one accumulator of four or two, and the products of 32 columns: `upper` is the word
    of row r, `lower` that of row r + 8 (see compiler.ops.mxfp4_fragments), `x` four pairs of bf16.
    """
    return gl.inline_asm_elementwise(
        _group_text(len(sums)),
        _group_constraints(len(sums)),
        (upper, lower) + x + sums,
        dtype=(gl.float32,) * len(sums),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _scale(word, BYTE: gl.constexpr):
    """The scale in a byte: 0 stands for 2^-127, which is subnormal; 255, NaN, gives infinity."""
    if BYTE == 3:
        bits = (word >> 1) & 0x7F800000
    else:
        bits = (word << (23 - 8 * BYTE)) & 0x7F800000
    return gl.maximum(bits, 0x00400000).to(gl.float32, bitcast=True)


@gluon.jit
def _of_quad(word, place):
    """The word of the lane at `place` among the four of the same r."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, 0xffffffff;",
        "=r,r,r",
        [word, place],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def folded(total, sums, scale, q, SET: gl.constexpr, T: gl.constexpr):
    """`total`, of rows r (first two) and r + 8, and the sums of a set, scaled.

    A lane has columns 2q and 2q + 1 of the sums: two tokens of one group, or two groups. Its word
    of scales is that of groups 2q and 2q + 1 of its rows.
    """
    if len(sums) == 8:
        a, b, c, d = sums[0] + sums[4], sums[1] + sums[5], sums[2] + sums[6], sums[3] + sums[7]
    else:
        a, b, c, d = sums
    if T == 1:
        upper = total[0] + a * _scale(scale, 0) + b * _scale(scale, 1)
        lower = total[2] + c * _scale(scale, 2) + d * _scale(scale, 3)
        result = (upper, total[1], lower, total[3])
    else:
        if T == 2:
            word = _of_quad(scale, (q >> 1) + 2 * SET) >> ((q & 1) * 8)
        elif T == 4:
            word = _of_quad(scale, q * 0 + SET) >> ((q >> 1) * 8)
        else:
            word = _of_quad(scale, q * 0 + SET // 2) >> (SET % 2 * 8)
        upper = _scale(word, 0)
        lower = _scale(word, 2)
        result = (total[0] + a * upper, total[1] + b * upper)
        result = result + (total[2] + c * lower, total[3] + d * lower)
    return result


@gluon.jit
def copy_words(to, source, there, inside):
    """Copy 16 bytes, or zeros where they are not `inside`, if they are `there`: part of the group
    of copies that `copy_step` ends."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p, a; setp.ne.b32 p, $3, 0; setp.eq.b32 a, $4, 0;\n"
        "@p cp.async.ca.shared.global [$1], [$2], 16, a; mov.b32 $0, 0; }",
        "=r,r,l,r,r",
        [to, source, there, inside],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def raised_pairs(words):
    """Four words of two bf16, 2^64 times as large."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 c; mov.b32 c, 0x5F805F80;\n"
        "mul.rn.bf16x2 $0, $4, c; mul.rn.bf16x2 $1, $5, c;\n"
        "mul.rn.bf16x2 $2, $6, c; mul.rn.bf16x2 $3, $7, c; }",
        "=&r,=&r,=&r,=&r,r,r,r,r",
        words,
        dtype=(gl.int32,) * 4,
        is_pure=True,
        pack=1,
    )
