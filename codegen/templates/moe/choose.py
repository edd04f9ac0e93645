"""The router's choice of experts for one token, on scores that lie in registers.

Experts lie in lanes group by group, each group padded to a power of 2, so the order of lanes is the
order of experts. Ties go to the expert, or group, of the smallest index.

Keys are i32, as `ordered` has them: no float's is as small as those of lanes without an expert and
of what its group keeps out. Of few lanes each is compared with each: a rank costs as many
comparisons as there are lanes, and waits for nothing; of many K are picked one after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rowwise.arithmetic import float_of, ordered

# Keys of lanes without an expert, and of experts that their group keeps out.
ABSENT, KEPT_OUT = tl.constexpr(-0x7FFFFFFF), tl.constexpr(-0x7FFFFFFE)
# Lanes that are compared each with each, at most.
COMPARED = tl.constexpr(256)


class Choice(NamedTuple):
    """K of GROUPS times SIZE experts a token, and SHARED ones that every token has.

    Logits are sums and `bias` [E], rounded once to LOGITS. Scores are their sigmoids or softmax;
    with a `correction` [E] experts are chosen by what it is added to. Only the TOP best groups are
    chosen from, judged by their best expert or the sum of their best two (TOP2). `weights` are the
    scores, scaled, divided by their sum where NORMALIZE; they and `indices` are [T, K + SHARED].
    GROUPS2 and SIZE2 are powers of 2 that hold GROUPS and SIZE, COLUMNS one that holds K + SHARED.
    """

    bias: Any
    correction: Any
    weights: Any
    indices: Any
    LOGITS: Any
    K: Any
    SHARED: Any
    GROUPS: Any
    GROUPS2: Any
    SIZE: Any
    SIZE2: Any
    TOP: Any
    TOP2: Any
    COLUMNS: Any
    SIGMOID: Any
    NORMALIZE: Any
    SCALE: Any
    SUM_EPS: Any


@triton.jit
def ranked(key, lane):
    """Keys with their lanes below them, so that one maximum finds the first of the largest."""
    return (key.to(tl.int64) << 16) | (0xFFFF - lane).to(tl.int64)


@triton.jit
def lane_of(best):
    """The lane that a ranked key names."""
    return (0xFFFF - (best & 0xFFFF)).to(tl.int32)


@triton.jit
def experts_in_lanes(choice):
    """The experts in the lanes of a Choice, and whether there is one: SIZE a group of SIZE2."""
    lane = tl.arange(0, choice.GROUPS2 * choice.SIZE2)
    group, within = lane // choice.SIZE2, lane % choice.SIZE2
    present = (group < choice.GROUPS) & (within < choice.SIZE)
    return group * choice.SIZE + within, present


@triton.jit
def offsets(choice):
    """f32 [GROUPS2 · SIZE2]: what is added to the logits, rounded as they are, and to the scores;
    0 where there is none."""
    expert, present = experts_in_lanes(choice)
    bias = tl.zeros(expert.shape, tl.float32)
    if choice.bias is not None:
        held = tl.load(choice.bias + expert, mask=present, other=0)
        bias = held.to(choice.LOGITS).to(tl.float32)
    correction = tl.zeros(expert.shape, tl.float32)
    if choice.correction is not None:
        correction = tl.load(choice.correction + expert, mask=present, other=0).to(tl.float32)
    return bias, correction


@triton.jit
def _of_all(x, LARGEST: tl.constexpr):
    """[LANES]: the sum of `x`, or its largest, in every lane: within groups of 32, which are a
    warp's, and then of what all groups have, in every thread."""
    LANES: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = LANES if LANES < 32 else 32
    GROUPS: tl.constexpr = LANES // SIZE
    x = tl.reshape(x, (GROUPS, SIZE))
    part = tl.max(x, 1) if LARGEST else tl.sum(x, 1)
    parts = tl.broadcast_to(part[:, None, None], (GROUPS, GROUPS, SIZE))
    total = tl.max(parts, 0) if LARGEST else tl.sum(parts, 0)
    return tl.reshape(total, (LANES,))


@triton.jit
def _compared(key):
    """i32 [GROUPS, SIZE]: how many of a lane's group have a larger key, or the same and come before
    it. Keys are i32, larger than the smallest."""
    SIZE: tl.constexpr = key.shape[1]
    lane = tl.arange(0, SIZE)
    before = (lane[:, None] < lane[None, :]).to(tl.int32)
    above = tl.trans(key)[:, :, None] > key[None, :, :] - before[:, None, :]
    return tl.sum(above.to(tl.int32), 0)


