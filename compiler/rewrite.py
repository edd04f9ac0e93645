"""Rewriting: patterns over values, rules as data, and the rebuilding of graphs.

A rule replaces the values of a matched region by values computed anew. Laws: a value of the region
that something outside uses is one of the rule's results, or the rule declines (nothing may run
twice); the region is convex, or the rule declines (a fused node must not wait for itself).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .ir import Graph, Node, Op, Value, walk
from .types import VerifyError

_SWEEPS = 100


class Decline(Exception):
    """Raised by a rule's `build` for a match that must stay as it is; says why."""


@dataclass(frozen=True, eq=False)
class Pat:
    """Matches a value: any value when `op` is None, else a result of that op on matching args.

    The same Pat twice in a rule must match the same value. `op` may be the name of an `aten.*` op.
    `args` match the op's required operands, or with None any do. Of its optional operands those in
    `given` must be there and match, those in `absent` must not be there; others may be.
    `attrs` must be equal (to None: absent), `where` must hold. A pattern with `options`
    matches what any of them matches.
    """

    op: Op | str | None = None
    args: tuple[Pat, ...] | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    given: Mapping[str, Pat] = field(default_factory=dict[str, "Pat"])
    absent: tuple[str, ...] = ()
    where: Callable[[Value], bool] | None = None
    index: int = 0
    options: tuple[Pat, ...] = ()

    @property
    def op_name(self) -> str | None:
        return self.op.name if isinstance(self.op, Op) else self.op


def pat(
    op: Op | str, *args: Pat, index: int = 0, absent: tuple[str, ...] = (), **named: Any
) -> Pat:
    """`op` applied to `args` (any, if none are given); `named` are patterns of optional operands,
    and attributes.
    """
    given = {name: value for name, value in named.items() if isinstance(value, Pat)}
    attrs = {name: value for name, value in named.items() if name not in given}
    return Pat(op, args or None, attrs, given, absent, index=index)


def maybe(op: Op, arg: Pat) -> Pat:
    """`op` applied to `arg`, or `arg` itself."""
    return either(Pat(op, (arg,)), arg)


def either(*options: Pat) -> Pat:
    """Whatever one of `options` matches."""
    return Pat(options=options)


@dataclass(frozen=True)
class Other:
    """Another result of the node that `pat` matched; a match without `pat` is none."""

    pat: Pat
    index: int


@dataclass(frozen=True)
class Every:
    """Every result of the node that `pat` matched, in order."""

    pat: Pat


Match = Mapping[Pat, Value]


@dataclass(frozen=True, eq=False)
class Rule:
    """results[0] is matched; each result is replaced by what `build` gives for it, in order."""

    name: str
    results: tuple[Pat | Other | Every, ...]
    build: Callable[[Match], Value | tuple[Value, ...]]

    @property
    def root(self) -> Pat:
        """What is matched first: the pattern of results[0]."""
        first = self.results[0]
        return first if isinstance(first, Pat) else first.pat

    def replaced(self, found: Match) -> tuple[Value, ...] | None:
        """The values that a match replaces; None where a pattern of theirs matched nothing."""
        values: list[Value] = []
        for result in self.results:
            pattern = result if isinstance(result, Pat) else result.pat
            if pattern not in found:
                return None
            match result:
                case Pat():
                    values.append(found[result])
                case Other():
                    values.append(Value(found[pattern].node, result.index))
                case Every():
                    values.extend(found[pattern].node.results)
        return tuple(values)


@dataclass(frozen=True)
class Applied:
    """One rewrite that happened: the region between `leaves` and `before` became `after`.

    Where the two sides mean the same only for certain inputs (one sequence in a cache of many),
    `given` says which: "zeros", or "index" for the numbers from 0 on in row-major order. `allowed`
    is the largest root mean square of the difference, relative to that of the result, where the two
    sides differ by more than rounding. With `ranks`, each of them is to have the values of `before`
    too: what it computes for them together with the others, and which values it has for those of
    the leaves.
    """

    rule: str
    leaves: tuple[Value, ...]
    before: tuple[Value, ...]
    after: tuple[Value, ...]
    given: Mapping[Value, Literal["zeros", "index"]] = field(default_factory=dict[Value, Any])
    allowed: float | None = None
    ranks: tuple[tuple[tuple[Value, ...], Mapping[Value, Value]], ...] = ()


