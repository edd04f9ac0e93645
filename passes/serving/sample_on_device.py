"""sample-on-device: the graph chooses the next tokens itself, and its logits need not leave it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...compiler.dtypes import FLOATS
from ...compiler.ir import Graph, Node, Value
from ...compiler.ops.leaf import param
from ...compiler.ops.pointwise import cast, log
from ...compiler.ops.reduce import amax, softmax
from ...compiler.ops.sampling import SETTINGS, WORD, sample
from ...compiler.ops.shape import full, gather, view
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Applied
from ...compiler.types import Dim, TensorType

# What the outputs of a serving graph are called; the first alone where the host samples, and no
# top ones where the op has no candidates. Behind them stands what is drafted, where something is.
OUTPUTS = ("logits", "token", "logprob", "top_tokens", "top_logprobs")
DRAFT = "draft"
# The parameter that says which token follows each, of a model that predicts the one behind it.
FOLLOWING = "following"


def output_names(graph: Graph) -> Sequence[str]:
    """The names of a serving graph's outputs, in order; ValueError where it has too many."""
    node = _sampling(graph)
    sampled = len(OUTPUTS) if node is None else 1 + len(node.types)
    names = (*OUTPUTS[:sampled], DRAFT)
    if not 1 <= len(graph.outputs) <= (len(OUTPUTS) if node is None else len(names)):
        raise ValueError(f"expected 1 to {len(OUTPUTS)} outputs, found {len(graph.outputs)}")
    return names[: len(graph.outputs)]


@dataclass(frozen=True)
class SampleOnDevice:
    """Beside its logits [L, V] a graph gives what `sample` chooses from them. What a model gives
    beside its logits to predict further tokens (see draft_next_tokens) comes behind.

    New parameters: those of the op, under its names for them (temperature, top_k, top_p, min_p,
    penalty, draw, seen and top). `candidates` is how many most likely tokens a row can be asked
    for, as far as there are tokens.
    """

    name: ClassVar[str] = "sample-on-device"
    candidates: int = 20

    def expected(self, graph: Graph) -> int:
        """1 while the graph does not sample."""
        return 0 if _sampling(graph) else 1

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        if node := _sampling(graph):
            context.log.decline(self.name, node, "the graph samples already")
            return graph
        logits, *others = graph.outputs
        vocab = logits.type.shape[-1] if logits.type.rank == 2 else None
        if (
            (others and not _drafts(graph))
            or not isinstance(vocab, int)
            or logits.type.dtype not in FLOATS
        ):
            outputs = ", ".join(str(o.type) for o in graph.outputs)
            context.log.decline(self.name, logits.node, f"expected logits [L, V], found {outputs}")
            return graph
        rows = logits.type.shape[0]
        given = [_param(name, "f32" if kind == "float" else kind, rows) for name, kind in SETTINGS]
        given.append(_param("seen", "i32", rows, -(-vocab // WORD)))
        given.append(_param("top", "i32", rows))
        chosen = sample.all(logits, *given, candidates=min(self.candidates, vocab))
        context.log.counts[self.name] += 1
        outputs = (logits, *chosen, *others)
        after = Graph(graph.name, (*graph.params, *given), outputs, graph.symbols, graph.updates)
        reason = "parameters and outputs are new"
        return context.log.declare(graph, after, reason, claims=_claims(after, len(chosen)))


def _claims(after: Graph, count: int) -> tuple[Applied, ...]:
    """At temperature 0 and without penalties the first of `count` outputs behind the logits is a
    most likely token, and no others are given where none are asked for."""
    logits, token, logprob, *top = after.outputs[: 1 + count]
    one: dict[Value, Any] = {after.param(n): "zeros" for n in ("temperature", "seen", "top")}
    likely = log(softmax(cast(logits, dtype="f32"), dim=1))
    largest = amax(likely, dim=1, keepdim=False)
    (rows,) = token.type.shape
    index = cast(view(token, shape=(rows, 1)), dtype="i64")
    chosen = view(gather(likely, index, dim=1), shape=(rows,))
    claims = [(largest, logprob), (largest, chosen)]
    if top:
        _, others = top
        claims.append((full(value=0.0, shape=others.type.shape, dtype="f32"), others))
    expected, found = zip(*claims, strict=True)
    return (Applied("greedy-sample", (logits,), expected, found, one),)


def _param(name: str, dtype: str, *shape: Dim) -> Value:
    return param(name=name, type=TensorType(dtype, shape))


def _drafts(graph: Graph) -> bool:
    """Whether what a graph has beside its logits is there to draft."""
    *_, last = graph.outputs
    (rows, *_) = graph.outputs[0].type.shape
    alone = len(graph.outputs) == 2 and last.type == TensorType("i32", (rows,))
    return alone or any(p.attrs["name"] == FOLLOWING for p in graph.params)


def _sampling(graph: Graph) -> Node | None:
    return next((n for n in graph.nodes() if n.op is sample), None)
