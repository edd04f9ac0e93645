"""fuse-mla-projections: the products of latent attention with the hidden values become one.

W_DQ (or W_Q, where the query has no low rank), W_DKV and W_KR read the same hidden values
(DeepSeek-V2, arXiv:2405.04434, section 2.1): their rows stand below each other in one weight, and
what they gave are slices of its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...compiler.ir import Graph, Node, Op, Value
from ...compiler.ops import norm, pointwise, shape
from ...compiler.ops.attention import kv_append
from ...compiler.ops.linear import head_linear, is_plain, linear
from ...compiler.ops.mla import cached_mla_attention, mla_attention, mla_latent
from ...compiler.ops.rope import rope
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Applied, Decline
from ..moves import Rows, one_product

# What lies between a down-projection and what attention reads; all but cat have one operand that
# is no weight and no table, the first.
_BETWEEN: frozenset[Op] = frozenset(
    (shape.view, shape.permute, shape.slice_, shape.cat, pointwise.cast)
    + (norm.rms_norm, norm.layer_norm, rope, mla_latent, head_linear)
)


def _before(value: Value) -> tuple[Value, ...]:
    """The activations that `value` is made of, one step back."""
    args = value.node.args
    if value.op is shape.cat:
        return args
    if value.op in _BETWEEN:
        return args[:1]
    if value.op is kv_append:
        return (args[(len(args) - 3) // 2 + value.index],)
    if value.op is pointwise.mul and (rest := tuple(a for a in args if not a.node.is_constant)):
        return rest
    raise Decline(f"{value.op.name} lies between a product and the attention")


def _first_products(value: Value) -> list[Node]:
    """The products nearest to `value` that it is made of, in order."""
    if is_plain(value.node):
        return [value.node]
    return [product for a in _before(value) for product in _first_products(a)]


def _products_of(x: Value, value: Value) -> list[Node]:
    """The products of `x` that `value` is made of, through further products or not."""
    if not is_plain(value.node):
        return [p for a in _before(value) for p in _products_of(x, a)]
    if value.node.args[0] != x:
        return _products_of(x, value.node.args[0])
    return [value.node]


def _down_projections(attention: Node) -> list[Node]:
    """The products of one value that the queries, then the latent, of `attention` are made of."""
    q_latent, q_pe, latent = attention.args[:3]
    low = list(dict.fromkeys(_first_products(latent)))
    x = low[0].args[0]
    if any(p.args[0] != x for p in low):
        raise Decline("the latent is made of products of different values")
    queries = [p for q in (q_latent, q_pe) for p in _products_of(x, q)]
    products = list(dict.fromkeys((*queries, *low)))
    if len(products) < 2:
        raise Decline("the projections are one product already")
    return products


# cat(W_1, W_2) x + cat(b_1, b_2) == cat(W_1 x + b_1, W_2 x + b_2)
def _joined(products: list[Node]) -> tuple[Value, ...]:
    """The results of `products`, as slices of one product."""
    results = [Value(p) for p in products]
    weight, bias = one_product([*map(Rows.of, results)])
    whole = linear(products[0].args[0], weight, bias=bias)
    slices: list[Value] = []
    start: Any = 0
    for result in results:
        axis, stop = result.type.rank - 1, start + result.type.shape[-1]
        attrs = {"dim": axis, "start": start, "stop": stop}
        slices.append(Value(shape.slice_.node((whole,), attrs, result.node.source)))
        start = stop
    return tuple(slices)


def _has_several(node: Node) -> bool:
    if node.op not in (mla_attention, cached_mla_attention):
        return False
    try:
        return bool(_down_projections(node))
    except Decline:
        return False


@dataclass(frozen=True)
class FuseMlaProjections:
    """linear(x, W_DQ), linear(x, W_DKV), … -> slices of one linear, where attention reads them."""

    name: ClassVar[str] = "fuse-mla-projections"

    def expected(self, graph: Graph) -> int:
        """Attentions of which several products of one value make the query and the latent."""
        return sum(_has_several(n) for n in graph.nodes())

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        applied: list[Applied] = []
        taken: set[Node] = set()
        for node in graph.nodes():
            if node.op not in (mla_attention, cached_mla_attention):
                continue
            try:
                products = _down_projections(node)
                if not taken.isdisjoint(products):
                    raise Decline("another attention reads the same projections")
                slices = _joined(products)
            except Decline as reason:
                context.log.decline(self.name, node, str(reason))
                continue
            before = tuple(Value(p) for p in products)
            leaves = dict.fromkeys(a for p in products for a in p.args)
            applied.append(Applied(self.name, tuple(leaves), before, slices))
            taken.update(products)
        return context.log.apply(graph, applied)