@dataclass(frozen=True)
class Step:
    """One change of a whole graph.

    Either `after` is `before` with every rewrite of `applied` done at once, or it is what a pass
    built by itself: then `reason` says why no rewrite can say it, and `applied` only states what
    is true of it, values of `before` and values of `after` that are equal.
    """

    before: Graph
    after: Graph
    applied: tuple[Applied, ...]
    reason: str = ""


@dataclass
class Log:
    """What a pass did: rewrites in order, and the reasons for those that it left alone.

    `steps` are the changes of graphs that these rewrites made. `counts` holds, by name, what was
    done otherwise than by rewrites; `notes` what was decided for a reason that the report should
    show.
    """

    applied: list[Applied] = field(default_factory=list[Applied])
    declined: list[str] = field(default_factory=list[str])
    counts: Counter[str] = field(default_factory=Counter[str])
    notes: list[str] = field(default_factory=list[str])
    steps: list[Step] = field(default_factory=list[Step])

    def apply(self, graph: Graph, applied: Sequence[Applied]) -> Graph:
        """`graph` with every rewrite done: each value of a `before` is replaced by its `after`.

        New nodes without a source get that of what they replace. VerifyError where types differ.
        """
        if not applied:
            return graph
        swap: dict[Value, Value] = {}
        for one in applied:
            if len(one.before) != len(one.after):
                counts = f"expected {len(one.before)} results, found {len(one.after)}"
                raise VerifyError(f"rule {one.rule}: {counts}")
            for old, new in zip(one.before, one.after, strict=True):
                if old.type != new.type:
                    raise VerifyError(f"rule {one.rule}: replaces {old.type} by {new.type}")
                if old != new:
                    swap[old] = new
        after = rebuild(graph, swap, _origins(graph, applied))
        self.applied += applied
        self.steps.append(Step(graph, after, tuple(applied)))
        return after

    def declare(
        self, before: Graph, after: Graph, reason: str, *, claims: Sequence[Applied] = ()
    ) -> Graph:
        """`after`, which a pass built from `before` by itself; `claims` can be checked of it."""
        if after == before:
            return before
        self.steps.append(Step(before, after, tuple(claims), reason))
        return after

    def path(self, before: Graph, after: Graph) -> list[Step]:
        """The steps from one graph to the other; VerifyError where what changed was not logged."""
        path: list[Step] = []
        for step in reversed(self.steps):
            if step.after == after and after != before:
                path.append(step)
                after = step.before
        if after != before:
            raise VerifyError(
                "unlogged change: the graph that it gives is not one that logged rewrites made"
            )
        return path[::-1]

    @property
    def matches(self) -> Counter[str]:
        """How often each rule or other rewriting was applied."""
        return Counter(a.rule for a in self.applied) + self.counts

    def decline(self, rule: str, node: Node, reason: str) -> None:
        place = f" at {node.source}" if node.source else ""
        self.declined.append(f"{rule}: {node.op.name}{place}: {reason}")


def _origins(graph: Graph, applied: Sequence[Applied]) -> dict[Node, str]:
    """The source of what each new node replaces."""
    old = set(graph.nodes())
    origins: dict[Node, str] = {}
    for one in applied:
        for node in walk(one.after, lambda node: node in old or node in origins):
            if node not in old:
                origins.setdefault(node, one.before[0].node.source)
    return origins


def _solutions(pattern: Pat, value: Value, found: dict[Pat, Value]) -> Iterator[dict[Pat, Value]]:
    """Every way in which `value` matches, as extensions of `found`."""
    if pattern in found:
        if found[pattern] == value:
            yield found
        return
    for option in pattern.options:
        for extended in _solutions(option, value, found):
            yield {**extended, pattern: value}
    if pattern.options:
        return
    name = pattern.op_name
    fits = name is None or (value.op.name == name and value.index == pattern.index)
    if fits and all(value.attrs.get(k) == v for k, v in pattern.attrs.items()):
        here = {**found, pattern: value}
        if pattern.where is None or pattern.where(value):
            yield from _argument_solutions(pattern, value, here)


