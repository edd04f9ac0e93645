"""What one rank computes of a graph: how each node serves what its users want of it.

Used by shard-tensor-parallel. `Facts` hold for every rank and are found from the leaves down;
a `Plan` is one rank's and is made from the outputs up: users decide first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from ...compiler.ir import Graph, Node, Value
from ...compiler.ops import linear, moe, pointwise, shape
from ...compiler.ops.leaf import param
from ...compiler.rewrite import Log
from ...compiler.types import evaluate
from .propagate_slice import Cut, Misaligned, Propagated, cut_weight, propagate_slice
from .shares import expert_parallel_experts, share, tensor_parallel_experts

# How a rank has a value: all of it, a summand of it, or a cut.
Form = Cut | Literal["whole", "partial"]
# How a node serves the forms that are wanted of its result: computed whole, from cuts of its
# arguments, as a summand, as summands that are added up, or as cuts that are gathered.
How = Literal["whole", "cuts", "partial", "sum", "gather"]
ExpertLayout = Literal["intermediate", "expert"]


class CannotShard(ValueError):
    """The graph does not divide over that many ranks; says where and why."""


@dataclass
class Facts:
    """What holds of each value whatever the rank.

    `column_parallel_dims` are the dims along which a cut of a value saves work in a product,
    `partial_sum_nodes` the nodes that may be computed as a sum over ranks.
    """

    graph: Graph
    ranks: int
    column_parallel_dims: dict[Value, frozenset[int]] = field(
        default_factory=dict[Value, "frozenset[int]"]
    )
    partial_sum_nodes: set[Node] = field(default_factory=set[Node])
    layouts: dict[Node, ExpertLayout] = field(default_factory=dict[Node, ExpertLayout])
    kept: dict[Node, str] = field(default_factory=dict[Node, str])

    def __post_init__(self) -> None:
        self.nodes = list(self.graph.nodes())
        self.uses = Counter(a for n in self.nodes for a in n.args)
        self.uses.update(self.graph.roots)
        for node in self.nodes:
            if node.is_constant or len(node.types) != 1:
                continue
            if self._is_summand(node):
                self.partial_sum_nodes.add(node)
            self.column_parallel_dims[Value(node)] = self._column_parallel_dims(node)

    def _column_parallel_dims(self, node: Node) -> frozenset[int]:
        dims, axes = node.types[0].shape, node.axes
        if axes is None or (node in self.partial_sum_nodes and node.op in _SPLIT):
            return frozenset()
        if axes.sums - {axes.along}:
            # A product: what only its weights have need not be computed whole.
            pairs = zip(node.args, axes.operands, strict=True)
            given = {f for a, d in pairs if not a.node.is_constant for n in d for f in n}
            own = ((i, n) for i, n in enumerate(axes.results[0]) if n and not given & set(n))
            return frozenset(i for i, factors in own if axes.is_plain(factors[0]))
        found = set[int]()
        for axis, size in enumerate(dims):
            inner = propagate_slice(node, Cut(axis, 0, size)) if isinstance(size, int) else None
            if inner and any(
                c and c.axis in self.column_parallel_dims.get(a, ()) for a, c in inner.args
            ):
                found.add(axis)
        return frozenset(found)

    def _are_weights(self, values: tuple[Value, ...]) -> bool:
        return all(v.node.is_constant for v in values)

    def _is_summand(self, node: Node) -> bool:
        if node.op is linear.linear:
            return self._is_row_parallel(node)
        if node.op is moe.experts:
            return self._are_weights(node.args[3:]) and self._has_layout(node)
        if node.op is linear.embedding:
            return self._are_weights(node.args[1:])
        # f is linear in what is summed. A summand that others need whole would be summed twice.
        one_use = [a.node in self.partial_sum_nodes and self.uses[a] == 1 for a in node.args]
        if node.op is pointwise.add:
            return all(one_use)
        if node.op is pointwise.mul:
            return one_use.count(True) == 1
        if node.op is pointwise.div:
            return one_use == [True, False]
        return node.op in (shape.view, shape.permute) and all(one_use)

    # x·Wᵀ == Σ over ranks of x[:, cut]·W[:, cut]ᵀ
    def _is_row_parallel(self, node: Node) -> bool:
        x, *parameters = node.args
        inner = x.type.shape[-1]
        if x.type.rank - 1 not in self.column_parallel_dims.get(x, ()) or not self._are_weights(
            (*parameters,)
        ):
            return False
        if not isinstance(inner, int) or inner % self.ranks:
            heads = x.node.args[0].type.shape[1:] if x.op is shape.view else ()
            shown = f" ({' · '.join(map(str, heads))})" if heads else ""
            found = f"{inner} inputs{shown}"
            raise CannotShard(at(node, f"{found} do not divide over {self.ranks} ranks"))
        return self._can_cut(node, ((parameters[0], 1),))

    def _can_cut(self, node: Node, weights: tuple[tuple[Value, int], ...]) -> bool:
        """Whether every rank's share of each weight along its dim can be read in its format."""
        try:
            for weight, axis in weights:
                size = weight.type.shape[axis]
                assert isinstance(size, int)
                for rank in range(self.ranks):
                    cut_weight(weight, share(size, self.ranks, rank, axis))
        except Misaligned as reason:
            self.kept[node] = f"its weight cannot be cut: {reason}"
            return False
        return True

    # The bytes that a rank moves decide: a token touches all ranks' shares of its k experts, or k
    # whole experts of any rank.
    def _has_layout(self, node: Node) -> bool:
        gate_up, down = node.args[3:5]
        count, _, hidden = down.type.shape
        assert isinstance(count, int) and isinstance(hidden, int)
        costs: dict[ExpertLayout, int] = {}
        given = node.args[:3]
        if hidden % self.ranks == 0 and self._can_cut(node, ((down, 2),)):
            by_units = tensor_parallel_experts(node, given, self.ranks, 0)
            costs["intermediate"] = self._bytes(by_units)
        if count % self.ranks == 0 and self._can_cut(node, ((gate_up, 0), (down, 0))):
            costs["expert"] = self._bytes(expert_parallel_experts(node, given, self.ranks, 0))
        if not costs and node not in self.kept:
            raise CannotShard(
                at(
                    node,
                    f"neither {hidden} hidden units nor {count} experts divide over "
                    f"{self.ranks} ranks",
                )
            )
        if costs:
            self.kept.pop(node, None)
            self.layouts[node] = min(costs, key=lambda layout: costs[layout])
        return bool(costs)

    def _bytes(self, value: Value) -> int:
        smallest = {name: bounds.start for name, bounds in self.graph.symbols.items()}
        return evaluate(value.node.cost.bytes, smallest)


