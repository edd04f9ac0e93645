"""What `ingot quantize` shows: a bar while it writes, then what was quantized and what was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..checkpoints.export_quantized import Exported


@contextmanager
def bar() -> Generator[Callable[[int, int], None]]:
    """A progress bar on stderr, where that is a terminal; told the bytes written and to write."""
    console = Console(stderr=True)
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        task = p.add_task("writing", total=None)
        yield lambda done, total: p.update(task, completed=done, total=total)


def exported_data(exported: Exported) -> dict[str, Any]:
    """The figures as JSON."""
    return {
        "directory": str(exported.directory),
        "format": exported.format,
        "bytes_before": exported.bytes_before,
        "bytes_after": exported.bytes_after,
        "quantized": list(exported.quantized),
        "kept": dict(exported.kept),
    }


def kept_table(exported: Exported) -> Table:
    """Why weights were kept, how many for each reason, and one of them."""
    table = Table("kept because", "weights", "such as", box=None, header_style="bold")
    first: dict[str, str] = {}
    for name, reason in exported.kept.items():
        first.setdefault(reason, name)
    for reason, count in Counter(exported.kept.values()).most_common():
        table.add_row(reason, str(count), first[reason])
    return table


def summary(exported: Exported) -> str:
    before, after = (b / 2**20 for b in (exported.bytes_before, exported.bytes_after))
    return (
        f"{exported.directory}: {len(exported.quantized)} weights in MXFP4 ({exported.format}), "
        f"{before:,.1f} MiB → {after:,.1f} MiB"
    )