@triton.jit
def ranks(key, K: tl.constexpr):
    """i32 [LANES]: how many lanes have a larger key, or the same and come before; of all behind the
    K first, K or more.

    Lanes are compared with those of their group, and with the K first of each other group. Keys
    are i32, larger than the smallest.
    """
    LANES: tl.constexpr = key.shape[0]
    SIZE: tl.constexpr = LANES if LANES < 32 else 32
    GROUPS: tl.constexpr = LANES // SIZE
    key = tl.reshape(key, (GROUPS, SIZE))
    rank = _compared(key)
    if GROUPS > 1:
        FIRST: tl.constexpr = K if K < SIZE else SIZE
        FIRST2: tl.constexpr = triton.next_power_of_2(FIRST)
        place = tl.arange(0, FIRST2)[:, None, None]
        first = tl.where(rank[None, :, :] == place, key[None, :, :], -0x80000000)
        first = tl.reshape(tl.max(first, 2), (FIRST2 * GROUPS,))
        theirs = (tl.arange(0, FIRST2 * GROUPS) % GROUPS)[:, None, None]
        ours = tl.arange(0, GROUPS)[None, :, None]
        above = key[None, :, :] - (theirs < ours).to(tl.int32)
        above = first[:, None, None] > tl.where(theirs == ours, 0x7FFFFFFF, above)
        rank += tl.sum(above.to(tl.int32), 0)
    return tl.reshape(rank, (LANES,))


@triton.jit
def picked(key, K: tl.constexpr):
    """`ranks` of the K first lanes, found one after the other; of all others LANES."""
    lane = tl.arange(0, key.shape[0])
    order = ranked(key, lane)
    rank = tl.full(key.shape, key.shape[0], tl.int32)
    for j in range(K):
        best = lane == lane_of(tl.max(order, 0))
        rank = tl.where(best, j, rank)
        order = tl.where(best, -0x7FFFFFFFFFFFFFFF, order)
    return rank


@triton.jit
def _two_largest(a, b, c, d):
    """Of two pairs, each a larger and a smaller key."""
    return tl.maximum(a, c), tl.maximum(tl.minimum(a, c), tl.maximum(b, d))


@triton.jit
def kept_groups(judged, present, choice):
    """i1 [GROUPS2 · SIZE2]: whether a lane's group is one of the TOP best, judged by its largest
    value or, with TOP2, by the sum of its two largest."""
    GROUPS2: tl.constexpr = choice.GROUPS2
    SIZE2: tl.constexpr = choice.SIZE2
    key = ordered(tl.where(present, judged, float("-inf")))
    key = tl.reshape(key, (GROUPS2, SIZE2))
    if choice.TOP2:
        none = tl.full((GROUPS2, SIZE2), ABSENT, tl.int32)
        first, second = tl.reduce((key, none), 1, _two_largest)
        score = ordered(float_of(first) + float_of(second))
    else:
        score = tl.max(key, 1)
    score = tl.where(tl.arange(0, GROUPS2) < choice.GROUPS, score, ABSENT)
    kept = (ranks(score, choice.TOP) < choice.TOP).to(tl.int32)
    kept = tl.broadcast_to(kept[:, None], (GROUPS2, SIZE2))
    return tl.reshape(kept, (GROUPS2 * SIZE2,)) != 0


@triton.jit
def choose(sums, bias, correction, choice, token):
    """Stores row `token` (i64) of the weights and indices of a Choice.

    `sums` f32 [GROUPS2 · SIZE2] are the router's products, not yet rounded, `bias` and `correction`
    the choice's `offsets`. An index always names an expert, whatever the sums are.
    """
    K: tl.constexpr = choice.K
    LANES: tl.constexpr = choice.GROUPS2 * choice.SIZE2
    expert, present = experts_in_lanes(choice)
    if choice.bias is not None:
        sums += bias
    logits = sums.to(choice.LOGITS).to(tl.float32)
    if choice.SIGMOID:
        scores = 1 / (1 + tl.exp(-logits))
    else:
        largest = float_of(_of_all(tl.where(present, ordered(logits), ABSENT), True))
        shifted = tl.exp(tl.where(present, logits, float("-inf")) - largest)
        scores = shifted / _of_all(shifted, False)
    judged = scores
    if choice.correction is not None:
        judged += correction
    key = ordered(judged)
    if choice.TOP < choice.GROUPS:
        key = tl.where(kept_groups(judged, present, choice), key, KEPT_OUT)
    key = tl.where(present, key, ABSENT)
    if LANES <= COMPARED:
        rank = ranks(key, K)
    else:
        rank = picked(key, K)
    # Present lanes come first, and there are K at least.
    chosen = rank < K
    weight = tl.where(chosen, scores, 0.0)
    if choice.NORMALIZE:
        weight = weight / (_of_all(weight, False) + choice.SUM_EPS)
    row = token * (K + choice.SHARED)
    to = choice.weights.dtype.element_ty
    tl.store(choice.weights + row + rank, (weight * choice.SCALE).to(to), mask=chosen)
    tl.store(choice.indices + row + rank, expert.to(tl.int64), mask=chosen)
    if choice.SHARED:
        column = tl.arange(0, choice.COLUMNS)
        shared = (column >= K) & (column < K + choice.SHARED)
        one = tl.full(column.shape, 1.0, tl.float32)
        tl.store(choice.weights + row + column, one.to(to), mask=shared)
        index = choice.GROUPS * choice.SIZE + column - K
        tl.store(choice.indices + row + column, index.to(tl.int64), mask=shared)
