"""lay-out-weights: packed weights of products lie in the order in which tensor cores take them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...compiler.ir import Graph, Value
from ...compiler.ops.heads import project_heads
from ...compiler.ops.linear import head_linear, linear
from ...compiler.ops.moe import experts
from ...compiler.ops.mxfp4 import mxfp4
from ...compiler.ops.mxfp4_fragments import GROUP, ROWS, mxfp4_fragments, mxfp4_tiled
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Decline, Every, Match, Pat, Rule, either, pat, rewrite

WEIGHT = Pat(where=lambda v: v.op is mxfp4)
PRODUCT = either(*(pat(op, Pat(), WEIGHT) for op in (linear, project_heads, head_linear)))
# Both weights, or none: what reads the experts of few tokens reads tiles of both.
GATE_UP, DOWN = (Pat(where=lambda v: v.op is mxfp4) for _ in range(2))
EXPERTS = pat(experts, Pat(), Pat(), Pat(), GATE_UP, DOWN)


@dataclass(frozen=True)
class _Layouts:
    """Weights in tiles: one for all products that take a weight in the same order of its rows."""

    made: dict[tuple[Value, bool], Value] = field(default_factory=dict[tuple[Value, bool], Value])

    # mxfp4(codes, scales) == mxfp4_tiled(*mxfp4_fragments(codes, scales)), of every head by itself
    def rewritten(self, m: Match) -> tuple[Value, ...]:
        product, weight = m[PRODUCT].node, m[WEIGHT]
        gated = product.attrs.get("gate") is not None
        return product.replace(weight=self._in_tiles(weight, gated)).results

    # The same of every expert's weights. Each has the other's columns, which come in groups, for
    # rows: so no tile has rows of two experts.
    def of_experts(self, m: Match) -> tuple[Value, ...]:
        node = m[EXPERTS].node
        gated = bool(node.attrs.get("gated", True))
        gate_up, down = self._in_tiles(m[GATE_UP], gated), self._in_tiles(m[DOWN], False)
        return node.replace(gate_up=gate_up, down=down).results

    def _in_tiles(self, weight: Value, gated: bool) -> Value:
        if weight.type.dtype != "bf16" or weight.stored.dtype != f"mxfp4g{GROUP}":
            found = f"{weight.type.dtype} in {weight.stored.dtype}"
            raise Decline(f"tensor cores take bf16 in mxfp4g{GROUP}, the weight is {found}")
        rows, columns = weight.type.shape[-2:]
        if gated and int(rows) % ROWS:
            raise Decline(f"gate and up rows are not in eights: {rows} rows")
        key = (weight, gated)
        if key not in self.made:
            order = {"gated": True} if gated else {}
            parts = mxfp4_fragments.node(weight.node.args, order, weight.node.source).results
            shape = {"rows": rows, "columns": columns, **weight.attrs}
            node = mxfp4_tiled.node(parts, {**shape, **order}, weight.node.source)
            self.made[key] = Value(node)
        return self.made[key]


@dataclass(frozen=True)
class LayOutWeights:
    """Products and experts read codes and scales of MXFP4 weights in tiles, on NVIDIA targets."""

    name: ClassVar[str] = "lay-out-weights"

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        if context.target is None or not context.target.name.startswith("cuda"):
            return graph
        layouts = _Layouts()
        rules = (
            Rule("weight-in-tiles", (Every(PRODUCT),), layouts.rewritten),
            Rule("experts-in-tiles", (Every(EXPERTS),), layouts.of_experts),
        )
        return rewrite(graph, rules, context.log)
