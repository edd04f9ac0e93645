"""Where the time of a step goes, by prices: launches against the roofline, and what would help."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from ...codegen.entries import Choice
from ...codegen.prices import is_measured
from ...compiler.ir import Graph
from ...compiler.pipeline import PassResult
from ...compiler.target import Target
from ..launches import PlannedEntry, op_and_place
from .parts import place_of
from .traffic import NOTHING, traffic_by_label
from .workload import Workload

# As compiler.rewrite.Log has it; "@" begins the line of source that a node is from.
_DECLINED = re.compile(r"(?P<rule>\S+): (?P<op>\S+) at (?P<place>\S+)(?: @\S+)?: (?P<why>.*)")


@dataclass(frozen=True)
class Explained:
    """Nodes of one kind in a step: the same kernels for the same op in every layer.

    Microseconds are of one node: `priced`, as `select` compared it (`measured` says that every GEMM
    of it has a measured price), and `limit`, its bytes at the target's bandwidth on paper.
    `next_best` is the candidate that would have been second, `declined` what passes say of it.
    """

    op: str
    place: str
    kernels: tuple[str, ...]
    times: int
    priced: float
    measured: bool
    limit: float
    bytes: int
    why: str
    next_best: str
    declined: tuple[str, ...]

    @property
    def lost(self) -> float:
        """Microseconds of a step that a kernel at the limit would save."""
        return self.times * max(self.priced - self.limit, 0.0)


def explain(
    step: PlannedEntry, graph: Graph, passes: Iterable[PassResult], target: Target, work: Workload
) -> tuple[Explained, ...]:
    """Every kind of node of an entry whose choices are known, what loses most first."""
    traffic = traffic_by_label(graph, work)
    declined = _declined(passes)
    nodes = [*_nodes(step)]
    kinds: dict[tuple[str, str, tuple[str, ...]], list[tuple[str, Choice]]] = {}
    for label, choice in nodes:
        key = (op_and_place(label)[0], place_of(label), choice.kernels)
        kinds.setdefault(key, []).append((label, choice))
    found: list[Explained] = []
    for (op, place, kernels), mine in kinds.items():
        moved = sum(traffic.get(label, NOTHING).bytes for label in {label for label, _ in mine})
        _, first = mine[0]
        priced = [p for p in first.priced if p is not None]
        found.append(
            Explained(
                op,
                place,
                kernels,
                len(mine),
                1e6 * sum(choice.seconds for _, choice in mine) / len(mine),
                bool(priced) and all(is_measured(target, p) for p in priced),
                1e6 * moved / len(mine) / target.bytes_per_second,
                moved // len(mine),
                first.reason,
                first.runner_up,
                declined.get(place, ()),
            )
        )
    return tuple(sorted(found, key=attrgetter("lost"), reverse=True))


def _nodes(step: PlannedEntry) -> Iterator[tuple[str, Choice]]:
    """The label and the choice of each node of the entry, in order."""
    numbered = zip(step.entry.launches, step.choices, strict=True)
    for _, launches in groupby(numbered, key=lambda pair: id(pair[1])):
        launch, choice = next(launches)
        yield launch.label, choice


def _declined(passes: Iterable[PassResult]) -> Mapping[str, tuple[str, ...]]:
    """What passes declined, by the place of the node, each reason once."""
    found: dict[str, dict[str, None]] = {}
    for line in (line for done in passes for line in done.declined):
        if told := _DECLINED.match(line):
            place = place_of(f"{told['op']} {told['place']}")
            found.setdefault(place, {})[f"{told['rule']}: {told['why']}"] = None
    return {place: tuple(lines) for place, lines in found.items()}
