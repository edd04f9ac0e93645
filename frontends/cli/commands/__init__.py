"""The commands, one file each with a function `command`, which `main` registers.

`compile`, `run`, `chat`, `inspect`, `verify`, `explain`, `bench`, `tune`, `quantize` and `doctor`.
A parameter whose default are options becomes a flag for each of their fields; a command that gives
`Shown` has `--json`. Heavy imports are inside the functions, so that `ingot --help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable

from ..output import Shown
from . import bench, chat, compile, doctor, explain, inspect, quantize, run, tune, verify

# In the order of the help.
COMMANDS: dict[str, Callable[..., Shown | None]] = {
    module.__name__.rpartition(".")[2]: module.command
    for module in (
        compile,
        run,
        chat,
        inspect,
        verify,
        explain,
        bench,
        tune,
        quantize,
        doctor,
    )
}
