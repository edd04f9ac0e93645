"""lay-out-weights: packed weights of products lie in the order in which tensor cores take them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...compiler.ir import Graph, Value
from ...compiler.ops.heads import project_heads
from ...compiler.ops.linear import linear
from ...compiler.ops.mxfp4 import mxfp4
from ...compiler.ops.mxfp4_fragments import GROUP, ROWS, mxfp4_fragments, mxfp4_tiled
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Decline, Every, Match, Pat, Rule, either, pat, rewrite

WEIGHT = Pat(where=lambda v: v.op is mxfp4)
PRODUCT = either(*(pat(op, Pat(), WEIGHT) for op in (linear, project_heads)))


@dataclass(frozen=True)
class _Layouts:
    """Weights in tiles: one for all products that take a weight in the same order of its rows."""

    made: dict[tuple[Value, bool], Value] = field(default_factory=dict[tuple[Value, bool], Value])

    # mxfp4(codes, scales) == mxfp4_tiled(*mxfp4_fragments(codes, scales))
    def rewritten(self, m: Match) -> tuple[Value, ...]:
        product, weight = m[PRODUCT].node, m[WEIGHT]
        gated = product.attrs.get("gate") is not None
        if weight.type.dtype != "bf16" or weight.stored.dtype != f"mxfp4g{GROUP}":
            found = f"{weight.type.dtype} in {weight.stored.dtype}"
            raise Decline(f"tensor cores take bf16 in mxfp4g{GROUP}, the weight is {found}")
        rows, columns = weight.type.shape
        if gated and int(rows) % ROWS:
            raise Decline(f"gate and up rows are not in eights: {rows} rows")
        key = (weight, gated)
        if key not in self.made:
            order = {"gated": True} if gated else {}
            parts = mxfp4_fragments.node(weight.node.args, order, weight.node.source).results
            shape = {"rows": rows, "columns": columns, **weight.attrs}
            node = mxfp4_tiled.node(parts, {**shape, **order}, weight.node.source)
            self.made[key] = Value(node)
        return product.replace(weight=self.made[key]).results


@dataclass(frozen=True)
class LayOutWeights:
    """x·mxfp4(codes, scales)ᵀ reads codes and scales in tiles, on NVIDIA targets."""

    name: ClassVar[str] = "lay-out-weights"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        if context.target is None or not context.target.name.startswith("cuda"):
            return graph
        rule = Rule("weight-in-tiles", (Every(PRODUCT),), _Layouts().rewritten)
        return rewrite(graph, (rule,), context.log)
