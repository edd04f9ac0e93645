"""Running passes in order: each is verified, timed and reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, ClassVar, Protocol

import torch

from .ir import Graph, Node
from .rewrite import Applied, Log
from .target import Target
from .types import VerifyError
from .verify import excerpt, verify
from .weights import Entry, Weights


class Calibration(Protocol):
    """Texts over which a pass may run the model, and a place for what it computes from them."""

    def sequences(
        self, texts: Sequence[str | Sequence[int]], vocab_size: int
    ) -> Sequence[Sequence[int]]:
        """`texts` as token ids; ValueError for what the model cannot read."""
        ...

    def spool(self) -> Callable[[str, torch.Tensor], Entry]:
        """Stores tensors under names, out of memory, for as long as their entries are held."""
        ...

    def expect(self, matrices: int) -> None:
        """Told before the work: `advance` will be called so often."""
        ...

    def advance(self) -> None: ...


@dataclass
class PassContext:
    """What a pass gets beside the graph, and where it reports.

    `weights` are those that constants name (None where only the graph is known); a pass that makes
    new ones replaces the store. `facts` holds, by the name of the pass, what a pass found out that
    others need. `log` is of one pass.
    """

    target: Target | None = None
    weights: Weights | None = None
    calibration: Calibration | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    log: Log = field(default_factory=Log)


class Pass(Protocol):
    """A frozen dataclass whose fields are its options. Graph to Graph; reports into the context.

    A pass that is there for something that can be counted also has `expected(graph) -> int`: in how
    many places of `graph` it is still to be rewritten.
    """

    name: ClassVar[str]

    def __call__(self, graph: Graph, context: PassContext) -> Graph: ...


@dataclass(frozen=True)
class PassResult:
    """What one pass did, and the graph it left behind.

    `expected` counts the places that the pass is there for, `found` those of them that it rewrote;
    None for a pass that does not count them. `unchecked` says what it changed otherwise than by
    rewrites, and why.
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
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """What may not be left in a graph once a stage of a pipeline is done.

    `over` is the name of its last pass; `left` gives the nodes that should be gone, and why.
    """

    name: str
    over: str
    left: Callable[[Graph], Iterator[tuple[Node, str]]]


class PassError(Exception):
    """A pass broke the graph, or was required to match and did not."""


def count_nodes(graph: Graph) -> int:
    """Nodes that run: parameters and what depends on weights and literals alone do not."""
    folded = graph.constants()
    return sum(n.op.name != "param" and n not in folded for n in graph.nodes())


def _count(step: Pass, graph: Graph) -> int | None:
    expected: Callable[[Graph], int] | None = getattr(step, "expected", None)
    return expected(graph) if expected else None


def _check_left(stage: Stage, done: str, graph: Graph) -> None:
    for node, reason in stage.left(graph) if stage.over == done else ():
        place = f" at {node.source}" if node.source else ""
        raise PassError(
            f"after {done}, stage {stage.name}: {node.op.name}{place} is left: {reason}\n"
            f"{excerpt(graph, node)}"
        )


def run_pipeline(
    graph: Graph,
    passes: Sequence[Pass],
    context: PassContext | None = None,
    *,
    require_match: Sequence[str] = (),
    check: Callable[[Graph, Applied], None] | None = None,
    progress: Callable[[str], None] | None = None,
    stages: Sequence[Stage] = (),
) -> list[PassResult]:
    """Apply `passes` in order and verify the graph after each.

    A graph that a pass did not make by rewrites that it logged, or by a change that it declared
    with a reason, is an error (see Log). `require_match` names passes that must rewrite something.
    `check` is called with every rewrite that a pass logged or claimed and raises VerifyError when
    the two sides differ. `progress` hears each pass's name before it runs. A node that one of
    `stages` wants gone, and that is there when its last pass is done, is an error that names both.
    PassError names the pass
    and, if it matched nothing, its nearest misses; ValueError a required pass that is not among
    `passes`.
    """
    if absent := set(require_match) - {step.name for step in passes}:
        raise ValueError(f"required to match, but not in the pipeline: {', '.join(sorted(absent))}")
    context = context or PassContext()
    results: list[PassResult] = []
    before = count_nodes(graph)
    for step in passes:
        if progress:
            progress(step.name)
        start = perf_counter()
        log = context.log = Log()
        try:
            after = step(graph, context)
            verify(after)
            steps = log.path(graph, after)
            if check:
                for done in steps:
                    for applied in done.applied:
                        check(done.before, applied)
        except (VerifyError, ValueError, RuntimeError) as error:
            raise PassError(f"pass {step.name}: {error}") from error
        for stage in stages:
            _check_left(stage, step.name, after)
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
                tuple(dict.fromkeys(done.reason for done in steps if done.reason)),
            )
        )
        graph, before = after, nodes
    return results
