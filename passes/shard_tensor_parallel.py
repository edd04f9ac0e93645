"""shard-tensor-parallel: the graph of one rank of N, with explicit collectives.

Every rank holds what lies between layers whole, and a share of each layer. A product whose inputs
come from other products is split along K and its partial sums are added up (row-parallel, one
all_reduce); those other products are split along N to suit it (column-parallel), heads and all that
stands between. Nothing is known of models: how a share of one value follows from shares of others
is in `cuts` (Shoeybi et al. 2019, arXiv:1909.08053; Xu et al. 2021, arXiv:2105.04663).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

from ..compiler.ir import Graph, Node, Op, Value
from ..compiler.ops import linear, moe, pointwise, shape
from ..compiler.ops.collective import all_gather, all_reduce
from ..compiler.ops.leaf import param
from ..compiler.rewrite import Log, depends_only_on_constants
from ..compiler.types import evaluate
from .canonicalize import simplified
from .cuts import Cut, Misaligned, Pushed, cut_weight, pushed, sliced
from .shares import experts_by_expert, experts_by_intermediate, looked_up, share

# How a rank has a value: all of it, a summand of it, or a cut.
Form = Cut | Literal["whole", "partial"]
# How a node serves the forms that are wanted of its result: computed whole, from cuts of its
# arguments, as a summand, as summands that are added up, or as cuts that are gathered.
How = Literal["whole", "cuts", "partial", "sum", "gather"]
ExpertLayout = Literal["intermediate", "expert"]


class CannotShard(ValueError):
    """The graph does not divide over that many ranks; says where and why."""


@dataclass(frozen=True)
class ShardTensorParallel:
    """The graph of rank `rank` of `ranks`; outputs are the same on every rank.

    Attention is split by heads (a key/value head that several ranks need is on each of them), MLPs
    and experts by their intermediate dim, experts by expert where that reads fewer bytes. The
    vocabulary of embedding and logits is split in equal parts, the last ones padded with zero rows;
    logits are gathered whole, [T, V / ranks] a rank. What a norm, a router or anything else
    needs whole is computed by each rank. CannotShard for heads and dims that do not divide.
    """

    name: ClassVar[str] = "shard-tensor-parallel"
    ranks: int
    rank: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"{self.name}: expected a rank of {self.ranks}, found {self.rank}")

    def __call__(self, graph: Graph, log: Log) -> Graph:
        if graph.updates:
            raise ValueError(f"{self.name}: expected a graph without state: it goes before caches")
        if self.ranks == 1:
            return graph
        facts = _Facts(graph, self.ranks)
        # Each rank plans for all of them: so either all refuse or none does.
        plans = [_Plan(facts, rank) for rank in range(self.ranks)]
        plan = plans[self.rank]
        if any(p.how != plan.how for p in plans):
            raise CannotShard(f"graph @{graph.name}: the ranks would not run the same collectives")
        plan.report(log)
        return simplified(_Builder(plan).build(), Log())


@dataclass
class _Facts:
    """What holds of each value whatever the rank.

    `gains` are the dims along which a cut of a value saves work in a product, `summands` the nodes
    that may be computed as a sum over ranks.
    """

    graph: Graph
    ranks: int
    gains: dict[Value, frozenset[int]] = field(default_factory=dict[Value, "frozenset[int]"])
    summands: set[Node] = field(default_factory=set[Node])
    layouts: dict[Node, ExpertLayout] = field(default_factory=dict[Node, ExpertLayout])
    kept: dict[Node, str] = field(default_factory=dict[Node, str])

    def __post_init__(self) -> None:
        self.nodes = list(self.graph.nodes())
        known: dict[Node, bool] = {}
        self.constant = {n for n in self.nodes if depends_only_on_constants(Value(n), known)}
        self.uses = Counter(a for n in self.nodes for a in n.args)
        self.uses.update(self.graph.roots)
        for node in self.nodes:
            if node in self.constant or len(node.types) != 1:
                continue
            if self._is_summand(node):
                self.summands.add(node)
            self.gains[Value(node)] = self._gains(node)

    def _gains(self, node: Node) -> frozenset[int]:
        dims = node.types[0].shape
        if node.op is linear.linear:
            column = node not in self.summands and self._are_weights(node.args[1:])
            return frozenset((len(dims) - 1,)) if column else frozenset()
        found: set[int] = set()
        for axis, size in enumerate(dims):
            inner = pushed(node, Cut(axis, 0, size)) if isinstance(size, int) else None
            if inner and any(c and c.axis in self.gains.get(a, ()) for a, c in inner.args):
                found.add(axis)
        return frozenset(found)

    def _are_weights(self, values: tuple[Value, ...]) -> bool:
        return all(v.node in self.constant for v in values)

    def _is_summand(self, node: Node) -> bool:
        if node.op is linear.linear:
            return self._is_row_parallel(node)
        if node.op is moe.experts:
            return self._are_weights(node.args[3:]) and self._has_layout(node)
        if node.op is linear.embedding:
            return self._are_weights(node.args[1:])
        # f is linear in what is summed. A summand that others need whole would be summed twice.
        one_use = [a.node in self.summands and self.uses[a] == 1 for a in node.args]
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
        if x.type.rank - 1 not in self.gains.get(x, ()) or not self._are_weights((*parameters,)):
            return False
        if not isinstance(inner, int) or inner % self.ranks:
            raise CannotShard(_at(node, f"{inner} inputs do not divide over {self.ranks} ranks"))
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
        if hidden % self.ranks == 0 and self._can_cut(node, ((down, 2),)):
            costs["intermediate"] = self._bytes(
                experts_by_intermediate(node, node.args[:3], self.ranks, 0)
            )
        if count % self.ranks == 0 and self._can_cut(node, ((gate_up, 0), (down, 0))):
            costs["expert"] = self._bytes(experts_by_expert(node, node.args[:3], self.ranks, 0))
        if not costs and node not in self.kept:
            raise CannotShard(
                _at(
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


def _at(node: Node, reason: str) -> str:
    return f"{node.op.name} at {node.source or 'an unknown place'}: {reason}"


@dataclass
class _Plan:
    """What one rank wants of each value and how each node serves it: users decide first."""

    facts: _Facts
    rank: int
    wanted: dict[Value, dict[Form, str]] = field(default_factory=dict[Value, "dict[Form, str]"])
    how: dict[Node, How] = field(default_factory=dict[Node, How])

    def __post_init__(self) -> None:
        for root in self.facts.graph.roots:
            self._want(root, "whole", "the graph's output")
        for node in reversed(self.facts.nodes):
            if node not in self.facts.constant and node.op is not param:
                self._serve(node)

    def share(self, size: int, axis: int) -> Cut:
        return share(size, self.facts.ranks, self.rank, axis)

    def _want(self, value: Value, form: Form, by: str) -> None:
        self.wanted.setdefault(value, {}).setdefault(form, by)

    def _serve(self, node: Node) -> None:
        """Choose how `node` is computed, and want of its arguments what that takes."""
        wanted = self.wanted.get(Value(node), {}) if len(node.types) == 1 else {}
        cuts = [form for form in wanted if isinstance(form, Cut)]
        inner = [self._pushed(node, cut) for cut in cuts]
        if node in self.facts.summands:
            how: How = "partial" if wanted.keys() == {"partial"} else "sum"
        elif cuts and "whole" not in wanted and all(inner) and not _overlap(cuts):
            how = "cuts"
        else:
            how = "gather" if self._is_gathered(node) else "whole"
        self.how[node] = how
        if how in ("partial", "sum"):
            return self._want_summands(node)
        if how == "gather":
            rank = node.types[0].rank
            size = node.types[0].shape[-1]
            assert isinstance(size, int)
            inner = [self._pushed(node, self.share(size, rank - 1))]
        needs = [(a, c) for p in inner if p for a, c in p.args]
        for arg, cut in needs if how in ("cuts", "gather") else [(a, None) for a in node.args]:
            self._want(arg, cut or "whole", node.op.name)

    def _pushed(self, node: Node, cut: Cut) -> Pushed | None:
        try:
            return pushed(node, cut)
        except Misaligned as reason:
            raise CannotShard(
                f"{_at(node, str(reason))}: it does not divide over {self.facts.ranks} ranks"
            ) from reason

    def _want_summands(self, node: Node) -> None:
        x = node.args[0]
        if node.op is linear.linear:
            axis = x.type.rank - 1
            inner = x.type.shape[axis]
            assert isinstance(inner, int)
            return self._want(x, self.share(inner, axis), node.op.name)
        for arg in node.args:
            leaf = node.op in (moe.experts, linear.embedding)
            summed = arg.node in self.facts.summands and not leaf
            self._want(arg, "partial" if summed else "whole", node.op.name)

    # A cut of the graph's output that saves work, where zeros past its end stay outside.
    def _is_gathered(self, node: Node) -> bool:
        value, type_ = Value(node), node.types[0]
        if len(node.types) != 1 or value not in self.facts.graph.outputs:
            return False
        size = type_.shape[-1] if type_.rank else None
        if type_.rank - 1 not in self.facts.gains.get(value, ()) or not isinstance(size, int):
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
        return all(a.node in self.facts.constant or self._pads(a) for a in rows)

    def report(self, log: Log) -> None:
        """Count what is split, and say of each product that is not who needs it whole."""
        for node in self.facts.nodes:
            how = self.how.get(node)
            if node.op is linear.linear and how == "cuts":
                log.counts["column-parallel"] += 1
            elif node.op in (linear.linear, linear.embedding) and how in ("sum", "partial"):
                log.counts["row-parallel" if node.op is linear.linear else "vocabulary"] += 1
            elif node.op is moe.experts and node in self.facts.layouts:
                log.counts[f"experts-by-{self.facts.layouts[node]}"] += 1
            elif node.op in (linear.linear, moe.experts) and how == "whole":
                by = self.wanted.get(Value(node), {}).get("whole")
                reason = self.facts.kept.get(node) or f"{by or 'another cut'} needs all of it"
                log.decline(self.name, node, f"whole on every rank: {reason}")
            if how == "gather":
                log.counts["gathered"] += 1
            if how == "sum":
                log.counts["all-reduce"] += 1

    name: ClassVar[str] = ShardTensorParallel.name


def _overlap(cuts: list[Cut]) -> bool:
    """Whether two different cuts would compute something twice."""
    if len({c.axis for c in cuts}) > 1:
        return True
    ends = sorted((c.start, c.stop) for c in cuts)
    return any(a[1] > b[0] for a, b in pairwise(ends))


@dataclass
class _Builder:
    """Makes the rank's graph: every wanted form of every value, arguments first."""

    plan: _Plan
    made: dict[tuple[Value, Form], Value] = field(default_factory=dict[tuple[Value, Form], Value])

    def build(self) -> Graph:
        graph = self.plan.facts.graph
        for node in self.plan.facts.nodes:
            if node not in self.plan.facts.constant:
                self._make(node)
        outputs = tuple(self._get(o) for o in graph.outputs)
        return Graph(graph.name, graph.params, outputs, graph.symbols)

    def _get(self, value: Value, form: Form = "whole") -> Value:
        """The wanted form of a value; cuts are made of weights and of what is there whole."""
        key = (value, form)
        if key not in self.made:
            if form == "whole":
                self.made[key] = value
            else:
                assert isinstance(form, Cut)
                constant = value.node in self.plan.facts.constant
                whole = self._get(value)
                self.made[key] = (cut_weight if constant else sliced)(whole, form)
        return self.made[key]

    def _node(self, node: Node, args: Iterable[Value], attrs: Mapping[str, Any]) -> Value:
        return node.op.node(tuple(args), attrs, node.source).results[0]

    def _make(self, node: Node) -> None:
        how, value = self.plan.how.get(node, "whole"), Value(node)
        match how:
            case "whole":
                if node.op is not param:
                    made = node.op.node(tuple(map(self._get, node.args)), node.attrs, node.source)
                    for old, new in zip(node.results, made.results, strict=True):
                        self.made[old, "whole"] = new
            case "cuts":
                for form in self.plan.wanted[value]:
                    assert isinstance(form, Cut)
                    self.made[value, form] = self._cut(node, form)
            case "partial":
                self.made[value, "partial"] = self._summand(node)
            case "sum":
                summand = self._summand(node)
                self.made[value, "partial"] = summand
                self.made[value, "whole"] = self._collective(
                    node, all_reduce, summand, ranks=self.plan.facts.ranks
                )
            case "gather":
                self.made[value, "whole"] = self._gathered(node)

    def _cut(self, node: Node, cut: Cut) -> Value:
        inner = pushed(node, cut)
        assert inner is not None
        args = (self._get(a, c) if c else self._get(a) for a, c in inner.args)
        return self._node(node, args, inner.attrs)

    def _collective(self, node: Node, op: Op, x: Value, **attrs: Any) -> Value:
        return op.node((x,), attrs, node.source).results[0]

    def _gathered(self, node: Node) -> Value:
        axis, size = node.types[0].rank - 1, node.types[0].shape[-1]
        assert isinstance(size, int)
        ranks = self.plan.facts.ranks
        mine = self._cut(node, self.plan.share(size, axis))
        joined = self._collective(node, all_gather, mine, dim=axis, ranks=ranks)
        return sliced(joined, Cut(axis, 0, size))

    def _summand(self, node: Node) -> Value:
        facts, rank = self.plan.facts, self.plan.rank
        if node.op is linear.linear:
            x, weight, *bias = node.args
            axis = x.type.rank - 1
            inner = x.type.shape[axis]
            assert isinstance(inner, int)
            mine = self.plan.share(inner, axis)
            # A bias is added once.
            args = (self._get(x, mine), self._get(weight, mine.at(1)), *(bias if not rank else ()))
            return self._node(node, args, node.attrs)
        if node.op is linear.embedding:
            return looked_up(node, self._get(node.args[0]), facts.ranks, rank)
        if node.op is moe.experts:
            args = tuple(map(self._get, node.args[:3]))
            by = facts.layouts[node]
            build = experts_by_intermediate if by == "intermediate" else experts_by_expert
            return build(node, args, facts.ranks, rank)
        args = (self._get(a, "partial" if a.node in facts.summands else "whole") for a in node.args)
        return self._node(node, args, node.attrs)
