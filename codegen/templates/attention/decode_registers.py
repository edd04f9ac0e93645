"""Attention of one token, with keys, values and sums in registers (Gluon, NVIDIA).

The token's heads are made of the product that precedes (as in heads_within). A program takes part
of a key/value head's context; each of its warps walks sixteen positions of a tile by itself, so
nothing is waited for but what is loaded. The code is SIMT: tensors have one element a thread.

- Keys and values of earlier positions were written by earlier replays: those of the first tile are
  loaded before the launches before have ended (templates.pdl). The token's own key and value, which
  every program makes for itself, are joined with the warps' sums at the end.
- Both products are m16n8k16 with the group's heads as the eight columns: scores are keys by
  queries, sums are values by weights. Which dim or position has which place in a fragment is free
  as long as both operands agree. So a lane of row r and column q loads 16 bytes of key rows p and
  p + 2, p = 4 (r / 2) + r % 2, and of value rows 4q to 4q + 3 the dims of its own r; weights come
  from the layout of sums to that of operands by one transpose within the warp (movmatrix).
- Warps are joined in shared memory, parts by the last program to arrive, in fixed order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..gemm.stream_asm import four_words, number_at, put, statement, sum_over
from .attend import LOG2E
from .decode import first_tile
from .parts import has_tiles

# Warps of a program, positions of a context that they walk at once, heads of a group at most.
WARPS = 8
TILE = 16 * WARPS
MOST_HEADS = 8


@gluon.jit
def _loaded(at, there):
    """Four words of global memory at a multiple of 16, past the first cache; 0 if not `there`."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $5, 0;\n"
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;\n"
        "@p ld.global.cg.v4.b32 {$0,$1,$2,$3}, [$4]; }",
        "=&r,=&r,=&r,=&r,l,r",
        [at, there.to(gl.int32)],
        dtype=(gl.int32,) * 4,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _loaded_pair(at, there):
    """Two words of global memory at a multiple of 8; 0 if not `there`."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0;\n"
        "@p ld.global.cg.v2.b32 {$0,$1}, [$2]; }",
        "=&r,=&r,l,r",
        [at, there.to(gl.int32)],
        dtype=(gl.int32,) * 2,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _number_loaded(at, there):
    word = gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.cg.b32 $0, [$1]; }",
        "=&r,l,r",
        [at, there.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    return word.to(gl.float32, bitcast=True)


@gluon.jit
def _store_four(at, a, b, c, d, there):
    """Four f32 to global memory."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $6, 0;\n"
        "@p st.global.v4.b32 [$1], {$2,$3,$4,$5}; mov.b32 $0, 0; }",
        "=r,l,f,f,f,f,r",
        [at, a, b, c, d, there.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _store_pair(at, a, b, there):
    """Two words to global memory."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.global.v2.b32 [$1], {$2,$3}; mov.b32 $0, 0; }",
        "=r,l,r,r,r",
        [at, a, b, there.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _put_four(at, a, b, c, d, there):
    """Four f32 to shared memory."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $6, 0;\n"
        "@p st.shared.v4.b32 [$1], {$2,$3,$4,$5}; mov.b32 $0, 0; }",
        "=r,r,f,f,f,f,r",
        [at, a, b, c, d, there.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _put_pair(at, a, b):
    """Two words to shared memory."""
    gl.inline_asm_elementwise(
        "st.shared.v2.b32 [$1], {$2,$3}; mov.b32 $0, 0;",
        "=r,r,r,r",
        [at, a, b],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _pair(low, high):
    """Two f32 as a word of bf16."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;",
        "=r,f,f",
        [low, high],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _low(word):
    return (word << 16).to(gl.float32, bitcast=True)


@gluon.jit
def _high(word):
    return (word & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _four(words):
    """The f32 of four bf16 in two words."""
    return _low(words[0]), _high(words[0]), _low(words[1]), _high(words[1])


@gluon.jit
def _greatest(number):
    """The maximum over the lanes of the same q."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mov.b32 $0, $1;\n"
        "shfl.sync.bfly.b32 t, $0, 4, 31, 0xffffffff; max.f32 $0, $0, t;\n"
        "shfl.sync.bfly.b32 t, $0, 8, 31, 0xffffffff; max.f32 $0, $0, t;\n"
        "shfl.sync.bfly.b32 t, $0, 16, 31, 0xffffffff; max.f32 $0, $0, t; }",
        "=&f,f",
        [number],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _transposed(word):
    """Of 8x8 matrices of b16, two columns of a row a lane, the transpose."""
    return gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        "=r,r",
        [word],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _scored(upper, lower, q, sums):
    """`sums` and the products of 32 dims: of two key rows with the queries."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32\n"
        "{$0,$1,$2,$3}, {$4,$8,$5,$9}, {$12,$13}, {$16,$17,$18,$19};\n"
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32\n"
        "{$0,$1,$2,$3}, {$6,$10,$7,$11}, {$14,$15}, {$0,$1,$2,$3};",
        "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
        upper + lower + q + sums,
        dtype=(gl.float32,) * 4,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _weighed(a, b, c, d, first, second, sums):
    """`sums` and, of two dims, the products of sixteen positions' values with their weights: a lane
    has a word of each of four value rows, and two words of weights."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a0, a1, a2, a3;\n"
        "prmt.b32 a0, $4, $5, 0x5410; prmt.b32 a1, $4, $5, 0x7632;\n"
        "prmt.b32 a2, $6, $7, 0x5410; prmt.b32 a3, $6, $7, 0x7632;\n"
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32\n"
        "{$0,$1,$2,$3}, {a0,a1,a2,a3}, {$8,$9}, {$10,$11,$12,$13}; }",
        "=&f,=&f,=&f,=&f,r,r,r,r,r,r,f,f,f,f",
        (a, b, c, d, first, second) + sums,
        dtype=(gl.float32,) * 4,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _keys(keys, row, kv_head, p, q, first, last, n):
    """Rows n + p and n + p + 2 of the keys, where they are in [first, last)."""
    there = (n + p >= first) & (n + p < last)
    below = (n + p + 2 >= first) & (n + p + 2 < last)
    at = (row + p.to(gl.int64)) * keys.ROW + (kv_head * keys.HEAD + q * 8).to(gl.int64)
    at = keys.data.to(gl.int64) + at * 2
    words = ()
    for j in gl.static_range(keys.D // 32):
        words = words + (
            _loaded(at + 64 * j, there),
            _loaded(at + (4 * keys.ROW + 64 * j), below),
        )
    return words


@gluon.jit
def _values(values, row, kv_head, r, q, first, last, n):
    """The dims of r of rows n + 4q to n + 4q + 3 of the values, where they are in [first, last)."""
    DIMS: gl.constexpr = values.D // 8
    at = (row + (q * 4).to(gl.int64)) * values.ROW
    at += (kv_head * values.HEAD + r * DIMS).to(gl.int64)
    at = values.data.to(gl.int64) + at * 2
    words = ()
    for x in gl.static_range(4):
        position = n + q * 4 + x
        there = (position >= first) & (position < last)
        of_row = ()
        for j in gl.static_range(DIMS // 8):
            of_row = of_row + _loaded(at + (x * 2 * values.ROW + 16 * j), there)
        words = words + (of_row,)
    return words


@gluon.jit
def _row(pages, slot, n, there):
    """The row of the caches (i64) that position n of a slot has."""
    at = slot * pages.PER_SLOT + n // pages.SIZE
    page = gl.load(pages.table + at, mask=there, other=0)
    return page.to(gl.int64) * pages.SIZE + (n % pages.SIZE).to(gl.int64)


@gluon.jit
def _held(product, part, column, other, inside):
    """What is added to and multiplied with dims of a head, and their partners: constants, as words
    of bf16. Without them there is one in another's place."""
    bias = (column, column)
    other_bias = bias
    gain = bias
    other_gain = bias
    of_head = column % part.D
    if product.bias is not None:
        start = product.bias.to(gl.int64)
        bias = _loaded_pair(start + column.to(gl.int64) * 2, inside)
        if part.TURNED:
            other_bias = _loaded_pair(start + other.to(gl.int64) * 2, inside)
    if part.norm is not None:
        start = part.norm.to(gl.int64)
        gain = _loaded_pair(start + of_head.to(gl.int64) * 2, inside)
        if part.TURNED:
            other_gain = _loaded_pair(start + (other % part.D).to(gl.int64) * 2, inside)
    return bias, other_bias, gain, other_gain


@gluon.jit
def _numbers(words):
    return (
        words[0].to(gl.float32, bitcast=True),
        words[1].to(gl.float32, bitcast=True),
        words[2].to(gl.float32, bitcast=True),
        words[3].to(gl.float32, bitcast=True),
    )


@gluon.jit
def _table(table, at, turned):
    return gl.load(table + at, mask=turned, other=0.0).to(gl.float32)


@gluon.jit
def _sum_of_squares(x):
    return sum_over(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3], (1, 2, 4, 8, 16))


@gluon.jit
def _normed(x, gain, scale):
    return (
        x[0] * (scale * gain[0]),
        x[1] * (scale * gain[1]),
        x[2] * (scale * gain[2]),
        x[3] * (scale * gain[3]),
    )


@gluon.jit
def _head(product, part, own, other, held, cos, sin, is_b, turned):
    """Four dims of a head, rounded to bf16 pairs: of the columns `own` and their partners."""
    bias, other_bias, gain, other_gain = held
    ROTATED_FIRST: gl.constexpr = product.NORM_OF == "rotated head"
    x = _numbers(own)
    y = x
    if part.TURNED:
        y = _numbers(other)
    if product.bias is not None:
        more = _four(bias)
        x = (x[0] + more[0], x[1] + more[1], x[2] + more[2], x[3] + more[3])
        if part.TURNED:
            more = _four(other_bias)
            y = (y[0] + more[0], y[1] + more[1], y[2] + more[2], y[3] + more[3])
    if part.norm is not None and not ROTATED_FIRST:
        scale = gl.rsqrt(_sum_of_squares(x) / part.D + product.EPS)
        x = _normed(x, _four(gain), scale)
        if part.TURNED:
            y = _normed(y, _four(other_gain), scale)
    if part.TURNED:
        z = ()
        for e in gl.static_range(4):
            rotated = x[e] * cos[e] + gl.where(is_b, y[e] * sin[e], -y[e] * sin[e])
            z = z + (gl.where(turned, rotated, x[e]),)
        x = z
    if part.norm is not None and ROTATED_FIRST:
        x = _normed(x, _four(gain), gl.rsqrt(_sum_of_squares(x) / part.D + product.EPS))
    return _pair(x[0], x[1]), _pair(x[2], x[3])


@gluon.jit
def _columns_of(part, head, d):
    """The columns of the product that four dims from d on of a head lie in."""
    return part.FIRST + head * part.D + d


@gluon.jit
def register_decode_kernel(
    product,
    query,
    key,
    value,
    rotation,
    keys,
    values,
    pages,
    variant,
    out,
    parts,
    counters,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    W: gl.constexpr,
    PROGRAMMATIC: gl.constexpr,
):
    """out [1, H, V] of a token's heads `query`, `key` and `value` (HeadParts of a Product), and its
    key and value appended to the caches `keys` and `values` in `pages`.

    Program part · KV_HEADS + head takes tiles part, part + COUNT, … of the head's context, W · 16
    positions each; programs beyond do nothing. `parts` (parts.Parts) are in scratch, `counters`
    [KV_HEADS] arrivals as in templates.arrival. `rotation` is of form "half".
    """
    D: gl.constexpr = keys.D
    V: gl.constexpr = values.D
    COUNT: gl.constexpr = parts.COUNT
    N: gl.constexpr = 16 * W
    DIMS: gl.constexpr = V // 8
    # Words that sums of a head, and of the dims of an r, lie apart, so that banks do not conflict.
    OF_R: gl.constexpr = DIMS + 4
    OF_HEAD: gl.constexpr = 8 * OF_R + 4
    # Bytes of shared memory: queries; sums, tops and totals of warps; the token's own scores and
    # value; the count of arrivals.
    OF_QUERY: gl.constexpr = 2 * D + 64
    SUMS: gl.constexpr = 8 * OF_QUERY
    TOPS: gl.constexpr = SUMS + W * GROUP * OF_HEAD * 4
    TOTALS: gl.constexpr = TOPS + W * 32
    OWN: gl.constexpr = TOTALS + W * 32
    OWN_VALUE: gl.constexpr = OWN + 32
    ARRIVED: gl.constexpr = OWN_VALUE + 4 * V
    LINES: gl.constexpr = (ARRIVED + 4 + 128 * W - 1) // (128 * W) + 1
    one_each: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])

    thread = gl.arange(0, 32 * W, layout=one_each)
    if PROGRAMMATIC:
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
    p = (r >> 1) * 4 + (r & 1)
    program = gl.program_id(0)
    kv_head = program % KV_HEADS
    part = program // KV_HEADS

    # What no launch of the step writes, and what earlier replays wrote.
    slot = gl.load(pages.slots)
    at = gl.load(pages.positions)
    first = at * 0
    if variant.WINDOW:
        first = gl.maximum(at - variant.WINDOW + 1, 0)
    low = first // N
    high = at // N
    begin = first_tile(part, first, COUNT, N)
    some = (slot >= 0) & (part < COUNT) & (begin <= high)
    owns = some & (high % COUNT == part)
    n = begin * N + warp * 16
    row = _row(pages, slot, n, some & (n <= at))
    stop = gl.where(some, at, 0) + thread * 0
    k = _keys(keys, row, kv_head, p, q, first, stop, n)
    v = _values(values, row, kv_head, r, q, first, stop, n)
    n += COUNT * N
    row = _row(pages, slot, n, some & (n <= at))
    own_row = _row(pages, slot, at + thread * 0, some & (thread >= 0))

    d = lane * 4
    turns = d - rotation.START
    turned = (turns >= 0) & (turns < 2 * rotation.HALF)
    is_b = turned & (turns >= rotation.HALF)
    partner = gl.where(turned, gl.where(is_b, d - rotation.HALF, d + rotation.HALF), d)
    pair = gl.where(turned, gl.where(is_b, turns - rotation.HALF, turns), 0)
    inside = d < D
    head = kv_head * GROUP + gl.minimum(warp, GROUP - 1)
    of_query = _columns_of(query, head, d)
    of_key = _columns_of(key, kv_head, d)
    of_value = _columns_of(value, kv_head, d)
    other_query = _columns_of(query, head, partner)
    other_key = _columns_of(key, kv_head, partner)
    query_held = _held(product, query, of_query, other_query, inside)
    key_held = _held(product, key, of_key, other_key, inside)
    value_held = _held(product, value, of_value, of_value, d < V)
    if PROGRAMMATIC:
        statement("griddepcontrol.wait; mov.b32 $0, 0;", thread)

    if (part == 0) & (slot < 0):
        zero_at = kv_head * (GROUP * V) + thread * 4
        nothing = thread * 0
        to = out.to(gl.int64) + zero_at.to(gl.int64) * 2
        _store_pair(to, nothing, nothing, thread * 4 < GROUP * V)
    if some:
        made = product.y.to(gl.int64)
        q_own = _loaded(made + of_query.to(gl.int64) * 4, inside)
        q_other = _loaded(made + other_query.to(gl.int64) * 4, inside)
        k_own = _loaded(made + of_key.to(gl.int64) * 4, inside)
        k_other = _loaded(made + other_key.to(gl.int64) * 4, inside)
        v_own = _loaded(made + of_value.to(gl.int64) * 4, d < V)
        cos = ()
        sin = ()
        for e in gl.static_range(4):
            if query.TURNED:
                cos = cos + (_table(rotation.cos, pair + e, turned),)
                sin = sin + (_table(rotation.sin, pair + e, turned),)
        qs = _head(product, query, q_own, q_other, query_held, cos, sin, is_b, turned)
        ks = _head(product, key, k_own, k_other, key_held, cos, sin, is_b, turned)
        vs = _head(product, value, v_own, v_own, value_held, cos, sin, is_b, turned)
        # Columns of no head have queries of 0. Lanes beyond a head write behind it, where nothing
        # is read.
        real = warp < GROUP
        to = base + warp * OF_QUERY + gl.minimum(lane * 8, OF_QUERY - 8)
        _put_pair(to, gl.where(real, qs[0], 0), gl.where(real, qs[1], 0))
        x = _four(qs)
        y = _four(ks)
        own_score = x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3]
        own_score = sum_over(own_score, (1, 2, 4, 8, 16))
        own_score = gl.where(owns, own_score * (variant.SCALE * LOG2E), float("-inf"))
        put(base + OWN + warp * 4, own_score, ((lane == 0) & (warp < GROUP)).to(gl.int32))
        x = _four(vs)
        writes = (warp == 0) & (d < V)
        to = base + OWN_VALUE + gl.minimum(d, V - 4) * 4
        _put_four(to, x[0], x[1], x[2], x[3], writes)
        cached = keys.data.to(gl.int64)
        cached += (own_row * keys.ROW + (kv_head * keys.HEAD + d).to(gl.int64)) * 2
        _store_pair(cached, ks[0], ks[1], owns & (warp == 0) & inside)
        cached = values.data.to(gl.int64)
        cached += (own_row * values.ROW + (kv_head * values.HEAD + d).to(gl.int64)) * 2
        _store_pair(cached, vs[0], vs[1], owns & writes)
        statement("bar.sync 0; mov.b32 $0, 0;", thread)

        zero = gl.zeros([32 * W], gl.float32, layout=one_each)
        top0 = zero + float("-inf")
        top1 = top0
        total0 = zero
        total1 = zero
        acc = ()
        for _ in gl.static_range(V // 16):
            acc = acc + ((zero, zero, zero, zero),)
        for tile in range(begin, high + 1, COUNT):
            n = tile * N + warp * 16
            sums = (zero, zero, zero, zero)
            for j in gl.static_range(D // 32):
                words = four_words(base + r * OF_QUERY + q * 16 + 64 * j)
                sums = _scored(k[2 * j], k[2 * j + 1], words, sums)
            after = n + COUNT * N
            k = _keys(keys, row, kv_head, p, q, first, stop, after)
            upper = (n + p >= first) & (n + p < at)
            lower = (n + p + 2 >= first) & (n + p + 2 < at)
            SCALE: gl.constexpr = variant.SCALE * LOG2E
            s0 = gl.where(upper, sums[0] * SCALE, float("-inf"))
            s1 = gl.where(upper, sums[1] * SCALE, float("-inf"))
            s2 = gl.where(lower, sums[2] * SCALE, float("-inf"))
            s3 = gl.where(lower, sums[3] * SCALE, float("-inf"))
            higher0 = gl.maximum(top0, _greatest(gl.maximum(s0, s2)))
            higher1 = gl.maximum(top1, _greatest(gl.maximum(s1, s3)))
            # What has seen nothing yet has no top: its weights are 0, not NaN.
            of0 = gl.where(higher0 == float("-inf"), 0.0, higher0)
            of1 = gl.where(higher1 == float("-inf"), 0.0, higher1)
            fade0 = gl.exp2(top0 - of0)
            fade1 = gl.exp2(top1 - of1)
            w0 = gl.exp2(s0 - of0)
            w1 = gl.exp2(s1 - of1)
            w2 = gl.exp2(s2 - of0)
            w3 = gl.exp2(s3 - of1)
            total0 = total0 * fade0 + (w0 + w2)
            total1 = total1 * fade1 + (w1 + w3)
            top0 = higher0
            top1 = higher1
            one = _transposed(_pair(w0, w1))
            two = _transposed(_pair(w2, w3))
            joined = ()
            for i in gl.static_range(V // 16):
                before = acc[i]
                faded = (before[0] * fade0, before[1] * fade1, before[2] * fade0, before[3] * fade1)
                joined = joined + (_weighed(v[0][i], v[1][i], v[2][i], v[3][i], one, two, faded),)
            acc = joined
            v = _values(values, row, kv_head, r, q, first, stop, after)
            later = after + COUNT * N
            row = _row(pages, slot, later, later <= at)

        total0 = sum_over(total0, (4, 8, 16))
        total1 = sum_over(total1, (4, 8, 16))
        even = q * 2 < GROUP
        odd = q * 2 + 1 < GROUP
        to = base + SUMS + (warp * (GROUP * OF_HEAD) + r * OF_R) * 4
        to_even = to + gl.minimum(q * 2, GROUP - 1) * (OF_HEAD * 4)
        to_odd = to + gl.minimum(q * 2 + 1, GROUP - 1) * (OF_HEAD * 4)
        for i in gl.static_range(V // 32):
            a = acc[2 * i]
            b = acc[2 * i + 1]
            _put_four(to_even + 16 * i, a[0], a[2], b[0], b[2], even)
            _put_four(to_odd + 16 * i, a[1], a[3], b[1], b[3], odd)
        to = base + TOPS + (warp * 8 + q * 2) * 4
        put(to, top0, (r == 0).to(gl.int32))
        put(to + 4, top1, (r == 0).to(gl.int32))
        to = base + TOTALS + (warp * 8 + q * 2) * 4
        put(to, total0, (r == 0).to(gl.int32))
        put(to + 4, total1, (r == 0).to(gl.int32))
        statement("bar.sync 0; mov.b32 $0, 0;", thread)

        # A thread has four dims of a head.
        live = thread < GROUP * (V // 4)
        of = gl.minimum(thread // (V // 4), GROUP - 1)
        dim = thread % (V // 4) * 4
        own = number_at(base + OWN + of * 4)
        top = own
        tops = ()
        for w in gl.static_range(W):
            tops = tops + (number_at(base + TOPS + (w * 8 + of) * 4),)
            top = gl.maximum(top, tops[w])
        weight = gl.exp2(own - top)
        total = weight
        number = _numbers(four_words(base + OWN_VALUE + dim * 4))
        a = number[0] * weight
        b = number[1] * weight
        c = number[2] * weight
        e = number[3] * weight
        from_ = base + SUMS + (of * OF_HEAD + dim // DIMS * OF_R + dim % DIMS) * 4
        for w in gl.static_range(W):
            weight = gl.exp2(tops[w] - top)
            total += number_at(base + TOTALS + (w * 8 + of) * 4) * weight
            number = _numbers(four_words(from_ + w * (GROUP * OF_HEAD * 4)))
            a += number[0] * weight
            b += number[1] * weight
            c += number[2] * weight
            e += number[3] * weight

        whole_head = kv_head * GROUP + of
        last = thread >= 0
        if low < high:
            place = whole_head * COUNT + part
            of_sums = parts.sums.to(gl.int64) + (place * V + dim).to(gl.int64) * 4
            _store_four(of_sums, a, b, c, e, live)
            gl.store(parts.tops + place, top, mask=live & (dim == 0))
            gl.store(parts.totals + place, total, mask=live & (dim == 0))
            statement("bar.sync 0; mov.b32 $0, 0;", thread)
            expected = gl.minimum(high - low + 1, COUNT)
            one_more = thread * 0 + 1
            counter = counters + (kv_head + thread * 0)
            arrived = gl.atomic_add(counter, one_more, thread == 0, sem="acq_rel", scope="gpu")
            ends = (arrived == expected - 1).to(gl.float32)
            put(base + ARRIVED + thread * 0, ends, (thread == 0).to(gl.int32))
            gl.store(counter, thread * 0, mask=(thread == 0) & (ends > 0.0))
            statement("bar.sync 0; mov.b32 $0, 0;", thread)
            last = number_at(base + ARRIVED + thread * 0) > 0.0
            joins = live & last
            top = zero + float("-inf")
            total = zero
            a = zero
            b = zero
            c = zero
            e = zero
            seen = COUNT
            if not variant.WINDOW:
                seen = gl.minimum(high + 1, COUNT)
            for some_parts in range(0, seen, 8):
                scores = ()
                totals = ()
                numbers = ()
                higher = top
                for i in gl.static_range(8):
                    of_part = some_parts + i
                    there = joins & has_tiles(of_part, low, high, COUNT)
                    at_part = (whole_head * COUNT + of_part).to(gl.int64)
                    score = _number_loaded(parts.tops.to(gl.int64) + at_part * 4, there)
                    scores = scores + (gl.where(there, score, float("-inf")),)
                    totals = totals + (
                        _number_loaded(parts.totals.to(gl.int64) + at_part * 4, there),
                    )
                    from_part = parts.sums.to(gl.int64) + (at_part * V + dim.to(gl.int64)) * 4
                    numbers = numbers + (_loaded(from_part, there),)
                for i in gl.static_range(8):
                    higher = gl.maximum(higher, scores[i])
                of_top = gl.where(higher == float("-inf"), 0.0, higher)
                weight = gl.exp2(top - of_top)
                total *= weight
                a *= weight
                b *= weight
                c *= weight
                e *= weight
                for i in gl.static_range(8):
                    weight = gl.exp2(scores[i] - of_top)
                    number = _numbers(numbers[i])
                    total += totals[i] * weight
                    a += number[0] * weight
                    b += number[1] * weight
                    c += number[2] * weight
                    e += number[3] * weight
                top = higher
        if variant.sinks is not None:
            sink = gl.load(variant.sinks + whole_head).to(gl.float32) * LOG2E
            with_sink = gl.maximum(top, sink)
            weight = gl.exp2(top - with_sink)
            total = total * weight + gl.exp2(sink - with_sink)
            a *= weight
            b *= weight
            c *= weight
            e *= weight
        to = out.to(gl.int64) + (whole_head * V + dim).to(gl.int64) * 2
        _store_pair(to, _pair(a / total, b / total), _pair(c / total, e / total), live & last)
    memory._keep_alive()
