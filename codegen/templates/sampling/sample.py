"""The next token of every row of logits, in four launches whatever the rows ask for.

1. Parts of a row: penalties, the largest score, what the log-softmax needs, the most likely tokens.
2. Strips of a row that is drawn from: their weight, and how many scores lie how far below the
   largest, in bins.
3. The scores that can matter are the upper bins, by those counts: they are listed, in the order of
   ids, and the weight below them is summed. Seldom they are too many, then the row itself is used.
4. One program a row: the filters and the draw over that list. Another finds the most likely tokens.

Greedy rows leave 2 and 3 at once. Sums are in orders that only the vocabulary fixes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....compiler.ops.sampling import SETTINGS, WORD
from ....compiler.types import TensorType
from ...kernel_query import Arg, Call, Candidate, Declined, KernelQuery, Result, Temp
from ..pdl import pdl_wait
from .drawing import Pieces, Settings, drawn_token, key_of, value_of


@dataclass(frozen=True)
class Sizes:
    """Scores in a part, in a strip, in the list of those that matter, and that the last launch
    takes at a time."""

    part: int = 1024
    strip: int = 4096
    listed: int = 16384
    block: int = 2048


SIZES = Sizes()
# Threads of the last launch.
_THREADS = 512
# Bins are half a unit of (score - max) / temperature wide; the last has no end.
_BINS = tl.constexpr(64)
# Most likely tokens that are sought, one after the other.
_MOST_CANDIDATES = 32
_WORD = tl.constexpr(WORD)


class Parts(NamedTuple):
    """Of every part of a row [rows, PARTS]: the largest logit and the sum of the exponentials of
    its difference to them, the best score and its token, and the keys and tokens of the most
    likely [rows, PARTS, C] (None without)."""

    raw_max: Any
    raw_sum: Any
    best: Any
    best_at: Any
    top_keys: Any
    top_ids: Any


@triton.jit
def part_kernel(
    logits, temperature, penalty, seen, top, scores, parts, pieces, PROGRAMMATIC: tl.constexpr
):
    """Part program_id(0) of row program_id(1). A part that holds NaN has a raw_max of NaN."""
    pdl_wait(PROGRAMMATIC)
    V: tl.constexpr = pieces.V
    BLOCK: tl.constexpr = pieces.PART
    C: tl.constexpr = pieces.C
    part = tl.program_id(0)
    row = tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    x = tl.load(logits + row * pieces.STEP + at, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)
    here = row * pieces.PARTS + part

    largest = tl.max(x, 0)
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    exponentials = tl.where(x > float("-inf"), tl.exp(x - largest), 0.0)
    tl.store(parts.raw_max + here, tl.where(broken, float("nan"), largest))
    tl.store(parts.raw_sum + here, tl.sum(exponentials, 0))

    divisor = tl.load(penalty + row).to(tl.float32)
    score = x
    if divisor != 1.0:
        word = tl.load(seen + row * pieces.WORDS + at // _WORD, mask=inside, other=0)
        changed = tl.where(x < 0, x * divisor, tl.div_rn(x, divisor))
        changed = tl.minimum(tl.maximum(changed, -3.4028234e38), 3.4028234e38)
        marked = (((word >> (at % _WORD)) & 1) == 1) & (x > float("-inf"))
        score = tl.where(marked, changed, x)
    highest = tl.max(score, 0)
    tl.store(parts.best + here, highest)
    tl.store(parts.best_at + here, tl.min(tl.where((score == highest) & inside, at, V), 0))
    if tl.load(temperature + row).to(tl.float32) > 0:
        tl.store(scores + row * pieces.ROOM + at, score, mask=inside)

    if C > 0:
        # Below the key of every number.
        gone: tl.constexpr = -2147483648
        keys = tl.where(inside, key_of(x), gone)
        for i in range(tl.minimum(tl.load(top + row), C)):
            most = tl.max(keys, 0)
            id_ = tl.min(tl.where((keys == most) & (most > gone), at, V), 0)
            tl.store(parts.top_keys + here * C + i, most)
            tl.store(parts.top_ids + here * C + i, id_)
            keys = tl.where(at == id_, gone, keys)


@triton.jit
def _largest(best, row, pieces):
    part = tl.arange(0, pieces.PARTS_UP)
    inside = part < pieces.PARTS
    return tl.max(tl.load(best + row * pieces.PARTS + part, mask=inside, other=float("-inf")), 0)


@triton.jit
def _bins_of(scaled):
    """How many half units below 0 `scaled` lies, at most _BINS - 1 (NaN, too)."""
    bins = tl.minimum(-2.0 * scaled, _BINS - 1.0).to(tl.int32)
    return tl.where((bins >= 0) & (bins < _BINS), bins, _BINS - 1)


@triton.jit
def strip_kernel(temperature, scores, best, counts, mass, pieces, PROGRAMMATIC: tl.constexpr):
    """Strip program_id(0) of row program_id(1)."""
    pdl_wait(PROGRAMMATIC)
    V: tl.constexpr = pieces.V
    BLOCK: tl.constexpr = pieces.STRIP
    strip = tl.program_id(0)
    row = tl.program_id(1)
    heat = tl.load(temperature + row).to(tl.float32)
    if heat > 0:
        at = strip * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(scores + row * pieces.ROOM + at, mask=at < V, other=float("-inf"))
        scaled = (x - _largest(best, row, pieces)) * (1.0 / heat)
        tl.store(mass + row * pieces.STRIPS + strip, tl.sum(tl.exp(scaled), 0))
        bin_ = tl.arange(0, _BINS)
        found = tl.histogram(_bins_of(scaled), _BINS)
        # What lies past the row was counted in the last bin.
        past = tl.maximum((strip + 1) * BLOCK - V, 0)
        found = tl.where(bin_ == _BINS - 1, found - past, found)
        tl.store(counts + (row * pieces.STRIPS + strip) * _BINS + bin_, found)


@triton.jit
def list_kernel(
    settings, scores, best, counts, tail, ids, length, pieces, PROGRAMMATIC: tl.constexpr
):
    """Strip program_id(0) of row program_id(1): what of it is in the upper bins goes to its place
    behind the row, the weight of the rest to `tail`. `length` is how many are listed in all; more
    than LIST are not."""
    pdl_wait(PROGRAMMATIC)
    V: tl.constexpr = pieces.V
    STRIPS: tl.constexpr = pieces.STRIPS
    BLOCK: tl.constexpr = pieces.STRIP
    strip = tl.program_id(0)
    row = tl.program_id(1)
    heat = tl.load(settings.temperature + row).to(tl.float32)
    if heat > 0:
        k = tl.load(settings.top_k + row)
        p = tl.load(settings.top_p + row).to(tl.float32)
        least = tl.load(settings.min_p + row).to(tl.float32)
        bin_ = tl.arange(0, _BINS)
        other = tl.arange(0, pieces.STRIPS_UP)
        places = (row * STRIPS + other)[:, None] * _BINS + bin_[None, :]
        each = tl.load(counts + places, mask=(other < STRIPS)[:, None], other=0)
        total = tl.sum(each, 0)

        cut = _BINS - 1
        if (k > 0) & (k < V):
            cut = tl.sum((tl.cumsum(total, 0) < k).to(tl.int32), 0)
        elif p < 1:
            # What lies below a bin weighs at most this; what may be left out, at least that.
            upper = total.to(tl.float32) * tl.exp(-0.5 * bin_)
            below = tl.sum(tl.where(bin_[:, None] > bin_[None, :], upper[:, None], 0.0), 0)
            lower = tl.where(bin_ < _BINS - 1, upper * 0.6065306, 0.0)
            allowed = (1.0 - p) * tl.maximum(tl.sum(lower, 0), 1.0) * 0.9999
            cut = tl.minimum(tl.sum((below > allowed).to(tl.int32), 0), _BINS - 1)
        elif least > 0:
            cut = _bins_of(tl.log(least)) + 1

        listed = bin_ <= cut
        count = tl.sum(tl.where(listed, total, 0), 0)
        if strip == 0:
            tl.store(length + row, count)
        if count <= pieces.LIST:
            earlier = (other < strip)[:, None] & listed[None, :]
            first = tl.sum(tl.sum(tl.where(earlier, each, 0), 1), 0)
            at = strip * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(scores + row * pieces.ROOM + at, mask=at < V, other=float("-inf"))
            scaled = (x - _largest(best, row, pieces)) * (1.0 / heat)
            goes = (_bins_of(scaled) <= cut) & (at < V)
            to = first + tl.cumsum(goes.to(tl.int32), 0) - 1
            tl.store(scores + row * pieces.ROOM + V + to, x, mask=goes)
            tl.store(ids + row * pieces.LIST + to, at, mask=goes)
            rest = tl.where(goes, 0.0, tl.exp(scaled))
            tl.store(tail + row * STRIPS + strip, tl.sum(rest, 0))


@triton.jit
def choose_kernel(
    logits,
    settings,
    top,
    scores,
    parts,
    mass,
    tail,
    ids,
    length,
    token,
    logprob,
    top_tokens,
    top_logprobs,
    pieces,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Row program_id(0): its token where program_id(1) is 0, else its most likely tokens."""
    pdl_wait(PROGRAMMATIC)
    V: tl.constexpr = pieces.V
    C: tl.constexpr = pieces.C
    row = tl.program_id(0)
    part = tl.arange(0, pieces.PARTS_UP)
    held = row * pieces.PARTS + part
    there = part < pieces.PARTS
    raws = tl.load(parts.raw_max + held, mask=there, other=float("-inf"))
    sums = tl.load(parts.raw_sum + held, mask=there, other=0.0)
    broken = tl.max((raws != raws).to(tl.int32), 0) > 0
    most = tl.max(tl.where(raws == raws, raws, float("-inf")), 0)
    fine = (not broken) & (most > float("-inf")) & (most < float("inf"))
    log_sum = tl.log(tl.sum(tl.where(raws > float("-inf"), sums * tl.exp(raws - most), 0.0), 0))
    if tl.program_id(1) == 0:
        chosen = -1
        likely = tl.where(broken, float("nan"), most)
        if fine:
            bests = tl.load(parts.best + held, mask=there, other=float("-inf"))
            largest = tl.max(bests, 0)
            if tl.load(settings.temperature + row).to(tl.float32) > 0:
                chosen = drawn_token(
                    settings, pieces, scores, largest, mass, tail, ids, length, row, BLOCK
                )
            else:
                places = tl.load(parts.best_at + held, mask=there, other=V)
                chosen = tl.min(tl.where(bests == largest, places, V), 0)
            likely = tl.load(logits + row * pieces.STEP + chosen).to(tl.float32) - most - log_sum
        tl.store(token + row, chosen)
        tl.store(logprob + row, likely)
    if C > 0 and tl.program_id(1) == 1:
        gone: tl.constexpr = -2147483648
        wanted = tl.where(fine, tl.minimum(tl.maximum(tl.load(top + row), 0), C), 0)
        column = tl.arange(0, pieces.C_UP)
        unasked = (column >= wanted) & (column < C)
        tl.store(top_tokens + row * C + column, -1, mask=unasked)
        tl.store(top_logprobs + row * C + column, 0.0, mask=unasked)
        at = held[:, None] * C + column[None, :]
        given = there[:, None] & (column < wanted)[None, :]
        keys = tl.load(parts.top_keys + at, mask=given, other=gone)
        places = tl.load(parts.top_ids + at, mask=given, other=V)
        for i in range(wanted):
            key = tl.max(tl.max(keys, 1), 0)
            id_ = tl.min(tl.min(tl.where(keys == key, places, V), 1), 0)
            tl.store(top_tokens + row * C + i, id_)
            tl.store(top_logprobs + row * C + i, value_of(key) - most - log_sum)
            keys = tl.where(places == id_, gone, keys)


