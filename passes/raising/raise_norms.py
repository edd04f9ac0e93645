"""Rules of raise-ops for normalisations: from arithmetic over the last dim to `rms_norm`
and `layer_norm`.
"""

from __future__ import annotations

from itertools import product

from ...compiler.ir import Value
from ...compiler.ops import norm, pointwise, reduce, shape
from ...compiler.ops.leaf import literal
from ...compiler.rewrite import Decline, Match, Pat, Rule, maybe, pat


def _rms_rule(root_form: str, scaled: bool) -> Rule:
    """x · rsqrt(mean(x²) + eps) · w, with the casts around it that bf16 models have.

    Models differ in where they round to x's dtype (before or after the weight); rms_norm rounds
    once, at the end.
    """
    x, eps, weight = Pat(), Pat(literal), Pat(where=lambda v: v.node.is_constant)
    wide = maybe(pointwise.cast, x)
    power = pat(pointwise.add, Pat(reduce.mean, (pat(pointwise.mul, wide, wide),)), eps)
    if root_form == "rsqrt":
        unit = pat(pointwise.mul, wide, pat(shape.view, pat(pointwise.rsqrt, power)))
    elif root_form == "sqrt":
        unit = pat(pointwise.div, wide, pat(shape.view, pat(pointwise.sqrt, power)))
    else:
        half = Pat(literal, where=lambda v: v.attrs["value"] == -0.5)
        inverse = pat(pointwise.pow_, power, half)
        unit = pat(pointwise.mul, wide, pat(shape.view, inverse))
    if scaled:
        unit = pat(pointwise.mul, maybe(pointwise.cast, unit), weight)
    root = maybe(pointwise.cast, unit)

    def build(m: Match) -> Value:
        result = m[root]
        given = m[x] if m[x].type == result.type else m[wide]
        mean = next(v for p, v in m.items() if p.op is reduce.mean)
        if mean.attrs["dim"] % mean.node.args[0].type.rank != given.type.rank - 1:
            raise Decline("the mean is not over the last dim")
        if given.type != result.type:
            raise Decline(f"{m[x].type} goes in and {result.type} comes out")
        if scaled and m[weight].type.shape != given.type.shape[-1:]:
            raise Decline(f"a weight {m[weight].type} does not scale the last dim of {given.type}")
        scale = _unwidened(m[weight]) if scaled else None
        return norm.rms_norm(given, weight=scale, eps=float(m[eps].attrs["value"]))

    return Rule("rms-norm", (root,), build)


def _unwidened(weight: Value) -> Value:
    """A weight before it was made wide, which rms_norm does itself, exactly: what a model casts to
    f32 for the arithmetic stays as it is held."""
    if weight.op is not pointwise.cast or weight.type.dtype not in ("f32", "f64"):
        return weight
    (held,) = weight.node.args
    return held if held.type.dtype in ("bf16", "f16") else weight


def _layer_rule() -> Rule:
    """rms_norm(x - mean(x), w) == layer_norm(x, w): what is left has the variance for mean square.

    The casts of bf16 models are around it, as around rms_norm.
    """
    x = Pat()
    wide = maybe(pointwise.cast, x)
    mean = Pat(reduce.mean, (wide,))
    centred = pat(pointwise.sub, wide, pat(shape.view, mean))
    normed = pat(norm.rms_norm, centred)
    root = maybe(pointwise.cast, normed)

    def build(m: Match) -> Value:
        given = m[x] if m[x].type == m[root].type else m[wide]
        if m[mean].attrs["dim"] % given.type.rank != given.type.rank - 1:
            raise Decline("the mean is not over the last dim")
        if given.type != m[root].type:
            raise Decline(f"{m[x].type} goes in and {m[root].type} comes out")
        weight = m[normed].node.operand("weight")
        return norm.layer_norm(given, weight=weight, eps=m[normed].attrs["eps"])

    return Rule("layer-norm", (root,), build)


RULES = (
    *(_rms_rule(form, scaled) for scaled, form in product((True, False), ("rsqrt", "sqrt", "pow"))),
    _layer_rule(),
)
