"""feed-next-step: a step leaves the inputs of the next, so that decoding goes on by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...compiler.ir import Graph, Node
from ...compiler.ops.feed import feed
from ...compiler.ops.leaf import param
from ...compiler.ops.sampling import sample
from ...compiler.pipeline import PassContext
from ...compiler.types import TensorType

_STEP = ("tokens", "positions", "slots", "logit_rows")


@dataclass(frozen=True)
class FeedNextStep:
    """Tokens, positions, draws and what was seen become what a decoding step needs next.

    New parameters: seed i64[L] and prompt i32[L], the tokens before the first that is drawn. A
    graph that samples in a serving step is fed; its outputs stay what they are.
    """

    name: ClassVar[str] = "feed-next-step"

    def expected(self, graph: Graph) -> int:
        """1 for a graph that samples and is not fed."""
        return int(_sampling(graph) is not None and not graph.fed)

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        if (node := _sampling(graph)) is None or graph.fed:
            reason = "the graph feeds itself already" if graph.fed else "it does not sample"
            context.log.decline(self.name, graph.outputs[0].node, reason)
            return graph
        draw, seen = node.operands["draw"], node.operands["seen"]
        token = node.results[0]
        tokens, positions, slots, rows = map(graph.param, _STEP)
        shape = token.type.shape
        seed = param(name="seed", type=TensorType("i64", shape))
        prompt = param(name="prompt", type=TensorType("i32", shape))
        fed = (tokens, positions, draw, seen)
        nexts = feed.all(*fed, slots, rows, token, seed, prompt)
        names = (p.attrs["name"] for p in fed)
        context.log.counts[self.name] += 1
        after = Graph(
            graph.name,
            (*graph.params, seed, prompt),
            graph.outputs,
            graph.symbols,
            {**graph.updates, **dict(zip(names, nexts, strict=True))},
        )
        return context.log.declare(graph, after, "inputs are updated")


def _sampling(graph: Graph) -> Node | None:
    return next((n for n in graph.nodes() if n.op is sample), None)
