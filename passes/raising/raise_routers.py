"""Rules of raise-ops for MoE routing: from scores, group limits and top-k to `router`."""

from __future__ import annotations

from typing import Any

from ...compiler.ir import Value
from ...compiler.ops import moe, pointwise, reduce, shape
from ...compiler.ops.leaf import literal
from ...compiler.rewrite import Decline, Match, Other, Pat, Rule, either, maybe, pat

LOGITS, BIAS = Pat(), Pat(where=lambda v: v.node.is_constant)
WIDE = maybe(pointwise.cast, LOGITS)
SOFTMAX, SIGMOID = pat(reduce.softmax, WIDE), pat(pointwise.sigmoid, WIDE)
SCORES = either(SOFTMAX, SIGMOID)
CHOICE = either(SCORES, pat(pointwise.add, SCORES, BIAS))

# The group limit: groups judged by their best, or their two best, and all others filled.
GROUPED = pat(shape.view, CHOICE)
BEST = Pat(reduce.topk, (GROUPED,), {"k": 2})
TOP2 = Pat(reduce.sum_, (BEST,))
MAX = Pat(reduce.amax, (GROUPED,))
GROUP_TOPK = Pat(reduce.topk, (either(TOP2, MAX),), index=1)
KEPT = Pat(shape.scatter, (Pat(shape.full, attrs={"value": 0}), GROUP_TOPK), {"value": 1})
MASK = Pat(
    pointwise.cast,
    (pat(shape.view, pat(shape.expand, maybe(shape.view, KEPT))),),
    {"dtype": "bool"},
)
FILL = Pat(literal)
LIMITED = pat(pointwise.where, pat(pointwise.logical_not, MASK), FILL, CHOICE)

# The weights: scores of what was chosen, maybe divided by their sum, maybe scaled.
TOPK = Pat(reduce.topk, (either(LIMITED, CHOICE),), index=1)
TOPK_VALUES = Pat(reduce.topk, (either(LIMITED, SCORES),))
GATHERED = pat(shape.gather, SCORES, TOPK)
PICKED = either(GATHERED, TOPK_VALUES)
SUM = Pat(reduce.sum_, (PICKED,))
EPS, CLAMP = Pat(literal), Pat(pointwise.clamp, (SUM,))
TOTAL = either(SUM, pat(pointwise.add, SUM, EPS), CLAMP)
NORMALIZED = pat(pointwise.div, PICKED, pat(shape.view, TOTAL))
SCALE = Pat(literal)
UNSCALED = either(NORMALIZED, PICKED)
WEIGHTS = maybe(pointwise.cast, either(pat(pointwise.mul, UNSCALED, SCALE), UNSCALED))

# softmax over the k largest logits
TOP_LOGITS = Pat(reduce.topk, (LOGITS,))
OVER_TOPK = maybe(pointwise.cast, Pat(reduce.softmax, (maybe(pointwise.cast, TOP_LOGITS),)))


def _last(value: Value) -> bool:
    """Whether a node along one dim goes along the last dim of its argument."""
    return value.attrs["dim"] % value.node.args[0].type.rank == value.node.args[0].type.rank - 1


def _epsilon(m: Match) -> float:
    """What is added to the sum. A lower bound under sums of softmax scores never acts."""
    if CLAMP in m:
        k, experts = m[PICKED].type.shape[-1], m[LOGITS].type.shape[-1]
        if SOFTMAX not in m or not m[CLAMP].attrs["min"] <= k / experts:
            raise Decline("the sum of the weights is bounded from below")
        return 0.0
    return float(m[EPS].attrs["value"]) if EPS in m else 0.0


def _groups(m: Match) -> dict[str, Any]:
    if LIMITED not in m:
        return {}
    tokens, groups, _ = m[GROUPED].type.shape
    shown = (m[GROUPED].type.rank, tokens, m[KEPT].attrs["dim"], m[MASK].type)
    if shown != (3, m[LOGITS].type.shape[0], 1, m[LOGITS].type.with_dtype("bool")):
        raise Decline("the groups are not over the experts")
    # A score from softmax is positive, so that 0 loses against it as -inf does.
    fill = m[FILL].attrs["value"]
    if fill != float("-inf") and not (fill == 0 and SOFTMAX in m and BIAS not in m):
        raise Decline(f"groups are filled with {fill}, which might be chosen")
    score = "top2" if TOP2 in m else "max"
    return {"groups": groups, "topk_groups": m[GROUP_TOPK].attrs["k"], "group_score": score}


def _router(values: bool) -> Rule:
    """With `values`, weights are the values of the top-k; else they are gathered."""

    def build(m: Match) -> tuple[Value, ...]:
        if values and BIAS in m:
            raise Decline("the weights have the bias in them")
        along = [p for p in (SOFTMAX, BEST, TOP2, MAX, GROUP_TOPK, TOPK, GATHERED, SUM) if p in m]
        if m[LOGITS].type.rank != 2 or not all(_last(m[p]) for p in along):
            raise Decline("scores are not over the experts of a token")
        attrs: dict[str, Any] = {
            "k": m[PICKED].type.shape[-1],
            "score": "softmax" if SOFTMAX in m else "sigmoid",
            "normalize": NORMALIZED in m,
            "dtype": m[WEIGHTS].type.dtype,
            **_groups(m),
        }
        if SCALE in m and m[SCALE].attrs["value"] != 1:
            attrs["scale"] = float(m[SCALE].attrs["value"])
        if eps := _epsilon(m):
            attrs["eps"] = eps
        return moe.router.all(m[LOGITS], correction=m.get(BIAS), **attrs)

    chosen = TOPK_VALUES if values else TOPK
    return Rule("router", (WEIGHTS, Other(chosen, 1)), build)


# softmax(top-k of logits) == softmax(logits) at the top k, divided by its sum there
def _over_topk(m: Match) -> tuple[Value, ...]:
    softmax = next(v for v in m.values() if v.op is reduce.softmax)
    if m[LOGITS].type.rank != 2 or not _last(softmax) or not _last(m[TOP_LOGITS]):
        raise Decline("scores are not over the experts of a token")
    dtype = m[OVER_TOPK].type.dtype
    k = m[TOP_LOGITS].attrs["k"]
    return moe.router.all(m[LOGITS], k=k, score="softmax", normalize=True, dtype=dtype)


RULES = (
    _router(values=False),
    _router(values=True),
    Rule("router-over-topk", (OVER_TOPK, Other(TOP_LOGITS, 1)), _over_topk),
)
