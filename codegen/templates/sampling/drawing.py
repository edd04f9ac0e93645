"""What is done to one row of scores to draw from it: searched, cut and summed, in a fixed order.

A row is n scores f32 in memory, in the order of token ids; its weights are
exp((score - largest) · inverse), where `inverse` is 1 / temperature. Scores are compared by keys:
integers in the order of the scores. Nothing depends on anything but the row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# The key of -inf.
_LOWEST = tl.constexpr(-2139095041)


class Settings(NamedTuple):
    """What rows ask for: [rows] each, as compiler.ops.sampling has them."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    draw: Any


class Pieces(NamedTuple):
    """A row of V logits, STEP apart, in PARTS parts of PART and in STRIPS strips of STRIP scores,
    with WORDS words of `seen`. Scores take ROOM: behind them is room for LIST that matter. C most
    likely tokens are sought. PARTS_UP, STRIPS_UP and C_UP are powers of 2 that hold PARTS, STRIPS
    and C."""

    V: Any
    STEP: Any
    ROOM: Any
    PART: Any
    PARTS: Any
    PARTS_UP: Any
    STRIP: Any
    STRIPS: Any
    STRIPS_UP: Any
    WORDS: Any
    LIST: Any
    C: Any
    C_UP: Any


@triton.jit
def key_of(x):
    """i32 in the order of x f32, in which -0 and 0 are two."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The f32 whose key is `key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def count_from(row, n, low, BLOCK: tl.constexpr):
    """How many scores have a key of at least `low`."""
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < n, other=float("-inf"))
        found += ((at < n) & (key_of(x) >= low)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def mass_between(row, n, low, high, largest, inverse, BLOCK: tl.constexpr):
    """The weight of the scores whose keys are in [low, high]."""
    found = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < n, other=float("-inf"))
        key = key_of(x)
        inside = (at < n) & (key >= low) & (key <= high)
        found += tl.where(inside, tl.exp((x - largest) * inverse), 0.0)
    return tl.sum(found, 0)


@triton.jit
def kth_largest(row, n, k, low, high, BLOCK: tl.constexpr):
    """A key in [low, high], where all of the n >= k scores are, that the k largest of them and
    those equal to the least of these reach, and no others."""
    least = low.to(tl.int64)
    most = high.to(tl.int64)
    while least < most:
        middle = (least + most + 1) >> 1
        count = count_from(row, n, middle.to(tl.int32), BLOCK)
        if count >= k:
            least = middle
        else:
            most = middle - 1
        if count == k:
            most = middle
    return least.to(tl.int32)


@triton.jit
def first_beyond(row, n, target, low, high, largest, inverse, BLOCK: tl.constexpr):
    """The least key in [low, high] up to which the weight from `low` on exceeds `target`; `high`
    where there is none."""
    least = low.to(tl.int64)
    most = high.to(tl.int64)
    while least < most:
        middle = (least + most) >> 1
        mass = mass_between(row, n, low, middle.to(tl.int32), largest, inverse, BLOCK)
        if mass > target:
            most = middle
        else:
            least = middle + 1
    return least.to(tl.int32)


@triton.jit
def place_of(row, n, key, rank, BLOCK: tl.constexpr):
    """Where the `rank`-th (from 1) of the scores with this key stands; n where there are fewer."""
    found = n
    before = 0
    start = 0
    while (start < n) & (found == n):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < n, other=float("-inf"))
        equal = ((at < n) & (key_of(x) == key)).to(tl.int32)
        counted = before + tl.cumsum(equal, 0)
        found = tl.min(tl.where((equal == 1) & (counted == rank), at, n), 0)
        before += tl.sum(equal, 0)
        start += BLOCK
    return found


@triton.jit
def kept_weights(row, at, end, edge, last, floor, largest, inverse):
    """Weights of the scores at `at` < end; 0 for those with a key below `edge`, for those at the
    edge that stand behind `last`, and for those that are less than `floor` after scaling."""
    x = tl.load(row + at, mask=at < end, other=float("-inf"))
    key = key_of(x)
    scaled = (x - largest) * inverse
    kept = (key > edge) | ((key == edge) & (at <= last))
    return tl.where((at < end) & kept & (scaled >= floor), tl.exp(scaled), 0.0)


@triton.jit
def kept_mass(row, n, edge, last, floor, largest, inverse, BLOCK: tl.constexpr):
    """The sum of kept_weights, block by block as `draw_from` adds them."""
    mass = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mass += tl.sum(kept_weights(row, at, n, edge, last, floor, largest, inverse), 0)
    return mass


@triton.jit
def draw_from(
    row, start, end, mass, target, edge, last, floor, largest, inverse, BLOCK: tl.constexpr
):
    """The first place in [start, end) at which `mass` and the kept weights up to there exceed
    `target`; where rounding leaves none, the last that has a weight."""
    none: tl.constexpr = 2147483647
    found = none
    behind = start
    while (start < end) & (found == none):
        at = start + tl.arange(0, BLOCK)
        weights = kept_weights(row, at, end, edge, last, floor, largest, inverse)
        beyond = (weights > 0) & (mass + tl.cumsum(weights, 0) > target)
        found = tl.min(tl.where(beyond, at, none), 0)
        behind = tl.maximum(behind, tl.max(tl.where(weights > 0, at, 0), 0))
        mass += tl.sum(weights, 0)
        start += BLOCK
    return tl.where(found == none, behind, found)


@triton.jit
def drawn_token(
    settings, pieces, scores, largest, mass, tail, ids, length, row, BLOCK: tl.constexpr
):
    """The token that is drawn from a row that is not greedy."""
    V: tl.constexpr = pieces.V
    STRIPS: tl.constexpr = pieces.STRIPS
    STRIPS_UP: tl.constexpr = pieces.STRIPS_UP
    LIST: tl.constexpr = pieces.LIST
    inverse = 1.0 / tl.load(settings.temperature + row).to(tl.float32)
    k = tl.load(settings.top_k + row)
    p = tl.load(settings.top_p + row).to(tl.float32)
    least = tl.load(settings.min_p + row).to(tl.float32)
    part = tl.load(settings.draw + row).to(tl.float32)
    strip = tl.arange(0, STRIPS_UP)
    held = row * STRIPS + strip
    masses = tl.load(mass + held, mask=strip < STRIPS, other=0.0)
    whole = tl.sum(masses, 0)

    n = tl.load(length + row)
    first = row * pieces.ROOM
    outside = 0.0
    listed = n <= LIST
    if listed:
        first += V
        outside = tl.sum(tl.load(tail + held, mask=strip < STRIPS, other=0.0), 0)
    else:
        n = V
    place = scores + first

    edge = _LOWEST
    high = key_of(largest)
    last = n
    limits_k = (k > 0) & (k < V)
    if limits_k:
        edge = kth_largest(place, n, k, edge, high, BLOCK)
        # What has no place among the k is no part of what top_p is a share of.
        whole = mass_between(place, n, edge, high, largest, inverse, BLOCK)
        outside = 0.0
    if p < 1:
        low = edge
        target = (1.0 - p) * whole - outside
        edge = first_beyond(place, n, target, low, high, largest, inverse, BLOCK)
        equal = count_from(place, n, edge, BLOCK)
        if edge < high:
            equal -= count_from(place, n, edge + 1, BLOCK)
        left = target
        if edge > low:
            left -= mass_between(place, n, low, edge - 1, largest, inverse, BLOCK)
        one = tl.exp((value_of(edge) - largest) * inverse)
        dropped = tl.minimum(tl.maximum(left / one, 0.0), (equal - 1).to(tl.float32)).to(tl.int32)
        if dropped > 0:
            last = place_of(place, n, edge, equal - dropped, BLOCK)
    floor = float("-inf")
    if least > 0:
        floor = tl.minimum(tl.log(least), 0.0)

    start = 0
    end = n
    before = 0.0
    if (p < 1) | limits_k | (least > 0) | listed:
        whole = kept_mass(place, n, edge, last, floor, largest, inverse, BLOCK)
    else:
        # Nothing is left out: the strip is found by the weights of strips.
        beyond = (masses > 0) & (tl.cumsum(masses, 0) > part * whole)
        chosen = tl.min(tl.where(beyond, strip, STRIPS_UP), 0)
        if chosen == STRIPS_UP:
            chosen = tl.max(tl.where(masses > 0, strip, 0), 0)
        before = tl.sum(tl.where(strip < chosen, masses, 0.0), 0)
        start = chosen * pieces.STRIP
        end = tl.minimum(start + pieces.STRIP, V)
    found = draw_from(
        place, start, end, before, part * whole, edge, last, floor, largest, inverse, BLOCK
    )
    if listed:
        found = tl.load(ids + row * LIST + found)
    return found