def at(node: Node, reason: str) -> str:
    return f"{node.op.name} at {node.source or 'an unknown place'}: {reason}"


@dataclass
class Plan:
    """The forms of each value that rank `rank` wants, with who wants them, and how nodes serve."""

    facts: Facts
    rank: int
    wanted: dict[Value, dict[Form, str]] = field(default_factory=dict[Value, "dict[Form, str]"])
    how: dict[Node, How] = field(default_factory=dict[Node, How])

    def __post_init__(self) -> None:
        for root in self.facts.graph.roots:
            self._want([(root, "whole")], "the output")
        for node in reversed(self.facts.nodes):
            computed = not node.is_constant and node.op is not param
            if computed and any(r in self.wanted for r in node.results):
                self._serve(node)

    @property
    def collectives(self) -> list[tuple[Node, How]]:
        """What this rank exchanges with the others."""
        return [(n, how) for n, how in self.how.items() if how in ("sum", "gather")]

    def cuts(self, node: Node) -> list[Cut]:
        """The cuts that are computed of the node's one result."""
        if self.how[node] == "gather":
            return [self._share(Value(node), node.types[0].rank - 1)]
        return [form for form in self.wanted[Value(node)] if isinstance(form, Cut)]

    def partial_operands(self, node: Node) -> list[tuple[Value, Form]]:
        """The arguments from which a node's summand is computed, where not weights of its own."""
        if node.op is linear.linear:
            x = node.args[0]
            return [(x, self._share(x, x.type.rank - 1))]
        if node.op is linear.embedding:
            return [(node.args[0], "whole")]
        if node.op is moe.experts:
            return [(a, "whole") for a in node.args[:3]]
        summed = self.facts.partial_sum_nodes
        return [(a, "partial" if a.node in summed else "whole") for a in node.args]

    def _share(self, value: Value, axis: int) -> Cut:
        size = value.type.shape[axis]
        assert isinstance(size, int)
        return share(size, self.facts.ranks, self.rank, axis)

    def _want(self, needs: Iterable[tuple[Value, Form]], by: str) -> None:
        for value, form in needs:
            self.wanted.setdefault(value, {}).setdefault(form, by)

    def _serve(self, node: Node) -> None:
        """Choose how `node` is computed, and want of its arguments what that takes."""
        wanted = self.wanted.get(Value(node), {}) if len(node.types) == 1 else {}
        cuts = [form for form in wanted if isinstance(form, Cut)]
        if node in self.facts.partial_sum_nodes:
            self.how[node] = "partial" if wanted.keys() == {"partial"} else "sum"
            self._want(self.partial_operands(node), node.op.name)
            return
        if not cuts or "whole" in wanted or _overlap(cuts):
            cuts = []
        if not cuts or not all(self._pushed(node, cut) for cut in cuts):
            self.how[node] = "gather" if self._is_gathered(node) else "whole"
        else:
            self.how[node] = "cuts"
        if self.how[node] == "whole":
            by = node.op.name if node.op.axes else f"{node.op.name}, which has no axis rule,"
            self._want(((a, "whole") for a in node.args), by)
            return
        for cut in self.cuts(node):
            if inner := self._pushed(node, cut):
                self._want(((a, c or "whole") for a, c in inner.args), node.op.name)

    def _pushed(self, node: Node, cut: Cut) -> Propagated | None:
        try:
            return propagate_slice(node, cut)
        except Misaligned as reason:
            ranks = f"it does not divide over {self.facts.ranks} ranks"
            raise CannotShard(at(node, f"{reason}: {ranks}")) from reason

    # A cut of the graph's output that saves work, where zeros past its end stay outside.
    def _is_gathered(self, node: Node) -> bool:
        value, type_ = Value(node), node.types[0]
        if type_.rank - 1 not in self.facts.column_parallel_dims.get(value, ()):
            return False
        size = type_.shape[-1]
        if value not in self.facts.graph.outputs or not isinstance(size, int):
            return False
        if size % self.facts.ranks == 0 or self._pads(value):
            return True
        self.facts.kept[node] = f"{size} columns do not divide over {self.facts.ranks} ranks"
        return False

    def _pads(self, value: Value) -> bool:
        """Whether a cut may end past the last column: products have weights to pad."""
        if value.op is linear.linear:
            return True
        if value.op not in pointwise.POINTWISE:
            return False
        rows = [a for a in value.node.args if a.type.shape[-1:] == value.type.shape[-1:]]
        return all(a.node.is_constant or self._pads(a) for a in rows)

    def report(self, name: str, log: Log) -> None:
        """Count what is split, and say of each product that is not who needs it whole."""
        for node, how in self.how.items():
            if how in ("sum", "partial") and node.op in _SPLIT:
                layout = self.facts.layouts.get(node)
                log.counts[f"experts-by-{layout}" if layout else _SPLIT[node.op]] += 1
            elif how in ("cuts", "gather") and node.op is linear.linear:
                log.counts["column-parallel"] += 1
            elif how == "whole" and node.op in _SPLIT and node not in self.facts.kept:
                by = self.wanted[Value(node)].get("whole", "another cut")
                log.decline(name, node, f"whole on every rank: {by} needs all of it")
            if node in self.facts.kept:
                log.decline(name, node, f"not split: {self.facts.kept[node]}")
            if how in ("sum", "gather"):
                log.counts["all-reduce" if how == "sum" else "all-gather"] += 1


_SPLIT = {linear.linear: "row-parallel", linear.embedding: "vocabulary", moe.experts: "experts"}


def _overlap(cuts: list[Cut]) -> bool:
    """Whether two different cuts would compute something twice."""
    ends = sorted((c.start, c.stop) for c in cuts)
    return len({c.axis for c in cuts}) > 1 or any(a[1] > b[0] for a, b in pairwise(ends))
