"""Translation validation: a rewritten region, before and after, on sampled inputs.

The values that a rewrite replaced and those that it put in their place are computed through the
references from the same random inputs, for several values of every symbol.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch

from .dtypes import FLOATS
from .interpret import compute, random_tensor
from .ir import Graph, Node, Value, walk
from .ops.collective import Communicator
from .ops.leaf import constant, param
from .ops.pointwise import cast
from .ops.shape import cat, expand, gather, permute, slice_, view
from .ranks import Echo, run_ranks
from .rewrite import Applied
from .torch_types import torch_dtype, wide
from .types import VerifyError

# Draws of few tokens, for sizes that may be anything, and one of some more.
_ROUNDS, _FEW, _SOME = 3, 9, 64
# What an op chooses differs for few tokens where a rule is wrong in a corner (a limit on groups
# that seldom binds): so many are drawn, at most so many at once, and then again half as many with
# inputs of other magnitudes. An error that one token in a hundred shows is missed once in 30,000
# times. All tokens at once share their weights, of which one draw in five hides from every token
# what a router by groups does wrong: twelve draws miss that once in 20 million times.
_CHOICES, _AT_ONCE = 1024, 128
# Chained ops add up their errors; more than this many times one op's tolerance is no rounding.
_SLACK = 8


@dataclass
class _Order:
    """Nodes by number, arguments before users, and the set of nodes behind each, as bits."""

    number: dict[Node, int] = field(default_factory=dict[Node, int])
    behind: dict[Node, int] = field(default_factory=dict[Node, int])

    def add(self, roots: tuple[Value, ...]) -> None:
        """Number what `roots` are computed from."""
        for node in walk(roots, self.number.__contains__):
            if node not in self.number:
                self.number[node] = len(self.number)
                bits = 0
                for arg in node.args:
                    bits |= self.behind[arg.node] | 1 << self.number[arg.node]
                self.behind[node] = bits


@dataclass
class RewriteCheck:
    """Checks rewrites, each kind of region once: those that differ in nothing but which values they
    are computed from have the same answer.
    """

    answers: dict[Any, str | None] = field(default_factory=dict[Any, "str | None"])
    _graph: Graph | None = None
    _order: _Order = field(default_factory=_Order)

    def __call__(self, graph: Graph, applied: Applied) -> None:
        """Raise VerifyError, naming rule, region and error, when the two sides differ.

        `graph` is the one in which the rewrite happened, for its symbols. Weights count as inputs.
        Floats are compared within the tolerances of the ops involved, all else exactly. Regions
        that choose are drawn for many tokens more, of inputs of several magnitudes.

        The inputs are drawn independently, which asks for more than need be where the new side
        looks behind some of them: if the sides differ, it is tried with the values behind.
        """
        if graph is not self._graph:
            self._graph, self._order = graph, _Order()
            self._order.add(graph.roots)
        found: str | None = None
        for frontier in _frontiers(applied, self._order):
            key = _structure(graph, applied, frontier)
            if key not in self.answers:
                self.answers[key] = _compared(graph, applied, frontier)
            if (found := self.answers[key]) is None:
                return
        raise VerifyError(f"rule {applied.rule} {found}")


def check_rewrite(graph: Graph, applied: Applied) -> None:
    """One rewrite by itself; see RewriteCheck."""
    RewriteCheck()(graph, applied)


def _compared(graph: Graph, applied: Applied, frontier: set[Value]) -> str | None:
    """How the two sides differ, computed from random values of the frontier; None if not."""
    domains = _domains(applied, frontier)
    for binding, spread in _rounds(graph, _chooses(applied, frontier)):
        binding.update(_equal_symbols(applied, binding))
        inputs = {v: _sample(v, binding, applied.given.get(v), domains.get(v)) for v in frontier}
        if spread:
            inputs = {v: _scaled(x) for v, x in inputs.items()}
        before = _evaluate(applied.before, inputs, binding)
        after = _after(applied, inputs, binding)
        sides = zip(applied.before, applied.after, before, strict=True)
        for (old, new, a), b in ((s, b) for s, bs in zip(sides, after, strict=True) for b in bs):
            if applied.allowed is None:
                allowed, found = _allowed(old, new, frontier), _difference(a, b)
            else:
                allowed, found = applied.allowed, _mean_difference(a, b)
            if found > allowed:
                return (
                    f"changes a result by {found:.3g} (allowed {allowed:.3g}) "
                    f"at {binding}:\nbefore:\n{_show(old, frontier)}"
                    f"\nafter:\n{_show(new, frontier)}"
                )
    return None


def _after(
    applied: Applied, inputs: dict[Value, torch.Tensor], binding: dict[str, int]
) -> list[list[Any]]:
    """The values of the new side, of each rank."""
    if not applied.ranks:
        return [[x] for x in _evaluate(applied.after, inputs, binding)]

    def job(
        after: tuple[Value, ...], same: Mapping[Value, Value]
    ) -> Callable[[Communicator], list[Any]]:
        given = inputs | {new: inputs[old] for new, old in same.items()}
        return lambda communicator: _evaluate(after, given, binding, communicator)

    found = run_ranks([job(after, same) for after, same in applied.ranks])
    return [list(of_ranks) for of_ranks in zip(*found, strict=True)]


def _structure(graph: Graph, applied: Applied, frontier: set[Value]) -> Any:
    """What two regions share that compute the same, but for which values they are given."""
    lines: dict[Value, Any] = {}
    numbers: dict[Value, int] = {}
    same = {new: old for _, given in applied.ranks for new, old in given.items()}
    roots = (*applied.before, *applied.after, *(v for after, _ in applied.ranks for v in after))
    for value in _inner((*roots, *same.values()), {*frontier, *same}):
        numbers[value] = len(numbers)
        if value in frontier:
            lines[value] = (value.type, applied.given.get(value))
        elif value in same:
            lines[value] = numbers[same[value]]
        else:
            node, args = value.node, tuple(numbers[a] for a in value.node.args)
            said = (node.op.name, value.index, args, node.given, repr(node.attrs), node.types)
            lines[value] = said
    ends = tuple(numbers[v] for v in roots)
    symbols = tuple((name, r.start, r.stop) for name, r in graph.symbols.items())
    return (applied.rule, applied.allowed, symbols, ends, tuple(lines.values()))


# Ops that only select elements: two of them on one value are not independent, so what is drawn
# is the value behind them.
_SELECTIONS = frozenset((view, permute, expand, slice_, cast))


def _frontiers(applied: Applied, order: _Order) -> Iterator[set[Value]]:
    """The values that both sides are computed from: the region's leaves and what the new side takes
    beside them, then, value by value, what lies behind those that may depend on the others.
    """
    order.add((*applied.before, *applied.leaves, *applied.after))
    old = 0
    for value in (*applied.before, *applied.leaves):
        old |= order.behind[value.node] | 1 << order.number[value.node]

    def is_old(node: Node) -> bool:
        return bool(old >> order.number[node] & 1)

    new_nodes = [n for n in walk(applied.after, is_old) if not is_old(n)]
    inner = {n for n in new_nodes if n.op not in (param, constant)}
    reached = {a for n in inner for a in n.args if a.node not in inner}
    reached |= {v for v in applied.after if v.node not in inner}
    leaves = set(applied.leaves)
    if applied.ranks:
        yield leaves
        return
    frontier = {v for v in leaves | reached if _is_input(v)}
    yield frontier
    divided: set[Value] = set()
    while behind := _divisible(frontier, reached, leaves, applied.given.keys(), order):
        frontier.discard(behind)
        divided.add(behind)
        stack = [*behind.node.args]
        while stack:
            value = stack.pop()
            if value in divided:
                stack.extend(value.node.args)
            elif _is_input(value):
                frontier.add(value)
        yield frontier


def _is_input(value: Value) -> bool:
    """Whether a value can be drawn: a literal or a filled tensor is what it is."""
    return bool(value.node.args) or value.op in (param, constant)


def _divisible(
    frontier: set[Value],
    reached: set[Value],
    leaves: set[Value],
    given: Set[Value],
    order: _Order,
) -> Value | None:
    """A value of the frontier that may not be independent of the others: it selects from another
    value, or is computed from something that is drawn or used beside it, in the fewest steps.
    Leaves of the region are independent of one another.
    """

    fixed = {v.node for v in frontier | reached if v not in given}
    beside = {v.node for v in (frontier | reached) - leaves if v not in given}
    found: dict[Value, int] = {}
    for value in frontier:
        others = beside if value in leaves else fixed
        if value.op in _SELECTIONS and value.node.args:
            found[value] = 0
        elif order.behind[value.node] & sum(1 << order.number[n] for n in others):
            found[value] = _steps(value.node, others)
    return min(found, key=lambda v: (found[v], -order.number[v.node]), default=None)


def _steps(node: Node, others: set[Node]) -> int:
    """How many nodes back from `node` the nearest of `others` is; it is computed from one."""
    steps, row = 1, {a.node for a in node.args}
    while not row & others:
        steps, row = steps + 1, {a.node for n in row for a in n.args}
    return steps


def _domains(applied: Applied, frontier: set[Value]) -> dict[Value, range]:
    """Which integers to draw, for the values whose users say so, also through ops that select."""
    found: dict[Value, range] = {}
    for node in _region((*applied.before, *applied.after), frontier):
        domains = [(node.operands[name], domain) for name, domain in node.op.domain.items()]
        if node.op is gather and node.args[0].type.shape[node.attrs["dim"]] == 1:
            domains.append((node.args[1], range(1)))
        for operand, domain in domains:
            stack = [operand]
            while stack:
                value = stack.pop()
                if value in frontier:
                    found[value] = domain
                elif value.op in _SELECTIONS or value.op is cat:
                    stack.extend(value.node.args)
    return found


def _rounds(graph: Graph, chooses: bool) -> Iterator[tuple[dict[str, int], bool]]:
    """Values of the symbols for each draw, and whether its inputs are of several magnitudes."""
    for _ in range(_ROUNDS):
        yield _sample_symbols(graph, _FEW), False
    yield _sample_symbols(graph, _SOME), False
    if not chooses:
        return
    for tokens, spread in ((_CHOICES, False), (_CHOICES // 2, True)):
        drawn = 0
        while drawn < tokens:
            binding = _sample_symbols(graph, _AT_ONCE)
            drawn += max((*binding.values(), 32))
            yield binding, spread


def _chooses(applied: Applied, frontier: set[Value]) -> bool:
    """Whether an op of the region makes integers or truth values of the floats of tokens."""
    return any(
        node.is_symbolic
        and any(a.type.dtype in FLOATS for a in node.args)
        and any(t.dtype not in FLOATS for t in node.types)
        for node in _region((*applied.before, *applied.after), frontier)
    )


def _scaled(x: torch.Tensor) -> torch.Tensor:
    """Floats of another magnitude, so that now one, now another operand decides."""
    return x * random.choice((0.25, 1, 2)) if x.is_floating_point() else x


def _sample_symbols(graph: Graph, limit: int) -> dict[str, int]:
    """Values up to `limit` within the ranges, later symbols not above earlier ones (L rows of T
    tokens): small ones are drawn at random, large ones are as large as may be."""
    binding: dict[str, int] = {}
    least = 2 if limit == _FEW else limit
    for name, bounds in graph.symbols.items():
        low = min(max(least, bounds.start), bounds.stop - 1)
        limit = random.randint(low, max(low, min(limit, bounds.stop - 1)))
        binding[name] = limit
    return binding


def _equal_symbols(applied: Applied, binding: dict[str, int]) -> dict[str, int]:
    """Dims of other names on the new side, by what they are on the old one: L rows of L tokens."""
    sides = zip(applied.before, applied.after, strict=True)
    dims = [(o, n) for a, b in sides for o, n in zip(a.type.shape, b.type.shape, strict=True)]
    return {str(new): binding[str(old)] for old, new in dims if new != old and str(old) in binding}


def _sample(
    value: Value,
    binding: dict[str, int],
    given: Literal["zeros", "index"] | None,
    domain: range | None,
) -> torch.Tensor:
    bound = value.type.bind(binding)
    if given is None and domain is not None:
        return random_tensor(bound, high=domain.stop, low=domain.start)
    if given is None:
        return random_tensor(bound)
    shape: Any = bound.shape
    numbers = torch.arange(prod(shape), dtype=torch_dtype(bound.dtype)).view(shape)
    return numbers if given == "index" else torch.zeros_like(numbers)


def _evaluate(
    roots: Iterable[Value],
    inputs: dict[Value, torch.Tensor],
    binding: dict[str, int],
    communicator: Communicator | None = None,
) -> list[Any]:
    values: dict[Value, Any] = dict(inputs)
    for value in _inner(roots, inputs):
        if value in values:
            continue
        node = value.node
        # Ranks that all hold the same are ranks too: what is true of any is true of them.
        echo = Echo(node.attrs.get("ranks", 1)) if node.op.collective else None
        args = tuple(values[a] for a in node.args)
        results = compute(node, args, binding, communicator or echo)
        values.update((k, v) for k, v in zip(node.results, results, strict=True) if k not in values)
    return [values[v] for v in roots]


def _difference(a: Any, b: Any) -> float:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = wide(a), wide(b)
    same_infinities = torch.equal(a.isfinite(), b.isfinite())
    if not same_infinities:
        return float("inf")
    scale = max(float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0, 1e-30)
    return float((a - b)[a.isfinite()].abs().max()) / scale if a.isfinite().any() else 0.0


def _mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The root mean square of a - b, relative to that of a; infinite where one is not finite."""
    a, b = wide(a), wide(b)
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return float((a - b).norm() / a.norm().clamp_min(1e-30))


