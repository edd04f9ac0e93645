"""`ingot quantize`: writes a checkpoint in MXFP4 and lists quantized and kept weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..flags import Directory
from ..output import Shown, table

if TYPE_CHECKING:
    from ...checkpoints.export_quantized import Exported


def command(
    directory: Directory,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR2", help="New directory to write.")
    ],
    scale: Annotated[
        str, typer.Option(help="Rule of the scales: mse, even, floor, rceil or ceil.")
    ] = "mse",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Glob of weights to leave as they are; may be repeated."),
    ] = None,
) -> Shown:
    """Write a model with its weights in MXFP4, for transformers and Ingot to read.

    The format is compressed-tensors, or for a gpt-oss its own.
    """
    from ....passes.transforms.mxfp4_policy import MXFP4
    from ...checkpoints.export_quantized import quantize_directory

    options = MXFP4(scale=scale, keep=tuple(keep or ()))
    with _bar() as progress:
        exported = quantize_directory(directory, output, options, progress=progress)
    data = {**vars(exported), "directory": str(exported.directory), "kept": dict(exported.kept)}
    return Shown(lambda: data, [_kept_table(exported), [_summary(exported)]])


@contextmanager
def _bar() -> Generator[Callable[[int, int], None]]:
    """A progress bar on stderr if it is a terminal; gets the bytes written and the total."""
    console = Console(stderr=True)
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        task = p.add_task("writing", total=None)
        yield lambda done, total: p.update(task, completed=done, total=total)


def _kept_table(exported: Exported) -> Table:
    """Why weights were kept, how many for each reason, and one of them."""
    first: dict[str, str] = {}
    for name, reason in exported.kept.items():
        first.setdefault(reason, name)
    counts = Counter(exported.kept.values()).most_common()
    rows = [[reason, str(count), first[reason]] for reason, count in counts]
    return table("Kept", ["kept because", "weights", "such as"], rows, right=(1,))


def _summary(exported: Exported) -> str:
    before, after = (b / 2**20 for b in (exported.bytes_before, exported.bytes_after))
    return (
        f"{exported.directory}: {len(exported.quantized)} weights in MXFP4 ({exported.format}), "
        f"{before:,.1f} MiB → {after:,.1f} MiB"
    )
