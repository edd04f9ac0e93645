"""raise-ops: chains of arithmetic become the ops that they spell out.

Norms, rotary embeddings, gated units and routers, in the forms that models write them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...compiler.ir import Graph, Value
from ...compiler.ops import pointwise
from ...compiler.ops.glu import glu
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Decline, Match, Pat, Rule, pat, rewrite_all
from . import raise_norms, raise_rope, raise_routers
from .canonicalize import simplified

GATE, UP = Pat(), Pat()

# x·sigmoid(x) == silu(x)
SILU = pat(pointwise.mul, GATE, pat(pointwise.sigmoid, GATE))


def _silu(m: Match) -> Value:
    return pointwise.silu(m[GATE])


def _glu_rule(op: Any, activation: str, **attrs: Any) -> Rule:
    root = pat(pointwise.mul, Pat(op, (GATE,), attrs), UP)

    def build(m: Match) -> Value:
        if m[GATE].type != m[UP].type:
            raise Decline(f"{m[GATE].type} gates {m[UP].type}")
        return glu(m[GATE], m[UP], activation=activation)

    return Rule(f"glu-{activation}", (root,), build)


GLU_RULES = (
    _glu_rule(pointwise.silu, "silu"),
    _glu_rule(pointwise.gelu, "gelu", approximate="none"),
    _glu_rule(pointwise.gelu, "gelu_tanh", approximate="tanh"),
    _glu_rule(pointwise.relu, "relu"),
    _glu_rule(pointwise.sigmoid, "sigmoid"),
)


@dataclass(frozen=True)
class RaiseOps:
    """rms_norm, rope, glu and router from the arithmetic that spells them out."""

    name: ClassVar[str] = "raise-ops"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        graph = rewrite_all(graph, raise_routers.RULES, context.log)
        graph = rewrite_all(graph, raise_norms.RULES, context.log)
        graph = rewrite_all(graph, raise_rope.FORM_RULES, context.log)
        graph = rewrite_all(graph, raise_rope.PART_RULES, context.log)
        graph = rewrite_all(graph, (Rule("silu", (SILU,), _silu), *GLU_RULES), context.log)
        return simplified(graph, context.log)
