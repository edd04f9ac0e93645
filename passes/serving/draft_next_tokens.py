"""draft-next-tokens: behind every row that it samples, a step drafts tokens for the step after it.

What drafts is in the graph already, over every token, with caches of its own. There are two kinds.

What predicts the token behind the next (see frontends/importers/prediction_layer) takes the hidden
state of a token and the token that follows it. Where rows are accepted, the sampled token is the
drafted one that follows, so that one run over all tokens both fills its cache and drafts behind
each row.

A model of its own (see frontends/draft_model) takes tokens alone, and has to see each: those of the
step, the first of a prompt among them, and what was sampled. One run over both, the step's tokens
and one more a row (see the op extend), fills its cache and drafts the first token, so that its
weights are read once for both. What was drafted wrong stays out of that run: the sampled token is
written in its place. A drafted token that is the last to be accepted was not in it yet: the next
step brings it.

What lies in the cache beyond an accepted row is written again by the next step, as in the model's
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy

from ...compiler.ir import Graph, Node, Value, walk
from ...compiler.ops.draft import MOST_DRAFTED, accept, extend, follow
from ...compiler.ops.leaf import param
from ...compiler.ops.sampling import sample
from ...compiler.ops.shape import cat, take, view
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import rebuild
from ...compiler.types import Dim, dim
from .sample_on_device import FOLLOWING


@dataclass(frozen=True)
class DraftNextTokens:
    """The outputs hidden [L, H], drafted i32[L] and state [L, H], or of a model of its own drafted
    i32[L] alone, become draft i32[L, tokens].

    With a prediction layer `following` is from here on -1 for the tokens that the step samples. The
    first drafted token is `drafted`. Each further one is made by what drafts from its own state,
    one position on, behind the rows where acceptance ends (see the op accept) alone; of other rows
    these are no drafts. With them the graph has the parameter room i32[L], how many positions
    behind each row's there are pages for.

    With a model of its own all are made so, also the first, and `room` is always there.
    """

    name: ClassVar[str] = "draft-next-tokens"
    tokens: int = 1

    def expected(self, graph: Graph) -> int:
        """1 for a graph that samples and predicts, and does not draft."""
        return int(_refusal(graph) is None)

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        if not 1 <= self.tokens <= MOST_DRAFTED:
            raise ValueError(
                f"{self.name}: expected 1 to {MOST_DRAFTED} tokens, found {self.tokens}"
            )
        if reason := _refusal(graph):
            context.log.decline(self.name, graph.outputs[0].node, reason)
            return graph
        if FOLLOWING in _names(graph):
            after = _with_predicted(graph, self.tokens)
            reason = "what was predicted is drafted"
        else:
            after = _with_model(graph, self.tokens)
            reason = "a model of its own drafts behind the sampled tokens"
        context.log.counts[self.name] += 1
        return context.log.declare(graph, after, reason)


def _names(graph: Graph) -> set[str]:
    return {p.attrs["name"] for p in graph.params}


def _refusal(graph: Graph) -> str | None:
    """Why `graph` cannot draft."""
    node = next((node for node in graph.nodes() if node.op is sample), None)
    if node is None:
        return "it does not sample"
    others = graph.outputs[1 + len(node.types) :]
    if FOLLOWING not in _names(graph):
        alone = len(others) == 1 and others[0].op is take
        return None if alone else "it predicts nothing behind the tokens that it samples"
    if any(node.op is follow for node in graph.nodes()):
        return "it predicts nothing behind the tokens that it samples"
    if len(others) != 3 or any(o.op is not take for o in others):
        return "its last outputs are not the rows of hidden states, tokens and hidden states"
    return None


def _with_predicted(graph: Graph, count: int) -> Graph:
    """`graph` with `count` tokens that its prediction layer drafts."""
    *chosen, hidden, first, state = graph.outputs
    token, rows = chosen[1], graph.param("logit_rows")
    known = graph.param(FOLLOWING)
    following = param(name=FOLLOWING, type=known.type)
    filled = follow(following, rows, token)
    drafted = [first]
    params = [following if p == known else p for p in graph.params]
    updates = dict(graph.updates)
    if count > 1:
        room = param(name="room", type=token.type)
        params.append(room)
        given = [graph.param(name) for name in ("tokens", "positions", "slots")]
        steps = accept.all(*given, rows, token, room, steps=count - 1)
        layer = _Drafting(
            graph,
            {"hidden": hidden.node.args[0], "following": known},
            (first.node.args[0], state.node.args[0]),
            reads="the hidden state alone of what the model computes",
        )
        for i in range(count - 1):
            slots, positions = steps[2 * i : 2 * i + 2]
            (token, state), caches = layer.again(
                {"hidden": state, "following": drafted[-1]}, slots, positions, updates
            )
            updates |= caches
            drafted.append(token)
    after = _drafting(graph, params, chosen, drafted, updates)
    return rebuild(after, {known: filled})


def _with_model(graph: Graph, count: int) -> Graph:
    """`graph` with `count` tokens that the model beside it drafts."""
    *chosen, first = graph.outputs
    token, rows = chosen[1], graph.param("logit_rows")
    room = param(name="room", type=token.type)
    given = [graph.param(name) for name in ("tokens", "positions", "slots")]
    tokens, positions, slots, last, *steps = extend.all(*given, rows, token, room, steps=count)
    outputs = (first.node.args[0],)
    model = _Drafting(graph, {"tokens": given[0]}, outputs, reads="the tokens alone of a step")
    # In place of the run that was imported, which had the step's tokens alone.
    (every,), caches = model.again({"tokens": tokens}, slots, positions, model.caches)
    updates = {**graph.updates, **caches}
    drafted = [take(every, last)]
    for i in range(count - 1):
        slots, positions = steps[2 * i : 2 * i + 2]
        (token,), caches = model.again({"tokens": drafted[-1]}, slots, positions, updates)
        updates |= caches
        drafted.append(token)
    return _drafting(graph, [*graph.params, room], chosen, drafted, updates)


def _drafting(
    graph: Graph,
    params: list[Value],
    chosen: list[Value],
    drafted: list[Value],
    updates: Mapping[str, Value],
) -> Graph:
    """`graph` with what is `drafted` as its last output."""
    columns = [view(d, shape=(*d.type.shape, 1)) for d in drafted]
    draft = columns[0] if len(columns) == 1 else cat(*columns, dim=1)
    return Graph(graph.name, tuple(params), (*chosen, draft), graph.symbols, updates)


class _Drafting:
    """What makes `outputs` from `given` in a serving graph, to be computed again for other rows.

    `reads` says what of the graph beside it that may be.
    """

    def __init__(
        self, graph: Graph, given: Mapping[str, Value], outputs: tuple[Value, ...], reads: str
    ) -> None:
        index = {name: graph.param(name) for name in ("slots", "positions")}
        self._given = {**given, **index}
        self._outputs = outputs
        stops = {value.node for value in given.values()}
        mine = set(walk(outputs, stops.__contains__))
        theirs = set(walk(graph.outputs[:1]))
        # Caches that it appends to, by name, and what they hold after it.
        self._updates = {n: v for n, v in graph.updates.items() if v.node in mine}
        self.caches = {name: graph.param(name) for name in self._updates}
        foreign = [graph.param("tokens").node, *(v.node for v in self._updates.values())]
        if any(n in mine and n in theirs and n not in stops for n in foreign):
            raise ValueError(
                f"draft-next-tokens: expected what drafts to read {reads}, found that it reads more"
            )
        (self._tokens,) = index["slots"].type.shape

    def again(
        self,
        given: Mapping[str, Value],
        slots: Value,
        positions: Value,
        caches: Mapping[str, Value],
    ) -> tuple[tuple[Value, ...], dict[str, Value]]:
        """Its outputs for other rows, and what its caches hold after those."""
        given = {**given, "slots": slots, "positions": positions}
        made = {self._given[name]: value for name, value in given.items()}
        made |= {self.caches[name]: caches[name] for name in self.caches}
        (rows,) = slots.type.shape
        roots = (*self._outputs, *self._updates.values())
        stops = {value.node for value in made}
        for node in walk(roots, stops.__contains__):
            if node in stops:
                continue
            args = [made[a] for a in node.args]
            same = args == [*node.args] and not node.is_symbolic
            again = node if same else self._rebuilt(node, args, rows)
            made.update(zip(node.results, again.results, strict=True))
        outputs = tuple(made[output] for output in self._outputs)
        return outputs, {name: made[value] for name, value in self._updates.items()}

    def _rebuilt(self, node: Node, args: list[Value], rows: Dim) -> Node:
        attrs = {name: self._for_rows(value, rows) for name, value in node.attrs.items()}
        return node.rebuilt(args, attrs)

    def _for_rows(self, value: Any, rows: Dim) -> Any:
        """An attribute, of as many rows as are drafted behind."""
        if isinstance(value, tuple):
            return tuple(self._for_rows(part, rows) for part in value)
        if not isinstance(value, sympy.Expr):
            return value
        found: Any = value.xreplace({self._tokens: rows})
        return dim(found)
