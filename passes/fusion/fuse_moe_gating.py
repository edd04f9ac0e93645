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
from ...compiler.ops.gating import moe_gating
from ...compiler.ops.linear import linear
from ...compiler.ops.moe import router
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import (
    Every,
    Match,
    Pat,
    Rule,
    maybe,
    rewrite,
)
from ..moves import is_projection

X = Pat()
LOGITS = Pat(linear, (maybe(pointwise.cast, X), Pat()), where=is_projection)
ROUTED = Pat(router, (LOGITS,), where=lambda v: all(a.node.is_constant for a in v.node.args[1:]))


def _unwidened(weight: Value) -> Value:
    """A weight as it lies in memory, before a cast to a wider dtype."""
    if weight.op is not pointwise.cast:
        return weight
    (stored,) = weight.node.args
    narrower = DTYPES[stored.type.dtype].bits < DTYPES[weight.type.dtype].bits
    return stored if narrower else weight


# router(cast(x)·cast(W)ᵀ + b, c) == moe_gating(x, W, b, c), which brings x, W and b to the dtype
def _gating(m: Match) -> tuple[Value, ...]:
    product, routed = m[LOGITS].node, m[ROUTED].node
    weight, bias = product.args[1], product.operand("bias")
    attrs: dict[str, Any] = {"logits": m[LOGITS].type.dtype, **routed.attrs}
    if "eps" in attrs:
        attrs["sum_eps"] = attrs.pop("eps")
    operands = {"bias": bias and _unwidened(bias), "correction": routed.operand("correction")}
    return moe_gating.all(m[X], _unwidened(weight), **operands, **attrs)


@dataclass(frozen=True)
class FuseMoeGating:
    """moe_gating from a router and the product that gives its logits."""

    name: ClassVar[str] = "fuse-moe-gating"

    def expected(self, graph: Graph) -> int:
        """Routers."""
        return sum(n.op is router for n in graph.nodes())

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        rule = Rule("moe-gating", (Every(ROUTED),), _gating)
        graph = rewrite(graph, (rule,), context.log)
        for node in graph.nodes():
            if node.op is router and node.args[0].op is not linear:
                context.log.decline("moe-gating", node, f"{node.args[0].op.name} gives its logits")
        return graph