def sample(query: KernelQuery) -> Candidate | Declined:
    """sample(logits, settings..., seen, top)."""
    logits, *rest = query.args
    rows, vocab = logits.shape
    count = int(query.attrs.get("candidates", 0))
    if logits.strides[1] != 1 or not all(x.dense for x in rest):
        return Declined(f"logits {logits.type} or their settings do not lie dense")
    if count > _MOST_CANDIDATES:
        return Declined(f"expected at most {_MOST_CANDIDATES} candidates, found {count}")
    if rows * max(vocab + SIZES.listed, logits.strides[0]) >= 2**31:
        return Declined(f"expected fewer than 2^31 scores, found {logits.type}")
    pieces = Pieces(
        V=vocab,
        STEP=logits.strides[0],
        ROOM=vocab + SIZES.listed,
        PART=SIZES.part,
        PARTS=(parts := triton.cdiv(vocab, SIZES.part)),
        PARTS_UP=triton.next_power_of_2(parts),
        STRIP=SIZES.strip,
        STRIPS=(strips := triton.cdiv(vocab, SIZES.strip)),
        STRIPS_UP=triton.next_power_of_2(strips),
        WORDS=triton.cdiv(vocab, WORD),
        LIST=SIZES.listed,
        C=count,
        C_UP=triton.next_power_of_2(max(count, 1)),
    )
    shapes = {
        "scores": ("f32", (rows, pieces.ROOM)),
        "raw_max": ("f32", (rows, parts)),
        "raw_sum": ("f32", (rows, parts)),
        "best": ("f32", (rows, parts)),
        "best_at": ("i32", (rows, parts)),
        "counts": ("i32", (rows, strips, _BINS.value)),
        "mass": ("f32", (rows, strips)),
        "tail": ("f32", (rows, strips)),
        "ids": ("i32", (rows, SIZES.listed)),
        "length": ("i32", (rows,)),
    }
    if count:
        shapes["top_keys"] = shapes["top_ids"] = ("i32", (rows, parts, count))
    names = ("logits", *(name for name, _ in SETTINGS), "seen", "top")
    results = ("token", "logprob", "top_tokens", "top_logprobs")
    places: dict[str, Any] = {
        **{name: Temp(name) for name in shapes},
        **{name: Arg(i) for i, name in enumerate(names)},
        **{name: Result(i) for i, name in enumerate(results[: len(query.results)])},
    }
    held = {
        **places,
        "settings": Settings(*(places[name] for name in Settings._fields)),
        "parts": Parts(*(places.get(name) for name in Parts._fields)),
        "pieces": pieces,
        "BLOCK": SIZES.block,
    }

    def call(kernel: Any, grid: tuple[int, int], writes: str, warps: int) -> Call:
        """A launch with what its parameters are called; None for operands that are not there."""
        names = [n for n in kernel.arg_names if n != "PROGRAMMATIC"]
        written = tuple(places[n] for n in writes.split() if n in places)
        return Call(kernel, {n: held.get(n) for n in names}, (*grid, 1), written, num_warps=warps)

    warps = _THREADS // query.target.warp
    calls = (
        call(part_kernel, (parts, rows), " ".join(("scores", *Parts._fields)), 4),
        call(strip_kernel, (strips, rows), "counts mass", 8),
        call(list_kernel, (strips, rows), "scores tail ids length", 8),
        call(choose_kernel, (rows, 2 if count else 1), " ".join(results), warps),
    )
    temps = {name: TensorType(dtype, shape) for name, (dtype, shape) in shapes.items()}
    reason = f"{parts} parts and {strips} strips a row, then a program a row"
    return Candidate(calls, query.seconds(len(calls)), reason, temps)


TEMPLATES = {"sample": (sample,)}
