"""Which products have a prologue, and how they are given one.

The one list of them: an op that joins it is found by every pass that asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...compiler.ir import Graph, Node, Op, Value
from ...compiler.ops.fused import GATED_OPTIONS, LINEAR_OPTIONS, fused_linear, gated_linear
from ...compiler.ops.gating import GATING_OPERANDS, moe_gating
from ...compiler.ops.heads import head_operands, project_heads
from ...compiler.ops.linear import linear
from ...compiler.ops.prologue import PROLOGUE


@dataclass(frozen=True)
class Product:
    """A product of x and a weight, args 0 and 1; what follows is optional and has names.

    `options` are those names in their order. `fused` is the op that it becomes with a prologue, the
    same op if it has one. `results` counts those that it has without a prologue; an op whose nodes
    differ in this has an entry for each count. With a norm, an op that `gives_normed` returns n
    after these; with a delta every op returns s as its last.
    """

    op: Op
    fused: Op
    options: tuple[str, ...]
    results: int = 1
    gives_normed: bool = False

    def operands(self, node: Node) -> dict[str, Value]:
        """The optional operands of `node` by name."""
        plain = ("bias",)[: len(node.args) - 2]
        names = plain if self.op is linear else node.attrs.get("optional", ())
        return dict(zip(names, node.args[2:], strict=True))

    def matches(self, node: Node) -> bool:
        """Whether this is the entry of `node`."""
        if node.op is not self.op:
            return False
        names = node.attrs.get("optional", ())
        extra = (self.gives_normed and "norm" in names) + ("delta" in names)
        return len(node.types) == self.results + extra

    def prologue(self, node: Node) -> frozenset[str]:
        """What of a prologue `node` has."""
        return frozenset(self.operands(node)) & frozenset(PROLOGUE)

    def with_operands(
        self, node: Node, x: Value, added: Mapping[str, Value], **attrs: Any
    ) -> tuple[Value, ...]:
        """`node` over `x` with more optional operands and attributes; every result."""
        operands = {**self.operands(node), **added}
        names = tuple(name for name in self.options if name in operands)
        args = (x, node.args[1], *(operands[name] for name in names))
        return self.fused.all(*args, **{**node.attrs, "optional": names, **attrs})


LINEAR = Product(linear, fused_linear, LINEAR_OPTIONS)
PRODUCTS = (
    LINEAR,
    Product(fused_linear, fused_linear, LINEAR_OPTIONS),
    Product(gated_linear, gated_linear, GATED_OPTIONS),
    *(Product(project_heads, project_heads, head_operands(n), results=n) for n in (1, 2, 3)),
    Product(moe_gating, moe_gating, GATING_OPERANDS, results=2, gives_normed=True),
)


def product_of(node: Node) -> Product | None:
    """The entry of the list that `node` is of."""
    return next((p for p in PRODUCTS if p.matches(node)), None)


def readers(graph: Graph) -> dict[Value, list[Node | None]]:
    """Value to the nodes that take it as an argument, and a None where the graph returns it."""
    found: dict[Value, list[Node | None]] = {v: [*nodes] for v, nodes in graph.users().items()}
    for root in graph.roots:
        found.setdefault(root, []).append(None)
    return found
