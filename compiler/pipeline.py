"""Running passes in order: each is verified, timed and reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar, Protocol

from .ir import Graph
from .rewrite import Applied, Log
from .types import VerifyError
from .verify import verify


class Pass(Protocol):
    """A frozen dataclass whose fields are its options. Graph to Graph; reports into the log.

    A pass that is there for something that can be counted also has `expected(graph) -> int`: in how
    many places of `graph` it is still to be rewritten.
    """

    name: ClassVar[str]

    def __call__(self, graph: Graph, log: Log) -> Graph: ...


@dataclass(frozen=True)
class PassResult:
    """What one pass did, and the graph it left behind.

    `expected` counts the places that the pass is there for, `found` those of them that it rewrote;
    None for a pass that does not count them.
    """

    name: str
    graph: Graph
    matches: Counter[str]
    declined: tuple[str, ...]
    nodes_before: int
    nodes_after: int
    seconds: float
    notes: tuple[str, ...] = ()
    expected: int | None = None
    found: int | None = None


class PassError(Exception):
    """A pass broke the graph, or was required to match and did not."""


def count_nodes(graph: Graph) -> int:
    """Nodes that run: parameters and what depends on weights and literals alone do not."""
    folded = graph.constants()
    return sum(n.op.name != "param" and n not in folded for n in graph.nodes())


def _count(step: Pass, graph: Graph) -> int | None:
    expected: Callable[[Graph], int] | None = getattr(step, "expected", None)
    return expected(graph) if expected else None


def _check(check: Callable[[Graph, Applied], None], name: str, graph: Graph, log: Log) -> None:
    for applied in log.applied:
        try:
            check(graph, applied)
        except VerifyError as error:
            raise PassError(f"pass {name}: {error}") from error


def run_pipeline(
    graph: Graph,
    passes: Sequence[Pass],
    *,
    require_match: Sequence[str] = (),
    check: Callable[[Graph, Applied], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[PassResult]:
    """Apply `passes` in order and verify the graph after each.

    `require_match` names passes that must rewrite something. `check` is called with every rewrite
    that a pass logged and raises VerifyError when the two sides differ. `progress` hears each
    pass's name before it runs. PassError names the pass and, if it matched nothing, its nearest
    misses; ValueError a required pass that is not among `passes`.
    """
    if absent := set(require_match) - {step.name for step in passes}:
        raise ValueError(f"required to match, but not in the pipeline: {', '.join(sorted(absent))}")
    results: list[PassResult] = []
    before = count_nodes(graph)
    for step in passes:
        if progress:
            progress(step.name)
        start, log = perf_counter(), Log()
        try:
            after = step(graph, log)
            verify(after)
        except (VerifyError, ValueError, RuntimeError) as error:
            raise PassError(f"pass {step.name}: {error}") from error
        if check:
            _check(check, step.name, graph, log)
        if step.name in require_match and not log.matches:
            nearest = list(dict.fromkeys(log.declined))[:5]
            misses = "\n  ".join(nearest) or "nothing came near"
            raise PassError(f"pass {step.name} was required but matched nothing:\n  {misses}")
        nodes = count_nodes(after)
        seconds = perf_counter() - start
        declined = tuple(dict.fromkeys(log.declined))
        expected, left = (_count(step, g) for g in (graph, after))
        results.append(
            PassResult(
                step.name,
                after,
                log.matches,
                declined,
                before,
                nodes,
                seconds,
                tuple(log.notes),
                expected,
                None if expected is None or left is None else expected - left,
            )
        )
        graph, before = after, nodes
    return results