def _inner(roots: Iterable[Value], known: Container[Value]) -> list[Value]:
    """The values that `roots` need, arguments before users, down to those that are known."""
    found: dict[Value, None] = {}
    stack = [*roots][::-1]
    while stack:
        value = stack[-1]
        args = () if value in known or value in found else value.node.args
        if todo := [a for a in args if a not in found]:
            stack.extend(todo)
        else:
            found[stack.pop()] = None
    return [*found]


def _region(roots: Iterable[Value], frontier: set[Value]) -> list[Node]:
    """The nodes between the frontier and `roots`, arguments before users."""
    return [*dict.fromkeys(v.node for v in _inner(roots, frontier) if v not in frontier)]


def _allowed(old: Value, new: Value, frontier: set[Value]) -> float:
    nodes = _region((old, new), frontier)
    dtypes = {t.dtype for n in nodes for t in n.types}
    return _SLACK * max((n.op.tolerance.of(d) for n in nodes for d in dtypes), default=0.0)


def _show(root: Value, frontier: set[Value]) -> str:
    names = sorted(frontier, key=lambda v: str(v.type))
    from_ = ", ".join(f"{v.op.name}: {v.type}" for v in names)
    ops = " ".join(n.op.name for n in _region((root,), frontier))
    return f"  {ops or 'a value as it is'} : {root.type}  from ({from_})"
