"""What is done to a weight in MXFP4 is done to its codes and scales, so that it stays packed.

Views, slices and concatenations of `mxfp4(codes, scales)` that keep whole groups together move
inside: what uses the weight then has `mxfp4(...)` itself as its operand. Rules of `canonicalize`.
"""

from __future__ import annotations

from ...compiler.dtypes import FLOATS
from ...compiler.ir import Value
from ...compiler.ops import pointwise, shape
from ...compiler.ops.mxfp4 import mxfp4
from ...compiler.rewrite import Decline, Match, Pat, Rule, pat
from ..moves import by_parts, concatenated, sliced

# A wildcard, since a weight may have several users: each gets the part that it uses.
WEIGHT = Pat(where=lambda v: v.op is mxfp4)
ROWS = Pat()

# view(mxfp4(c, s)) == mxfp4(view(c), view(s)), the last dim kept
VIEW = pat(shape.view, WEIGHT)


def _view(m: Match) -> Value:
    *lead, last = m[VIEW].type.shape
    if last != m[WEIGHT].type.shape[-1]:
        raise Decline("rows are split or joined")
    return by_parts(lambda x: shape.view(x, shape=(*lead, x.type.shape[-1])), m[WEIGHT])


# permute(mxfp4(c, s)) == mxfp4(permute(c), permute(s)), the last dim kept
PERMUTE = pat(shape.permute, WEIGHT)


def _permute(m: Match) -> Value:
    dims = m[PERMUTE].attrs["dims"]
    if dims[-1] != len(dims) - 1:
        raise Decline("the last dim moves")
    return by_parts(lambda x: shape.permute(x, dims=dims), m[WEIGHT])


# slice(mxfp4(c, s)) == mxfp4(slice(c), slice(s)); along the last dim between whole groups
SLICE = pat(shape.slice_, WEIGHT)


def _slice(m: Match) -> Value:
    attrs, axis = m[SLICE].attrs, m[SLICE].attrs["dim"] % m[WEIGHT].type.rank
    return sliced(m[WEIGHT], axis, attrs["start"], attrs["stop"], attrs.get("step", 1))


# take(mxfp4(c, s), rows) == mxfp4(take(c, rows), take(s, rows)), unless a row is one element
TAKE = pat(shape.take, WEIGHT, ROWS)


def _take(m: Match) -> Value:
    if m[WEIGHT].type.rank < 2:
        raise Decline("single elements are taken")
    return by_parts(lambda x: shape.take(x, m[ROWS]), m[WEIGHT])


# cat(mxfp4(c, s), mxfp4(d, t), ...) == mxfp4(cat(c, d, ...), cat(s, t, ...)) of equal groups
CAT = Pat(shape.cat, where=lambda v: all(a.op is mxfp4 for a in v.node.args))


def _cat(m: Match) -> Value:
    return concatenated(m[CAT].node.args, m[CAT].attrs["dim"])


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
