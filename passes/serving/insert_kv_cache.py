"""insert-kv-cache: attention over one sequence becomes attention over a paged cache of many.

Because every other op is token-wise, the graph then serves any mix of tokens: prefill (T tokens of
one slot), decode (one token of each slot), verification of drafts (k + 1 tokens of a slot).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...compiler.ir import Graph, Node, Op, Value
from ...compiler.ops.attention import attention, cached_attention, kv_append
from ...compiler.ops.leaf import param
from ...compiler.ops.mla import cached_mla_attention, mla_attention
from ...compiler.ops.shape import take, view
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Applied
from ...compiler.types import TensorType, symbol
from .token_wise import mixes_tokens

# Attention over one sequence: the op that serves it from caches, and the names of those. Their rows
# are as many operands, after the queries.
_CACHED: dict[Op, tuple[Op, tuple[str, ...], int]] = {
    attention: (cached_attention, ("k_cache", "v_cache"), 1),
    mla_attention: (cached_mla_attention, ("latent_cache",), 2),
}


class CannotCache(Exception):
    """The graph has a node that cannot serve from a causal cache; says which and why."""


@dataclass(frozen=True)
class InsertKvCache:
    """attention(q, k, v) -> kv_append and cached_attention, with the caches as state.

    New parameters: slots i32[T], page_table i32[max_sequences, pages a slot], logit_rows i32[L],
    and k_cache.i, v_cache.i [pages, page_size, G, D] of layer i, or where it has mla_attention
    latent_cache.i [pages, page_size, R + P]. Token t attends to its slot's cache up to
    positions[t]; windows, sinks and soft caps are kept. Output j is row logit_rows[j]. `pages` None
    gives every slot its full length. The context's facts get the sizes that a session needs.
    """

    name: ClassVar[str] = "insert-kv-cache"
    max_sequences: int = 8
    max_tokens_per_sequence: int = 4096
    page_size: int = 64
    pages: int | None = None

    @property
    def pages_per_slot(self) -> int:
        return -(-self.max_tokens_per_sequence // self.page_size)

    @property
    def _pages(self) -> int:
        return self.pages or self.max_sequences * self.pages_per_slot

    def expected(self, graph: Graph) -> int:
        """Attentions over the tokens of one sequence."""
        return sum(n.op in _CACHED for n in graph.nodes())

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        nodes = [n for n in graph.nodes() if n.op in _CACHED]
        positions = graph.param("positions")
        tokens = positions.type
        slots = param(name="slots", type=tokens)
        table_type = TensorType("i32", (self.max_sequences, self.pages_per_slot))
        page_table = param(name="page_table", type=table_type)
        rows = param(name="logit_rows", type=TensorType("i32", (symbol("L"),)))
        index = (slots, positions, page_table)
        _refuse_mixing(graph, str(tokens.shape[0]))
        # Tokens 0, 1, … of one sequence, in a cache of which nothing was written before.
        one: dict[Value, Any] = dict.fromkeys((positions, page_table, rows), "index")
        one[slots] = "zeros"
        caches: dict[str, Value] = {}
        params: list[Value] = []
        held: dict[str, Value] = {}
        applied: list[Applied] = []
        for i, node in enumerate(nodes):
            reason = _refusal(node, tokens)
            if reason:
                raise CannotCache(f"{node.op.name} at {node.source or f'number {i}'}: {reason}")
            cached, names, first = _CACHED[node.op]
            end = first + len(names)
            queries, written = node.args[:first], node.args[first:end]
            empty = tuple(self._cache(f"{n}.{i}", x) for n, x in zip(names, written, strict=True))
            appended = kv_append.node((*empty, *written, *index), {}, node.source).results
            _, optional = node.taken(node.args)
            attrs = {key: value for key, value in node.attrs.items() if key != "causal"}
            args = (*queries, *appended, *index)
            (out,) = cached.node(args, {**optional, **attrs}, node.source).results
            params.extend(empty)
            caches.update(zip((c.attrs["name"] for c in empty), appended, strict=True))
            held.update(zip((c.attrs["name"] for c in empty), written, strict=True))
            applied.append(Applied("cache", node.args, (Value(node),), (out,), one))
        outputs = tuple(take(o, rows) for o in graph.outputs)
        # A step takes one token of every sequence at least, even where sequences are shorter.
        most = range(1, max(self.max_tokens_per_sequence, self.max_sequences) + 1)
        symbols = {**graph.symbols, str(tokens.shape[0]): most, "L": most}
        everything = (*graph.params, slots, page_table, rows, *params)
        serving = Graph(graph.name, everything, outputs, symbols, caches)
        # What is put out and what the caches hold, of the values that there were before.
        claims = [
            Applied("logit-rows", (old,), (old,), (new,), one)
            for old, new in zip(graph.outputs, serving.outputs, strict=True)
        ]
        claims += [
            Applied(
                "written-rows", (x,), (x,), (_first_rows(serving.updates[name], x, positions),), one
            )
            for name, x in held.items()
        ]
        context.facts[self.name] = {
            "vocab_size": graph.outputs[0].type.shape[-1],
            "page_size": self.page_size,
            "max_sequences": self.max_sequences,
            "max_tokens_per_sequence": self.max_tokens_per_sequence,
            "pages": self._pages,
        }
        reason = "parameters, outputs and state are new"
        serving = context.log.declare(graph, serving, reason, claims=claims)
        return context.log.apply(serving, applied)

    def _cache(self, name: str, rows: Value) -> Value:
        shape = (self._pages, self.page_size, *rows.type.shape[1:])
        return param(name=name, type=TensorType(rows.type.dtype, shape))


def _first_rows(cache: Value, like: Value, positions: Value) -> Value:
    """The rows of the first tokens of the first slot, where the page table counts from 0."""
    pages, size, *_ = cache.type.shape
    return take(view(cache, shape=(pages * size, *like.type.shape[1:])), positions)


def _refuse_mixing(graph: Graph, tokens: str) -> None:
    """CannotCache where something else than attention takes tokens together."""
    for node in graph.nodes():
        if node.op not in _CACHED and (reason := mixes_tokens(node, tokens)):
            raise CannotCache(f"{node.op.name} at {node.source or 'an unknown place'}: {reason}")


def _refusal(node: Node, tokens: TensorType) -> str | None:
    if not node.attrs.get("causal", True):
        return "it is not causal"
    lengths = {a.type.shape[0] for a in node.args[:3]}
    if lengths != set(tokens.shape):
        return f"it is over {lengths} rows, not the {tokens.shape[0]} tokens of the graph"
    return None
