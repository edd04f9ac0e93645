"""Rules of raise-ops for normalisations: from arithmetic over the last dim to `rms_norm`
and `layer_norm`.
"""

from __future__ import annotations

from ...compiler.ir import Value
from ...compiler.ops import norm, pointwise, reduce, shape
from ...compiler.ops.leaf import literal
from ...compiler.rewrite import (
    Decline,
    Match,
    Pat,
    Rule,
    either,
    maybe,
    pat,
)

X, EPS, WEIGHT = Pat(), Pat(literal), Pat(where=lambda v: v.node.is_constant)
WIDE = maybe(pointwise.cast, X)


def _given(m: Match, mean: Pat, result: Value) -> Value:
    """What is normed, in the dtype of `result`: before or after its cast."""
    given = m[X] if m[X].type == result.type else m[WIDE]
    if m[mean].attrs["dim"] % given.type.rank != given.type.rank - 1:
        raise Decline("the mean is not over the last dim")
    if given.type != result.type:
        raise Decline(f"{m[X].type} goes in and {result.type} comes out")
    return given


# x · rsqrt(mean(x²) + eps) · w, with the casts around it that bf16 models have. Models differ in
# where they round to x's dtype (before or after the weight); rms_norm rounds once, at the end.
MEAN_SQUARE = Pat(reduce.mean, (pat(pointwise.mul, WIDE, WIDE),))
POWER = pat(pointwise.add, MEAN_SQUARE, EPS)
MINUS_HALF = Pat(literal, where=lambda v: v.attrs["value"] == -0.5)
INVERSE = either(pat(pointwise.rsqrt, POWER), pat(pointwise.pow_, POWER, MINUS_HALF))
UNIT = either(
    pat(pointwise.mul, WIDE, pat(shape.view, INVERSE)),
    pat(pointwise.div, WIDE, pat(shape.view, pat(pointwise.sqrt, POWER))),
)
SCALED = pat(pointwise.mul, maybe(pointwise.cast, UNIT), WEIGHT)
RMS_NORM = maybe(pointwise.cast, either(SCALED, UNIT))


def _rms_norm(m: Match) -> Value:
    given, weight = _given(m, MEAN_SQUARE, m[RMS_NORM]), m.get(WEIGHT)
    if weight and weight.type.shape != given.type.shape[-1:]:
        raise Decline(f"a weight {weight.type} does not scale the last dim of {given.type}")
    eps = float(m[EPS].attrs["value"])
    return norm.rms_norm(given, weight=weight and _unwidened(weight), eps=eps)


def _unwidened(weight: Value) -> Value:
    """A weight before it was made wide, which rms_norm does itself, exactly: what a model casts to
    f32 for the arithmetic stays as it is held."""
    if weight.op is not pointwise.cast or weight.type.dtype not in ("f32", "f64"):
        return weight
    (held,) = weight.node.args
    return held if held.type.dtype in ("bf16", "f16") else weight


# rms_norm(x - mean(x), w) == layer_norm(x, w): what is left has the variance for mean square. The
# casts of bf16 models are around it, as around rms_norm.
MEAN = Pat(reduce.mean, (WIDE,))
NORMED = pat(norm.rms_norm, pat(pointwise.sub, WIDE, pat(shape.view, MEAN)))
LAYER_NORM = maybe(pointwise.cast, NORMED)


def _layer_norm(m: Match) -> Value:
    given, normed = _given(m, MEAN, m[LAYER_NORM]), m[NORMED].node
    return norm.layer_norm(given, weight=normed.operand("weight"), eps=normed.attrs["eps"])


RULES = (Rule("rms-norm", (RMS_NORM,), _rms_norm), Rule("layer-norm", (LAYER_NORM,), _layer_norm))
