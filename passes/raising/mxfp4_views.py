"""What is done to a weight in MXFP4 is done to its codes and scales, so that it stays packed.

Views, slices and concatenations of `mxfp4(codes, scales)` that keep whole groups together move
inside: what uses the weight then has `mxfp4(...)` itself as its operand. Rules of `canonicalize`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...compiler.dtypes import FLOATS
from ...compiler.ir import Value
from ...compiler.ops import pointwise, shape
from ...compiler.ops.mxfp4 import mxfp4
from ...compiler.rewrite import Decline, Match, Pat, Rule, pat

# A wildcard, since a weight may have several users: each gets the part that it uses.
WEIGHT = Pat(where=lambda v: v.op is mxfp4)
ROWS = Pat()


def _inside(weight: Value, move: Callable[[Value, int], Value]) -> Value:
    """mxfp4 of the moved codes and scales; `move` is told how many elements one of each holds."""
    codes, scales = weight.node.args
    return mxfp4(move(codes, 2), move(scales, _group(weight)), dtype=weight.attrs["dtype"])


def _group(weight: Value) -> int:
    """Elements that share a scale."""
    width: Any = weight.type.shape[-1]
    blocks: Any = weight.node.args[1].type.shape[-1]
    return width // blocks


# view(mxfp4(c, s)) == mxfp4(view(c), view(s)), the last dim kept
VIEW = pat(shape.view, WEIGHT)


def _view(m: Match) -> Value:
    *lead, last = m[VIEW].type.shape
    if last != m[WEIGHT].type.shape[-1]:
        raise Decline("rows are split or joined")

    def move(part: Value, _: int) -> Value:
        return shape.view(part, shape=(*lead, part.type.shape[-1]))

    return _inside(m[WEIGHT], move)


# permute(mxfp4(c, s)) == mxfp4(permute(c), permute(s)), the last dim kept
PERMUTE = pat(shape.permute, WEIGHT)


def _permute(m: Match) -> Value:
    dims = m[PERMUTE].attrs["dims"]
    if dims[-1] != len(dims) - 1:
        raise Decline("the last dim moves")
    return _inside(m[WEIGHT], lambda part, _: shape.permute(part, dims=dims))


# slice(mxfp4(c, s)) == mxfp4(slice(c), slice(s)); along the last dim between whole groups
SLICE = pat(shape.slice_, WEIGHT)


def _slice(m: Match) -> Value:
    attrs, weight = m[SLICE].attrs, m[WEIGHT]
    axis = attrs["dim"] % weight.type.rank
    last, bounds = axis == weight.type.rank - 1, (attrs["start"], attrs["stop"])
    whole = attrs.get("step", 1) == 1 and all(b % _group(weight) == 0 for b in bounds)
    if last and not (whole and bounds[0] < bounds[1]):
        raise Decline("groups are cut")

    def move(part: Value, held: int) -> Value:
        start, stop = (b // held for b in bounds) if last else bounds
        return shape.slice_(part, **{**attrs, "dim": axis, "start": start, "stop": stop})

    return _inside(weight, move)


# take(mxfp4(c, s), rows) == mxfp4(take(c, rows), take(s, rows)), unless a row is one element
TAKE = pat(shape.take, WEIGHT, ROWS)


def _take(m: Match) -> Value:
    if m[WEIGHT].type.rank < 2:
        raise Decline("single elements are taken")
    return _inside(m[WEIGHT], lambda part, _: shape.take(part, m[ROWS]))


# cat(mxfp4(c, s), mxfp4(d, t), ...) == mxfp4(cat(c, d, ...), cat(s, t, ...)) of equal groups
CAT = Pat(shape.cat, where=lambda v: all(a.op is mxfp4 for a in v.node.args))


def _cat(m: Match) -> Value:
    weights, axis = m[CAT].node.args, m[CAT].attrs["dim"]
    if len({_group(w) for w in weights}) > 1:
        raise Decline("the groups differ")
    codes, scales = (shape.cat(*(w.node.args[i] for w in weights), dim=axis) for i in (0, 1))
    return mxfp4(codes, scales, dtype=m[CAT].type.dtype)


# cast(mxfp4(c, s, a), b) == mxfp4(c, s, b) where a holds every number of the format, or rounds it
# (to infinity, beyond its range) as b does
CAST = pat(pointwise.cast, WEIGHT)


def _cast(m: Match) -> Value:
    before, after = m[WEIGHT].type.dtype, m[CAST].type.dtype
    if before == "f16" or after not in FLOATS or (after == "f64" != before):
        raise Decline(f"{before} rounds otherwise than {after}")
    return mxfp4(*m[WEIGHT].node.args, dtype=after)


RULES = (
    Rule("mxfp4-view", (VIEW,), _view),
    Rule("mxfp4-permute", (PERMUTE,), _permute),
    Rule("mxfp4-slice", (SLICE,), _slice),
    Rule("mxfp4-take", (TAKE,), _take),
    Rule("mxfp4-cat", (CAT,), _cat),
    Rule("mxfp4-cast", (CAST,), _cast),
)
