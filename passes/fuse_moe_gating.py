"""fuse-moe-gating: router product, scores and choice become one op, with the norm before them.

The experts need the norm's result too, so the op returns it beside weights and indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..compiler.ir import Graph, Value
from ..compiler.ops import norm, pointwise
from ..compiler.ops.gating import GATING_OPERANDS, moe_gating
from ..compiler.ops.linear import linear
from ..compiler.ops.moe import router
from ..compiler.rewrite import Log, Match, Other, Pat, Rule, either, maybe, pat, rewrite
from ..compiler.types import DTYPE_BITS
from .weights import is_weight


def _unwidened(weight: Value) -> Value:
    """A weight as it lies in memory, before a cast to a wider dtype."""
    if weight.op is not pointwise.cast:
        return weight
    (stored,) = weight.node.args
    bits = DTYPE_BITS[stored.type.dtype], DTYPE_BITS[weight.type.dtype]
    return stored if bits[0] < bits[1] else weight


# ---- what is multiplied: a norm of a sum with a normed value, a norm, or any value

X, DELTA = Pat(), Pat()
POST_NORM, NORM, WEIGHT, BIAS, CORRECTION = (Pat(where=is_weight) for _ in range(5))
POST_NORMED = pat(norm.rms_norm, DELTA, POST_NORM)
SUM = pat(pointwise.add, X, POST_NORMED)
SUM_NORMED, NORMED = pat(norm.rms_norm, SUM, NORM), pat(norm.rms_norm, X, NORM)


# router(cast(n)·cast(W)ᵀ + b, c) == moe_gating(n, W, b, c): the op widens what it multiplies
def _rule(name: str, n: Pat, *returned: Pat) -> Rule:
    product = either(
        pat(linear, maybe(pointwise.cast, n), WEIGHT),
        pat(linear, maybe(pointwise.cast, n), WEIGHT, BIAS),
    )
    routed = either(pat(router, product), pat(router, product, CORRECTION))

    def build(m: Match) -> tuple[Value, ...]:
        named = {"norm": NORM, "delta": DELTA, "post_norm": POST_NORM, "bias": BIAS}
        operands = {key: m[p] for key, p in (named | {"correction": CORRECTION}).items() if p in m}
        if BIAS in m:
            operands["bias"] = _unwidened(m[BIAS])
        attrs: dict[str, Any] = {**m[routed].attrs, "logits": m[product].type.dtype}
        if "eps" in attrs:
            attrs["sum_eps"] = attrs.pop("eps")
        for key, normed in (("eps", n), ("post_eps", POST_NORMED)):
            if normed in m and m[normed].op is norm.rms_norm and normed in (*returned, POST_NORMED):
                attrs[key] = m[normed].attrs["eps"]
        if names := tuple(key for key in GATING_OPERANDS if key in operands):
            attrs["optional"] = names
        given = (operands[key] for key in names)
        return moe_gating.all(m[X], _unwidened(m[WEIGHT]), *given, **attrs)

    return Rule(name, (routed, Other(routed, 1), *returned), build)


RULES = (
    _rule("moe-gating-sum-norm", SUM_NORMED, SUM_NORMED, SUM),
    _rule("moe-gating-norm", NORMED, NORMED),
    _rule("moe-gating", X),
)


@dataclass(frozen=True)
class FuseMoeGating:
    """moe_gating from a router, its product, and the rms_norm before it."""

    name: ClassVar[str] = "fuse-moe-gating"

    def __call__(self, graph: Graph, log: Log) -> Graph:
        graph = rewrite(graph, RULES, log)
        for node in graph.nodes():
            if node.op is router and node.args[0].op is not linear:
                log.decline("moe-gating", node, f"{node.args[0].op.name} gives its logits")
        return graph
