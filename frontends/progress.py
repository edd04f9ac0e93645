"""The progress shown while a model is compiled: one line on stderr, gone when it is done."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.status import Status


class Progress:
    """Shows the stage at hand with a spinner, if `enabled` and stderr is a terminal."""

    def __init__(self, *, enabled: bool) -> None:
        console = Console(stderr=True)
        shown = enabled and console.is_terminal
        self._status = Status("compiling", console=console) if shown else None

    def __enter__(self) -> Progress:
        if self._status:
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status:
            self._status.stop()

    def stage(self, name: str) -> None:
        """Say what happens now."""
        if self._status:
            self._status.update(f"compiling: {name}")