def _argument_solutions(
    pattern: Pat, value: Value, found: dict[Pat, Value]
) -> Iterator[dict[Pat, Value]]:
    if pattern.args is None and not pattern.given and not pattern.absent:
        yield found
        return
    args, optional = value.node.taken(value.node.args)
    if pattern.given.keys() - optional or optional.keys() & {*pattern.absent}:
        return
    named = tuple(optional[name] for name in pattern.given)
    if pattern.args is None:
        yield from _sequence_solutions((*pattern.given.values(),), named, found)
        return
    if len(args) != len(pattern.args):
        return
    orders = [args, args[::-1]] if value.op.commutative and args[0] != args[1] else [args]
    patterns = (*pattern.args, *pattern.given.values())
    for order in orders:
        yield from _sequence_solutions(patterns, (*order, *named), found)


def _sequence_solutions(
    patterns: tuple[Pat, ...], values: tuple[Value, ...], found: dict[Pat, Value]
) -> Iterator[dict[Pat, Value]]:
    if not patterns:
        yield found
        return
    for extended in _solutions(patterns[0], values[0], found):
        yield from _sequence_solutions(patterns[1:], values[1:], extended)


def _root_ops(pattern: Pat) -> set[str | None]:
    if pattern.options:
        return set().union(*map(_root_ops, pattern.options))
    return {pattern.op_name}


def _inner_nodes(found: Match) -> set[Node]:
    """Nodes of the region: those matched by an op pattern that compute from something.

    Weights, literals and filled tensors are not: to use them twice repeats no work.
    """
    return {v.node for p, v in found.items() if v.op.name == p.op_name and v.node.args}


def _inputs(rule: Rule, found: Match) -> set[Node]:
    """Nodes that the rule takes as they are, whatever they are: those that a wildcard matched, and
    optional operands that no pattern speaks of.
    """
    given = {v.node for p, v in found.items() if p.op is None and not p.options}
    for p, v in found.items():
        if v.op.name == p.op_name and v.node.given:
            _, optional = v.node.taken(v.node.args)
            given |= {operand.node for name, operand in optional.items() if name not in p.given}
    return given - {found[r].node for r in rule.results if isinstance(r, Pat) and r.op is None}


def _leaves(inner: set[Node]) -> tuple[Value, ...]:
    """Values that the region takes from outside."""
    return tuple(dict.fromkeys(a for n in inner for a in n.args if a.node not in inner))


@dataclass
class _Sweep:
    """One pass over a graph: what was taken by which region, and the rewrites to be done."""

    graph: Graph
    applied: list[Applied] = field(default_factory=list[Applied])
    region: dict[Node, tuple[Value, ...]] = field(default_factory=dict[Node, tuple[Value, ...]])

    def __post_init__(self) -> None:
        self.nodes = list(self.graph.nodes())
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.users = self.graph.users()
        self.roots = set(self.graph.roots)
        self.first_shared = len(self.nodes)

    def leak(self, inner: set[Node], kept: set[Value]) -> Value | None:
        """A value of the region that is used outside of it and would not be replaced."""
        for node in inner:
            for value in node.results:
                outside = any(u not in inner for u in self.users.get(value, ()))
                if value not in kept and (outside or value in self.roots):
                    return value
        return None

    def convex(self, inner: set[Node], leaves: tuple[Value, ...]) -> bool:
        """Whether no leaf depends on the region; regions taken before count as one node each."""
        # Nothing earlier depends on the region, but through an earlier part of a region that has a
        # later one: so the search goes down to the first node of those too.
        first = min((self.first_shared, *(self.order[n] for n in inner)))
        stack, seen = [v.node for v in leaves], set[Node]()
        while stack:
            node = stack.pop()
            if node in inner:
                return False
            if node in seen:
                continue
            seen.add(node)
            if node in self.region:
                stack.extend(v.node for v in self.region[node])
            elif self.order[node] > first:
                stack.extend(a.node for a in node.args)
        return True

    def attempt(self, rule: Rule, node: Node, log: Log) -> bool:
        """Apply `rule` at `node` if it matches and the laws allow it."""
        earlier = len(log.declined)
        for found in _solutions(rule.root, Value(node, rule.root.index), {}):
            kept = rule.replaced(found)
            if kept is None:
                continue
            given = _inputs(rule, found)
            inner = _inner_nodes(found) - given
            if inner & self.region.keys():
                continue
            if (value := self.leak(inner, set(kept))) is not None:
                log.decline(rule.name, node, f"{value.op.name} inside the match is used outside")
                continue
            leaves = _leaves(inner)
            waits = any(v.node in given for v in kept)
            if waits or (len(kept) > 1 and not self.convex(inner, leaves)):
                log.decline(rule.name, node, "an input of the match depends on one of its results")
                continue
            try:
                built = rule.build(found)
            except Decline as reason:
                log.decline(rule.name, node, str(reason))
                continue
            after = built if isinstance(built, tuple) else (built,)
            if after == kept:
                log.decline(rule.name, node, "it would be replaced by itself")
                continue
            del log.declined[earlier:]
            self.applied.append(Applied(rule.name, leaves, kept, after))
            self.region.update(dict.fromkeys(inner, leaves))
            if len(kept) > 1:
                self.first_shared = min((self.first_shared, *(self.order[n] for n in inner)))
            return True
        return False


