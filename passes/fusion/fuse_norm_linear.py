"""fuse-norm-linear: norms and residual sums go into the prologue of the product that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...compiler.ir import Graph, Node, Value
from ...compiler.ops.norm import layer_norm, rms_norm
from ...compiler.ops.pointwise import add, cast
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Decline, Match, Other, Pat, Rule, pat, rewrite_all
from .products import PRODUCTS, Product, product_of


def _reading(product: Product, x: Pat, has_norm: bool = False) -> Iterator[Pat]:
    """The product over `x` without a prologue, or with a norm alone: a pattern for each count of
    operands.
    """
    prologue = frozenset(("norm",) if has_norm else ())

    def fits(value: Value) -> bool:
        return product.matches(value.node) and product.prologue(value.node) == prologue

    for more in range(len(product.options) + 1):
        yield Pat(product.op, (x, *(Pat() for _ in range(more + 1))), where=fits)


def _apart(built: tuple[Value, ...], *inner: Value) -> tuple[Value, ...]:
    """`built`, which must not take as an operand what its prologue computes: it would run twice."""
    for value in inner:
        if value in built[0].node.args:
            raise Decline(f"the product has the {value.op.name} as another operand too")
    return built


# P(rms_norm(x, w)) == P(x; norm=w)
def _norm_rules(product: Product) -> Iterator[Rule]:
    x, weight = Pat(), Pat()
    norm = pat(rms_norm, x, weight)
    for root in _reading(product, norm):
        own = tuple(Other(root, i) for i in range(1, product.results))
        normed = (norm,) if product.gives_normed else ()

        def build(m: Match, root: Pat = root) -> tuple[Value, ...]:
            added, eps = {"norm": m[weight]}, m[norm].attrs["eps"]
            built = product.with_operands(m[root].node, m[x], added, eps=eps)
            return _apart(built, m[norm])

        yield Rule(f"norm-{product.op.name}", (root, *own, *normed), build)


# P(x + d) == P(x; delta=d), which also gives x + d
# P(x + rms_norm(d, w)) == P(x; delta=d, post_norm=w), which also gives x + rms_norm(d, w)
def _sum_rules(product: Product, sandwich: bool) -> Iterator[Rule]:
    x, delta, weight = Pat(), Pat(), Pat()
    post = pat(rms_norm, delta, weight)
    total = pat(add, x, post if sandwich else delta)
    for has_norm in (True, False):
        count = product.results + (has_norm and product.gives_normed)
        for root in _reading(product, total, has_norm):
            own = tuple(Other(root, i) for i in range(1, count))

            def build(m: Match, root: Pat = root) -> tuple[Value, ...]:
                if m[x].type != m[total].type or m[delta].type != m[total].type:
                    raise Decline(f"{m[x].type} and {m[delta].type} are broadcast in their sum")
                node, added = m[root].node, {"delta": m[delta]}
                if not sandwich:
                    return product.with_operands(node, m[x], added)
                added["post_norm"] = m[weight]
                eps = m[post].attrs["eps"]
                return _apart(product.with_operands(node, m[x], added, post_eps=eps), m[post])

            kind = "sandwich" if sandwich else "sum"
            yield Rule(f"{kind}-{product.op.name}", (root, *own, total), build)


# What comes near, and why it stays.
def _near_misses(product: Product) -> Iterator[Rule]:
    for x, reason in (
        (pat(rms_norm, Pat()), "the norm has no weight"),
        (Pat(layer_norm), "a layer_norm is no prologue"),
        (pat(cast, Pat(rms_norm)), "a cast stands between the norm and the product"),
    ):
        for root in _reading(product, x):

            def build(m: Match, reason: str = reason) -> Value:
                raise Decline(reason)

            yield Rule(f"norm-{product.op.name}", (root,), build)


RULES = tuple(
    rule
    for product in PRODUCTS
    for rule in (
        *_norm_rules(product),
        *_sum_rules(product, sandwich=True),
        *_sum_rules(product, sandwich=False),
        *_near_misses(product),
    )
)


def takes_norm(norm: Value, readers: Mapping[Value, Sequence[Node | None]]) -> bool:
    """Whether the one product that reads `norm`, or of several one that returns it, can compute it.

    `readers` are those of the graph (see `products`).
    """
    reading = readers[norm]
    able = [p for n in reading if n and (p := product_of(n)) and _reads_plain(p, n, norm)]
    return any(p.gives_normed for p in able) or (len(able) == len(reading) == 1)


def _reads_plain(product: Product, node: Node, x: Value) -> bool:
    plain = not product.prologue(node) & {"norm", "delta"}
    return plain and node.args[0] == x and x not in node.args[1:]


@dataclass(frozen=True)
class FuseNormLinear:
    """rms_norm, residual sums and the norms before them -> operands of the product that reads them.

    A norm goes in where one product alone reads it. A sum goes in also where others read it: the
    product returns it.
    """

    name: ClassVar[str] = "fuse-norm-linear"

    def expected(self, graph: Graph) -> int:
        """Norms with a weight."""
        return sum(n.op is rms_norm and len(n.args) == 2 for n in graph.nodes())

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        return rewrite_all(graph, RULES, context.log)
