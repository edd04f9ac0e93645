"""fuse-moe-gating: router product, scores and choice become one op.

It reads what the experts read too: fuse-norm-linear brings the norm before it into the op, which
then returns the normed value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...compiler.dtypes import DTYPES
from ...compiler.ir import Graph, Value
from ...compiler.ops import pointwise
from ...compiler.ops.gating import GATING_OPERANDS, moe_gating
from ...compiler.ops.linear import linear
from ...compiler.ops.moe import router
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Match, Other, Pat, Rule, either, maybe, pat, rewrite
from .weights import is_weight

X = Pat()
WEIGHT, BIAS, CORRECTION = (Pat(where=is_weight) for _ in range(3))
WIDE = maybe(pointwise.cast, X)
LOGITS = either(pat(linear, WIDE, WEIGHT), pat(linear, WIDE, WEIGHT, BIAS))
ROUTED = either(pat(router, LOGITS), pat(router, LOGITS, CORRECTION))


def _unwidened(weight: Value) -> Value:
    """A weight as it lies in memory, before a cast to a wider dtype."""
    if weight.op is not pointwise.cast:
        return weight
    (stored,) = weight.node.args
    narrower = DTYPES[stored.type.dtype].bits < DTYPES[weight.type.dtype].bits
    return stored if narrower else weight


# router(cast(x)·cast(W)ᵀ + b, c) == moe_gating(x, W, b, c), which brings x, W and b to the dtype
def _gating(m: Match) -> tuple[Value, ...]:
    attrs: dict[str, Any] = {"logits": m[LOGITS].type.dtype, **m[ROUTED].attrs}
    if "eps" in attrs:
        attrs["sum_eps"] = attrs.pop("eps")
    operands = {"correction": m[CORRECTION]} if CORRECTION in m else {}
    if BIAS in m:
        operands["bias"] = _unwidened(m[BIAS])
    if names := tuple(name for name in GATING_OPERANDS if name in operands):
        attrs["optional"] = names
    given = (operands[name] for name in names)
    return moe_gating.all(m[X], _unwidened(m[WEIGHT]), *given, **attrs)


@dataclass(frozen=True)
class FuseMoeGating:
    """moe_gating from a router and the product that gives its logits."""

    name: ClassVar[str] = "fuse-moe-gating"

    def expected(self, graph: Graph) -> int:
        """Routers."""
        return sum(n.op is router for n in graph.nodes())

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        rule = Rule("moe-gating", (ROUTED, Other(ROUTED, 1)), _gating)
        graph = rewrite(graph, (rule,), context.log)
        for node in graph.nodes():
            if node.op is router and node.args[0].op is not linear:
                context.log.decline("moe-gating", node, f"{node.args[0].op.name} gives its logits")
        return graph
