"""The router's choice of experts for one token, on scores that lie in registers.

Experts lie in lanes group by group, each group padded to a power of 2, so the order of lanes is the
order of experts. Ties go to the expert, or group, of the smallest index.

Keys are i32. The smallest, -2^31, is of what is not there or was chosen before; the one above it of
what its group keeps out. No float's is as small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rowwise.arithmetic import ordered


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
def kept_groups(judged, present, choice):
    """i1 [GROUPS2 · SIZE2]: whether a lane's group is one of the TOP best, judged by its largest
    value or, with TOP2, by the sum of its two largest."""
    GROUPS2: tl.constexpr = choice.GROUPS2
    SIZE2: tl.constexpr = choice.SIZE2
    by_group = tl.reshape(tl.where(present, judged, float("-inf")), (GROUPS2, SIZE2))
    within = tl.broadcast_to(tl.arange(0, SIZE2)[None, :], (GROUPS2, SIZE2))
    first = tl.max(ranked(ordered(by_group), within), 1)
    at = lane_of(first)[:, None] == within
    score = tl.sum(tl.where(at, by_group, 0.0), 1)
    if choice.TOP2:
        rest = tl.where(at, -2147483648, ordered(by_group))
        second = lane_of(tl.max(ranked(rest, within), 1))[:, None] == within
        score += tl.sum(tl.where(second, by_group, 0.0), 1)
    group = tl.arange(0, GROUPS2)
    key = tl.where(group < choice.GROUPS, ordered(score), -2147483648)
    kept = group < 0
    for _ in tl.static_range(choice.TOP):
        best = group == lane_of(tl.max(ranked(key, group), 0))
        kept = kept | best
        key = tl.where(best, -2147483648, key)
    all_kept = tl.broadcast_to(kept.to(tl.int32)[:, None], (GROUPS2, SIZE2))
    return tl.reshape(all_kept, (GROUPS2 * SIZE2,)) != 0


@triton.jit
def choose(sums, choice, token):
    """Stores row `token` (i64) of the weights and indices of a Choice.

    `sums` f32 [GROUPS2 · SIZE2] are the router's products, not yet rounded. An index always names
    an expert, whatever the sums are.
    """
    GROUPS: tl.constexpr = choice.GROUPS
    SIZE2: tl.constexpr = choice.SIZE2
    K: tl.constexpr = choice.K
    lane = tl.arange(0, choice.GROUPS2 * SIZE2)
    expert, present = experts_in_lanes(choice)
    if choice.bias is not None:
        bias = tl.load(choice.bias + expert, mask=present, other=0)
        sums += bias.to(choice.LOGITS).to(tl.float32)
    logits = sums.to(choice.LOGITS).to(tl.float32)
    if choice.SIGMOID:
        scores = 1 / (1 + tl.exp(-logits))
    else:
        shifted = tl.where(present, logits, float("-inf"))
        shifted = tl.exp(shifted - tl.max(shifted, 0))
        scores = shifted / tl.sum(shifted, 0)
    judged = scores
    if choice.correction is not None:
        judged += tl.load(choice.correction + expert, mask=present, other=0).to(tl.float32)
    key = ordered(judged)
    if choice.TOP < GROUPS:
        kept = kept_groups(judged, present, choice)
        key = tl.where(kept, key, -2147483647)
    order = ranked(tl.where(present, key, -2147483648), lane)
    taken = ranked(tl.full(lane.shape, -2147483648, tl.int32), lane)
    column = tl.arange(0, choice.COLUMNS)
    chosen = tl.where(column < K, 0, GROUPS * choice.SIZE + column - K)
    weight = tl.zeros([choice.COLUMNS], tl.float32)
    for j in range(K):
        first = tl.max(order, 0)
        best = lane_of(first)
        if choice.correction is None:
            # Keys are those of scores, which are not negative: their bits.
            score = (first >> 16).to(tl.int32).to(tl.float32, bitcast=True)
        else:
            score = tl.sum(tl.where(lane == best, scores, 0.0), 0)
        weight = tl.where(column == j, score, weight)
        chosen = tl.where(column == j, best // SIZE2 * choice.SIZE + best % SIZE2, chosen)
        order = tl.where(lane == best, taken, order)
    if choice.NORMALIZE:
        weight = weight / (tl.sum(weight, 0) + choice.SUM_EPS)
    weight = tl.where(column < K, weight * choice.SCALE, 1.0)
    inside = column < K + choice.SHARED
    at = token * (K + choice.SHARED) + column
    tl.store(choice.weights + at, weight.to(choice.weights.dtype.element_ty), mask=inside)
    tl.store(choice.indices + at, chosen.to(tl.int64), mask=inside)
