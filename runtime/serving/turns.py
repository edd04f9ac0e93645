"""Turns: several threads share what one at a time may look at, and one at a time may work on."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Condition, Lock, get_ident


class Turns:
    """A lock, and the right to work under it, which lasts while the lock is let go.

    With the lock held (`held`) a thread looks at things and changes what all may change. One at a
    time is at work (`working`, `turn`), and lets the others hold the lock (`aside`) while it waits
    for a device. What needs no haste (`turn`) comes after all who wait to work.

    RuntimeError for a thread that holds the lock or works already: a signal handler or a finalizer
    that interrupted it would see things half done.
    """

    def __init__(self, between: Callable[[], None]) -> None:
        """`between` runs with the lock held whenever nobody is at work: before others see it."""
        self._between = between
        self._changed = Condition(Lock())
        self._holder: int | None = None
        self._worker: int | None = None
        self._waiting = 0

    @contextmanager
    def held(self) -> Generator[None]:
        """Hold the lock."""
        self._refuse_reentry()
        with self._changed:
            yield from self._holding()

    def try_between(self) -> None:
        """Run `between` if it can be now; else whoever is at it does when that ends."""
        if self._changed.acquire(blocking=False):
            try:
                for _ in self._holding():
                    pass
            finally:
                self._changed.release()

    @contextmanager
    def working(self) -> Generator[None]:
        """Be at work, as soon as nobody else is."""
        with self.held():
            self._waiting += 1
            try:
                while self._worker is not None:
                    self._wait()
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            with self._at_work():
                yield

    @contextmanager
    def turn(self) -> Generator[bool]:
        """Within `held`: be at work, or wait until something changed where another is or will be.

        Gives which of the two.
        """
        if self._worker is not None or self._waiting:
            self._wait()
            yield False
            return
        with self._at_work():
            yield True

    @contextmanager
    def aside(self) -> Generator[None]:
        """At work: let others hold the lock meanwhile."""
        self._holder = None
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()
            self._holder = get_ident()

    def _refuse_reentry(self) -> None:
        if get_ident() in (self._holder, self._worker):
            raise RuntimeError(
                "a session was called in the middle of one of its calls in the same thread (by a "
                "signal handler, say); call it from another thread, or after"
            )

    def _holding(self) -> Generator[None]:
        self._holder = get_ident()
        try:
            if self._worker is None:
                self._between()
            yield
        finally:
            self._holder = None

    def _wait(self) -> None:
        self._holder = None
        try:
            self._changed.wait()
        finally:
            self._holder = get_ident()

    @contextmanager
    def _at_work(self) -> Generator[None]:
        self._worker = get_ident()
        try:
            yield
        finally:
            self._worker = None
            self._changed.notify_all()
            self._between()
