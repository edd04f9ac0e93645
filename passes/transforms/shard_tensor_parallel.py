"""shard-tensor-parallel: the graph of one rank of N, with explicit collectives.

Every rank holds what lies between layers whole, and a share of each layer. A product whose inputs
come from other products is split along K and its partial sums are added up (row-parallel, one
all_reduce); those other products are split along N to suit it (column-parallel), and with them the
heads and all that stands between. Nothing is known of models: how a cut of one value follows from
cuts of others is in `propagate_slice`, what is split in `shard_plan` (Shoeybi et al. 2019,
arXiv:1909.08053; Xu et al. 2021, arXiv:2105.04663).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ...compiler.ir import Graph, Node, Value, walk
from ...compiler.ops import linear, moe
from ...compiler.ops.collective import all_gather, all_reduce
from ...compiler.ops.leaf import constant, param
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Applied
from ..raising.canonicalize import simplified
from .propagate_slice import Cut, cut_weight, propagate_slice
from .shard_plan import CannotShard, Facts, Form, Plan
from .shares import (
    emit,
    expert_parallel_experts,
    tensor_parallel_experts,
    vocab_parallel_embedding,
)


@dataclass(frozen=True)
class ShardTensorParallel:
    """The graph of rank `rank` of `ranks`; its outputs are the same on every rank.

    Attention is split by heads (a key/value head that several ranks need is on each of them), MLPs
    by their intermediate dim, experts by theirs or by expert, whichever reads fewer bytes. The
    vocabulary of embedding and logits is split in equal parts, the last ones padded with zero rows:
    logits are gathered whole, [T, V / ranks] from each rank. What a norm, a router or anything else
    needs whole, each rank computes; the log says what that is. CannotShard for heads and dims that
    do not divide.
    """

    name: ClassVar[str] = "shard-tensor-parallel"
    ranks: int
    rank: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"{self.name}: expected a rank below {self.ranks}, found {self.rank}")

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        if graph.updates:
            raise ValueError(f"{self.name}: expected a graph without state: it goes before caches")
        if self.ranks == 1:
            return graph
        facts = Facts(graph, self.ranks)
        # Each rank plans for all of them: so either all refuse or none does.
        plans = [Plan(facts, rank) for rank in range(self.ranks)]
        if any(plan.collectives != plans[0].collectives for plan in plans):
            raise CannotShard(f"graph @{graph.name}: the ranks would not run the same collectives")
        plan = plans[self.rank]
        plan.report(self.name, context.log)
        builders = {rank: _Builder(plans[rank]) for rank in range(self.ranks)}
        # Claims are about all ranks: the first makes them, for each of the others.
        needed = builders if self.rank == 0 else {self.rank: builders[self.rank]}
        graphs = {rank: builder.build() for rank, builder in needed.items()}
        claims = _claims(list(builders.values())) if self.rank == 0 else []
        reason = "one rank computes its part of values"
        mine = context.log.declare(graph, graphs[self.rank], reason, claims=claims)
        return simplified(mine, context.log)


@dataclass
class _Builder:
    """Makes the rank's graph: every wanted form of every value, arguments first."""

    plan: Plan
    made: dict[tuple[Value, Form], Value] = field(default_factory=dict[tuple[Value, Form], Value])

    def build(self) -> Graph:
        graph = self.plan.facts.graph
        for node in self.plan.facts.nodes:
            if node in self.plan.how:
                self._make(node)
        outputs = tuple(self._get(o) for o in graph.outputs)
        return Graph(graph.name, graph.params, outputs, graph.symbols)

    def _get(self, value: Value, form: Form = "whole") -> Value:
        """The wanted form of a value; cuts are made of weights and of what is there whole."""
        if (value, form) in self.made:
            return self.made[value, form]
        if form == "whole":
            assert value.node.is_constant or value.op is param
            return value
        assert isinstance(form, Cut)
        constant = value.node.is_constant
        made = cut_weight(value, form) if constant else form.of(self._get(value))
        self.made[value, form] = made
        return made

    def _make(self, node: Node) -> None:
        value, ranks = Value(node), self.plan.facts.ranks
        match self.plan.how[node]:
            case "whole":
                made = node.rebuilt([*map(self._get, node.args)])
                for old, new in zip(node.results, made.results, strict=True):
                    self.made[old, "whole"] = new
            case "cuts":
                for cut in self.plan.cuts(node):
                    self.made[value, cut] = self._cut(node, cut)
            case "partial":
                self.made[value, "partial"] = self._summand(node)
            case "sum":
                summand = self.made[value, "partial"] = self._summand(node)
                self.made[value, "whole"] = emit(node, all_reduce, summand, ranks=ranks)
            case "gather":
                (cut,) = self.plan.cuts(node)
                parts = emit(node, all_gather, self._cut(node, cut), dim=cut.axis, ranks=ranks)
                size = node.types[0].shape[cut.axis]
                assert isinstance(size, int)
                self.made[value, "whole"] = Cut(cut.axis, 0, size).of(parts)

    def _cut(self, node: Node, cut: Cut) -> Value:
        inner = propagate_slice(node, cut)
        assert inner is not None
        args = [self._get(a, c or "whole") for a, c in inner.args]
        return node.rebuilt(args, inner.attrs).results[0]

    def _summand(self, node: Node) -> Value:
        """This rank's summand of the node's result."""
        facts, rank = self.plan.facts, self.plan.rank
        forms = self.plan.partial_operands(node)
        given = tuple(self._get(a, form) for a, form in forms)
        if node.op is linear.linear:
            ((_, mine),) = forms
            assert isinstance(mine, Cut)
            weight = cut_weight(node.args[1], mine.at(1))
            bias = node.operand("bias") if rank == 0 else None
            return emit(node, linear.linear, *given, weight, bias=bias)
        if node.op is linear.embedding:
            return vocab_parallel_embedding(node, given[0], facts.ranks, rank)
        if node.op is moe.experts:
            by_units = facts.layouts[node] == "intermediate"
            build = tensor_parallel_experts if by_units else expert_parallel_experts
            return build(node, given, facts.ranks, rank)
        return emit(node, node.op, *given, **node.attrs)


# By induction from the parameters on, every rank has what one has.
def _claims(builders: Sequence[_Builder]) -> list[Applied]:
    """Each value that all ranks have whole, computed from the nearest such values before it."""
    facts = builders[0].plan.facts

    def is_whole(node: Node) -> bool:
        return all((Value(node), "whole") in b.made for b in builders)

    def leaves_of(node: Node) -> Iterator[Value]:
        for n in walk(node.results[:1], lambda n: n is not node and is_whole(n)):
            if n is not node and (is_whole(n) or n.op in (param, constant)):
                yield from n.results

    claims: list[Applied] = []
    for node in filter(is_whole, facts.nodes):
        leaves = tuple(leaves_of(node))
        ranks = tuple(
            (
                tuple(b.made[value, "whole"] for value in node.results),
                {b.made[v, "whole"]: v for v in leaves if (v, "whole") in b.made},
            )
            for b in builders
        )
        before = node.results
        claims.append(Applied("whole-on-every-rank", leaves, before, before, ranks=ranks))
    return claims


__all__ = ["CannotShard", "ShardTensorParallel"]
