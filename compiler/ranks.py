"""The ranks of a tensor-parallel run in one process: for tests, and where no group is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar

import torch

from .interpret import Results, interpret
from .ir import Graph
from .ops.collective import Communicator
from .weights import Weights

R = TypeVar("R")
# A rank that waits longer than this for the others will wait for ever.
_SECONDS = 120.0


@dataclass(frozen=True)
class Echo:
    """Ranks that all hold what this one holds: enough to compute with a collective alone."""

    ranks: int
    rank: int = 0

    def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x] * self.ranks


@dataclass(frozen=True)
class _Table:
    """Where threads, one a rank, lay what they exchange."""

    ranks: int
    barrier: Barrier
    given: list[Any] = field(default_factory=list[Any])


@dataclass(frozen=True)
class _Seat:
    """One rank's place at the table."""

    table: _Table
    rank: int

    @property
    def ranks(self) -> int:
        return self.table.ranks

    def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        """RuntimeError when the ranks give tensors of several types, or not all of them come."""
        given = self.table.given
        given[self.rank] = x
        self.table.barrier.wait()
        found = list(given)
        self.table.barrier.wait()
        if len({(g.dtype, g.shape) for g in found}) > 1:
            shown = ", ".join(f"{g.dtype}{list(g.shape)}" for g in found)
            raise RuntimeError(f"the ranks exchange tensors of different types: {shown}")
        return found


def run_ranks(jobs: Sequence[Callable[[Communicator], R]]) -> list[R]:
    """Run one job a rank in threads, each with its end of the line; results in order.

    An exception of any rank ends them all and is raised.
    """
    ranks = len(jobs)
    table = _Table(ranks, Barrier(ranks, timeout=_SECONDS), [None] * ranks)

    def run(rank: int) -> R:
        try:
            return jobs[rank](_Seat(table, rank))
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
    errors = [e for f in futures if (e := f.exception()) is not None]
    # Those that were waiting for the one that failed have nothing to tell.
    for error in sorted(errors, key=lambda e: isinstance(e, BrokenBarrierError)):
        raise error
    return [f.result() for f in futures]


def interpret_ranks(
    graphs: Sequence[Graph],
    inputs: Mapping[str, torch.Tensor] | Sequence[Mapping[str, torch.Tensor]],
    weights: Weights | None = None,
) -> list[Results]:
    """`interpret` of one graph a rank, all at once, each with the same `inputs` or its own."""
    each = [inputs] * len(graphs) if isinstance(inputs, Mapping) else inputs

    def job(graph: Graph, given: Mapping[str, torch.Tensor]) -> Callable[[Communicator], Results]:
        return lambda communicator: interpret(graph, given, weights, communicator)

    return run_ranks([job(g, i) for g, i in zip(graphs, each, strict=True)])
