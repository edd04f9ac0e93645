"""draft-next-tokens: behind every row that it samples, a step drafts tokens for the step after it.

What drafts the token behind the next (see frontends/importers/prediction_layer) is in the graph
already, over every token and the one that follows it, with a cache of its own. Where rows are
accepted, the sampled token is the drafted one that follows, so that one run over all tokens both
fills that cache and drafts behind each row. What lies in the cache beyond an accepted
row is written again by the next step, as in the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy

from ...compiler.ir import Graph, Node, Value, walk
from ...compiler.ops.draft import accept, follow
from ...compiler.ops.leaf import param
from ...compiler.ops.sampling import sample
from ...compiler.ops.shape import cat, take, view
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import rebuild
from ...compiler.types import dim
from .sample_on_device import FOLLOWING

# The most tokens that are drafted behind a row.
MOST = 4


@dataclass(frozen=True)
class DraftNextTokens:
    """The outputs hidden [L, H], drafted i32[L] and state [L, H] become draft i32[L, tokens].

    `following` is from here on -1 for the tokens that the step samples. The first drafted token is
    `drafted`. Each further one is made by what drafts from its own state, one position on, behind
    the rows where acceptance ends (see the op accept) alone; of other rows these are no drafts.
    With them the graph has the parameter room i32[L], how many positions behind each row's there
    are pages for.
    """

    name: ClassVar[str] = "draft-next-tokens"
    tokens: int = 1

    def expected(self, graph: Graph) -> int:
        """1 for a graph that samples and predicts, and does not draft."""
        return int(_refusal(graph) is None)

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        if not 1 <= self.tokens <= MOST:
            raise ValueError(f"{self.name}: expected 1 to {MOST} tokens, found {self.tokens}")
        if reason := _refusal(graph):
            context.log.decline(self.name, graph.outputs[0].node, reason)
            return graph
        *chosen, hidden, first, state = graph.outputs
        token, rows = chosen[1], graph.param("logit_rows")
        known = graph.param(FOLLOWING)
        following = param(name=FOLLOWING, type=known.type)
        filled = follow(following, rows, token)
        drafted = [first]
        params = [following if p == known else p for p in graph.params]
        updates = dict(graph.updates)
        if self.tokens > 1:
            room = param(name="room", type=token.type)
            params.append(room)
            given = [graph.param(name) for name in ("tokens", "positions", "slots")]
            steps = accept.all(*given, rows, token, room, steps=self.tokens - 1)
            layer = _Drafting(graph, hidden, first, state)
            for i in range(self.tokens - 1):
                slots, positions = steps[2 * i : 2 * i + 2]
                token, state, caches = layer.again(
                    hidden=state,
                    following=drafted[-1],
                    slots=slots,
                    positions=positions,
                    caches=updates,
                )
                updates |= caches
                drafted.append(token)
        columns = [view(d, shape=(*d.type.shape, 1)) for d in drafted]
        draft = columns[0] if len(columns) == 1 else cat(*columns, dim=1)
        unfilled = Graph(graph.name, tuple(params), (*chosen, draft), graph.symbols, updates)
        after = rebuild(unfilled, {known: filled})
        context.log.counts[self.name] += 1
        reason = "what was predicted is drafted"
        return context.log.declare(graph, after, reason)


def _refusal(graph: Graph) -> str | None:
    """Why `graph` cannot draft."""
    names = {p.attrs["name"] for p in graph.params}
    if not any(node.op is sample for node in graph.nodes()):
        return "it does not sample"
    if FOLLOWING not in names or any(node.op is follow for node in graph.nodes()):
        return "it predicts nothing behind the tokens that it samples"
    *chosen, hidden, drafted, state = graph.outputs
    if len(chosen) < 3 or any(o.op is not take for o in (hidden, drafted, state)):
        return "its last outputs are not the rows of hidden states, tokens and hidden states"
    return None


class _Drafting:
    """What drafts in a serving graph, to be computed again for other rows."""

    def __init__(self, graph: Graph, hidden: Value, drafted: Value, state: Value) -> None:
        self._given = {
            "hidden": hidden.node.args[0],
            "following": graph.param(FOLLOWING),
            "slots": graph.param("slots"),
            "positions": graph.param("positions"),
        }
        self._outputs = (drafted.node.args[0], state.node.args[0])
        self._trunk = graph.param("tokens")
        mine = {self._given["following"].node}
        for node in graph.nodes():
            if any(a.node in mine for a in node.args):
                mine.add(node)
        # Caches that it appends to, by name, and what they hold after it.
        self._updates = {n: v for n, v in graph.updates.items() if v.node in mine}
        self._caches = {name: graph.param(name) for name in self._updates}
        tokens, more = self._given["slots"].type.shape[0], drafted.type.shape[0]
        self._rows = {tokens: more}

    def again(
        self, *, caches: Mapping[str, Value], **given: Value
    ) -> tuple[Value, Value, dict[str, Value]]:
        """Its tokens and state for other rows, and what its caches hold after those."""
        made = {self._given[name]: value for name, value in given.items()}
        made |= {self._caches[name]: caches[name] for name in self._caches}
        roots = (*self._outputs, *self._updates.values())
        stops = {value.node for value in made}
        for node in walk(roots, stops.__contains__):
            if node in stops:
                continue
            if self._trunk.node is node:
                raise ValueError(
                    "draft-next-tokens: expected what drafts to read the hidden state alone of "
                    "what the model computes, found that it reads its tokens too"
                )
            args = [made[a] for a in node.args]
            same = args == [*node.args] and not node.is_symbolic
            again = node if same else self._rebuilt(node, args)
            made.update(zip(node.results, again.results, strict=True))
        drafted, state, *updates = (made[root] for root in roots)
        return drafted, state, dict(zip(self._updates, updates, strict=True))

    def _rebuilt(self, node: Node, args: list[Value]) -> Node:
        attrs = {name: self._for_rows(value) for name, value in node.attrs.items()}
        return node.rebuilt(args, attrs)

    def _for_rows(self, value: Any) -> Any:
        """An attribute, of as many rows as are drafted behind."""
        if isinstance(value, tuple):
            return tuple(map(self._for_rows, value))
        if not isinstance(value, sympy.Expr):
            return value
        found: Any = value.xreplace(self._rows)
        return dim(found)
