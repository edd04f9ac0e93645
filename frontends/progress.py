"""The progress line on stderr while a model is compiled; erased at the end."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from time import perf_counter

from rich import progress
from rich.console import Console


class Progress(progress.Progress):
    """Shows the stage at hand, and how far it is, if `enabled` and stderr is a terminal.

    `seconds` is the wall time of each stage that was timed.
    """

    def __init__(self, *, enabled: bool) -> None:
        console = Console(stderr=True)
        super().__init__(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self._stage = self.add_task("compiling", total=None)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Generator[None]:
        """A stage, shown and timed."""
        self.stage(name)
        start = perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def stage(self, name: str) -> None:
        """Show the name of a new stage."""
        self.reset(self._stage, total=None, description=f"compiling: {name}")

    def count(self, done: int, steps: int) -> None:
        """Show that `done` of `total` steps of the stage are done."""
        self.update(self._stage, total=steps, completed=done)

    def done(self) -> None:
        """Count one more step as done."""
        self.advance(self._stage)
