"""fuse-swiglu: the two products of a gated unit become one, with the activation behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...compiler.ir import Graph, Value
from ...compiler.ops.glu import glu
from ...compiler.ops.linear import is_plain, linear
from ...compiler.ops.shape import slice_
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Decline, Match, Pat, Rule, pat, rewrite
from ..moves import Rows, one_product

# Each is a product, or columns of one that makes both.
GATE, UP, BOTH = (Pat(linear, where=lambda v: is_plain(v.node)) for _ in range(3))
TWO = pat(glu, GATE, UP)
GATE_PART, UP_PART = pat(slice_, BOTH), pat(slice_, BOTH)
ONE = pat(glu, GATE_PART, UP_PART)


# glu(x·Wᵀ, x·Vᵀ) == linear(x, W ‖ V; gate), and so for other rows of one weight
def _gated(m: Match) -> Value:
    root = m[TWO if TWO in m else ONE]
    if len({*root.node.args}) == 1:
        raise Decline("gate and up are one value, which would be computed twice")
    gate, up = map(Rows.of, root.node.args)
    if gate.x != up.x:
        raise Decline("gate and up are products of two values")
    unit = {("gate" if name == "activation" else name): a for name, a in root.attrs.items()}
    weight, bias = one_product((gate, up))
    return linear(gate.x, weight, bias=bias, **unit)


RULES = (Rule("two-products", (TWO,), _gated), Rule("one-product", (ONE,), _gated))


@dataclass(frozen=True)
class FuseSwiglu:
    """glu of products of one value -> linear with a gate over one weight, gate rows first."""

    name: ClassVar[str] = "fuse-swiglu"

    def expected(self, graph: Graph) -> int:
        """Gated units."""
        return sum(n.op is glu for n in graph.nodes())

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        return rewrite(graph, RULES, context.log)
