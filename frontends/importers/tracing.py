"""Tracing, by one thread at a time."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import RLock

_TRACING = RLock()


@contextmanager
def one_at_a_time() -> Generator[None]:
    """For a block or a function (`@one_at_a_time()`) that traces, or patches what is traced.

    torch.export and transformers keep the state of a trace where all threads of a process see it.
    """
    with _TRACING:
        yield
