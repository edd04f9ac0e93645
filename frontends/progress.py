"""The progress shown while a model is compiled: one line on stderr, gone when it is done."""

from __future__ import annotations

from types import TracebackType

from rich import progress
from rich.console import Console


class Progress:
    """Shows the stage at hand, and how far it is, if `enabled` and stderr is a terminal."""

    def __init__(self, *, enabled: bool) -> None:
        console = Console(stderr=True)
        self._bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task("compiling", total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def stage(self, name: str) -> None:
        """Say what happens now."""
        self._bar.reset(self._task, total=None, description=f"compiling: {name}")

    def expect(self, steps: int) -> None:
        """The stage at hand has this many steps."""
        self._bar.update(self._task, total=steps, completed=0)

    def count(self, done: int, steps: int) -> None:
        """So many of so many steps are done."""
        self._bar.update(self._task, total=steps, completed=done)

    def advance(self) -> None:
        """One step is done."""
        self._bar.advance(self._task)
