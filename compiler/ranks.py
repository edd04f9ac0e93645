"""The ranks of a tensor-parallel run: threads of one process that exchange tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
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
class _Seat:
    """One rank's end of an exchange; `given` has a place for each."""

    rank: int
    barrier: Barrier
    given: list[Any]

    @property
    def ranks(self) -> int:
        return len(self.given)

    def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        """RuntimeError when the ranks give tensors of several types, or not all of them come."""
        self.given[self.rank] = x
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        if len({(g.dtype, g.shape) for g in found}) > 1:
            shown = ", ".join(f"{g.dtype}{list(g.shape)}" for g in found)
            raise RuntimeError(f"the ranks exchange tensors of different types: {shown}")
        return found


class RankThreads:
    """A thread for each of some ranks, which run jobs together. An error of one ends the jobs of
    all."""

    def __init__(self, ranks: int) -> None:
        self._pool = ThreadPoolExecutor(ranks, "rank")
        self._barrier = Barrier(ranks, timeout=_SECONDS)
        given = [None] * ranks
        self._seats = [_Seat(rank, self._barrier, given) for rank in range(ranks)]
        self._running: list[Future[Any]] = []

    def run(self, jobs: Sequence[Callable[[Communicator], R]]) -> list[R]:
        """What one job a rank gives, called with its end of the line, in the order of ranks.

        An exception of any rank is raised, that which came first if others only waited for it.
        """
        wait(self._running)  # of a run that a KeyboardInterrupt broke off
        self._barrier.reset()  # nobody waits; a run that failed left it broken
        futures = self._running = list[Future[Any]]()
        try:
            for job, seat in zip(jobs, self._seats, strict=True):
                futures.append(self._pool.submit(self._job, job, seat))
        except BaseException:
            self._barrier.abort()  # some may wait for what was never started
            raise
        wait(futures)
        errors = [e for f in futures if (e := f.exception()) is not None]
        # Those that were waiting for the one that failed have nothing to tell.
        for error in sorted(errors, key=lambda e: isinstance(e, BrokenBarrierError)):
            raise error
        return [f.result() for f in futures]

    def close(self) -> None:
        """End the threads."""
        self._barrier.abort()
        self._pool.shutdown()

    def _job(self, job: Callable[[Communicator], R], seat: _Seat) -> R:
        try:
            return job(seat)
        except BaseException:
            self._barrier.abort()
            raise


def run_ranks(jobs: Sequence[Callable[[Communicator], R]]) -> list[R]:
    """Run one job a rank, once; see RankThreads.run."""
    threads = RankThreads(len(jobs))
    try:
        return threads.run(jobs)
    finally:
        threads.close()


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
