"""fuse-norm-linear: norms and residual sums go into the prologue of the product that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...compiler.ir import Graph, Node, Op, Value
from ...compiler.ops.gating import moe_gating
from ...compiler.ops.norm import layer_norm, rms_norm
from ...compiler.ops.pointwise import add, cast
from ...compiler.ops.prologue import PROLOGUE
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Decline, Every, Match, Pat, Rule, pat, rewrite_all

# Ops that multiply their first operand, and take a prologue of it.
PRODUCTS = tuple(op for op in Op.registry.values() if {*PROLOGUE} <= {*op.optional})
# With a norm these return the normed value too, after their own results.
_GIVES_NORMED = frozenset((moe_gating,))


def _reading(op: Op, x: Pat, *absent: str) -> Pat:
    return Pat(op, (x, *(Pat() for _ in op.required[1:])), absent=absent)


def _apart(built: Node, *inner: Value) -> tuple[Value, ...]:
    """`built`, which must not take as an operand what its prologue computes: it would run twice."""
    for value in inner:
        if value in built.args:
            raise Decline(f"the product has the {value.op.name} as another operand too")
    return built.results


# P(rms_norm(x, w)) == P(x; norm=w)
def _norm_rule(op: Op) -> Rule:
    x, weight = Pat(), Pat()
    norm = pat(rms_norm, x, weight=weight)
    root = _reading(op, norm, *PROLOGUE)

    def build(m: Match) -> tuple[Value, ...]:
        eps = m[norm].attrs["eps"]
        return _apart(m[root].node.replace(x=m[x], norm=m[weight], eps=eps), m[norm])

    return Rule(f"norm-{op.name}", (Every(root), *((norm,) if op in _GIVES_NORMED else ())), build)


# P(x + d) == P(x; delta=d), which also gives x + d
# P(x + rms_norm(d, w)) == P(x; delta=d, post_norm=w), which also gives x + rms_norm(d, w)
def _sum_rule(op: Op, sandwich: bool) -> Rule:
    x, delta, weight = Pat(), Pat(), Pat()
    post = pat(rms_norm, delta, weight=weight)
    total = pat(add, x, post if sandwich else delta)
    root = _reading(op, total, "delta", "post_norm")

    def build(m: Match) -> tuple[Value, ...]:
        if m[x].type != m[total].type or m[delta].type != m[total].type:
            raise Decline(f"{m[x].type} and {m[delta].type} are broadcast in their sum")
        node = m[root].node.replace(x=m[x], delta=m[delta])
        if not sandwich:
            return node.results
        node = node.replace(post_norm=m[weight], post_eps=m[post].attrs["eps"])
        return _apart(node, m[post])

    return Rule(f"{'sandwich' if sandwich else 'sum'}-{op.name}", (Every(root), total), build)


# What comes near, and why it stays.
def _near_misses(op: Op) -> Iterator[Rule]:
    for x, reason in (
        (pat(rms_norm, absent=("weight",)), "the norm has no weight"),
        (Pat(layer_norm), "a layer_norm is no prologue"),
        (pat(cast, Pat(rms_norm)), "a cast stands between the norm and the product"),
    ):

        def build(m: Match, reason: str = reason) -> Value:
            raise Decline(reason)

        yield Rule(f"norm-{op.name}", (_reading(op, x, *PROLOGUE),), build)


RULES = tuple(
    rule
    for op in PRODUCTS
    for rule in (
        _norm_rule(op),
        _sum_rule(op, sandwich=True),
        _sum_rule(op, sandwich=False),
        *_near_misses(op),
    )
)


def readers(graph: Graph) -> dict[Value, list[Node | None]]:
    """Value to the nodes that take it as an argument, and a None where the graph returns it."""
    found: dict[Value, list[Node | None]] = {v: [*nodes] for v, nodes in graph.users().items()}
    for root in graph.roots:
        found.setdefault(root, []).append(None)
    return found


def takes_norm(norm: Value, readers: Mapping[Value, Sequence[Node | None]]) -> bool:
    """Whether the one product that reads `norm`, or of several one that returns it, can compute it.

    `readers` are those of the graph.
    """
    able = [n for n in readers[norm] if n and _reads_plain(n, norm)]
    return any(n.op in _GIVES_NORMED for n in able) or (len(able) == len(readers[norm]) == 1)


def _reads_plain(node: Node, x: Value) -> bool:
    plain = node.op in PRODUCTS and not {*node.given} & {"norm", "delta"}
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
        return sum(n.op is rms_norm and "weight" in n.given for n in graph.nodes())

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        return rewrite_all(graph, RULES, context.log)