def rewrite(graph: Graph, rules: Sequence[Rule], log: Log | None = None) -> Graph:
    """Replace non-overlapping matches, from the results backwards, first rule first.

    Nodes that nothing touches are shared with the old graph; without a match it is returned as is.
    """
    log = Log() if log is None else log
    by_op: dict[str | None, list[Rule]] = {}
    for rule in rules:
        for op in _root_ops(rule.root):
            by_op.setdefault(op, []).append(rule)
    sweep = _Sweep(graph)
    anywhere = by_op.pop(None, [])
    for node in reversed(sweep.nodes):
        if node in sweep.region:
            continue
        for rule in (*by_op.get(node.op.name, ()), *anywhere):
            if sweep.attempt(rule, node, log):
                break
    return log.apply(graph, sweep.applied)


def rewrite_all(graph: Graph, rules: Sequence[Rule], log: Log | None = None) -> Graph:
    """`rewrite` until nothing matches. RuntimeError when the rules do not come to an end."""
    log = Log() if log is None else log
    earlier, first = len(log.declined), len(log.applied)
    # Rules that double what they match would fill the memory long before the last sweep.
    most = _SWEEPS * max(_SWEEPS, sum(1 for _ in graph.nodes()))
    for _ in range(_SWEEPS):
        # Only what the last sweep leaves alone is declined.
        del log.declined[earlier:]
        done = len(log.applied)
        if done - first > most:
            break
        graph = rewrite(graph, rules, log)
        if len(log.applied) == done:
            return graph
    names = sorted({a.rule for a in log.applied[-20:]})
    raise RuntimeError(
        f"rewriting did not end after {len(log.applied) - first} rewrites in at most {_SWEEPS} "
        f"sweeps; still matching: {names}"
    )


def rebuild(
    graph: Graph, swap: Mapping[Value, Value], origin: Mapping[Node, str] | None = None
) -> Graph:
    """`graph` with each value in `swap` replaced; untouched nodes are shared.

    `origin` gives sources to new nodes that have none. ValueError when a replacement needs itself.
    """
    origin = origin or {}
    new: dict[Node, Node] = {}
    open_: set[Node] = set()

    def target(value: Value) -> Value:
        if value not in swap:
            return value
        seen: set[Value] = set()
        while value in swap:
            if value in seen:
                raise ValueError(f"{value.op.name} would be replaced by itself")
            seen.add(value)
            value = swap[value]
        return value

    def at(value: Value) -> Value:
        value = target(value)
        return Value(new[value.node], value.index)

    stack = [target(r).node for r in graph.roots]
    while stack:
        node = stack[-1]
        if node in new:
            stack.pop()
            continue
        todo = [n for a in node.args if (n := target(a).node) not in new]
        if todo:
            if node in open_ and any(n in open_ for n in todo):
                raise ValueError(f"{node.op.name} would depend on its own result")
            open_.add(node)
            stack.extend(todo)
            continue
        open_.discard(node)
        args = tuple(at(a) for a in node.args)
        source = node.source or origin.get(node, "")
        same = all(a is b or a == b for a, b in zip(args, node.args, strict=True))
        kept = same and source == node.source
        new[stack.pop()] = node if kept else replace(node, args=args, source=source)
    return Graph(
        graph.name,
        graph.params,
        tuple(at(o) for o in graph.outputs),
        graph.symbols,
        {name: at(v) for name, v in graph.updates.items()},
    )
