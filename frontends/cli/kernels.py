"""`ingot inspect --kernels`: the launches of an entry by layer, and resource usage of kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.table import Table

from .launches import LaunchSection, PlannedEntry, StaticReport, sections, spilled, static_report
from .output import table

_NOT_RUN = (
    "code for AMD is built and checked statically: no kernel of Ingot has been executed on AMD "
    "hardware"
)
_NO_REASONS = (
    "the reasons for each kernel are known when a model is compiled: ingot inspect DIR --kernels"
)


def kernel_data(step: PlannedEntry) -> dict[str, Any]:
    """The launches and kernels of one entry for `--json`."""
    return {
        "entry": step.entry.name,
        "launches": len(step.entry.launches),
        "sections": [
            {
                "title": s.title,
                "layers": list(s.layers),
                "launches": [{**asdict(line), "grid": list(line.grid)} for line in s.lines],
            }
            for s in sections(step)
        ],
        "other_entries": {e.name: len(e.launches) for e in step.others},
        "static": static_data(static_report(step.program, [step.entry])),
    }


def static_data(report: StaticReport) -> dict[str, Any]:
    """The static report for `--json`."""
    return {
        "target": report.target,
        "shared_limit": report.shared_limit,
        "kernels": [asdict(kernel) for kernel in report.kernels],
        "ok": report.ok,
        "verdict": report.verdict,
        "note": note(report.target),
    }


def note(target: str) -> str | None:
    """The caveat for code that was never executed on its hardware, if any."""
    return _NOT_RUN if target.startswith("hip") else None


def launch_tables(step: PlannedEntry) -> Iterable[Table]:
    """Tables of the launches, each distinct layer once; then a summary."""
    found, entry = sections(step), step.entry
    known = bool(step.choices)
    for s in found:
        rows: list[list[str]] = []
        for line in s.lines:
            grid = "×".join(map(str, line.grid))
            # The estimate and the reason are for the whole op: shown once.
            last = ["", ""]
            if line.seconds is not None:
                last = [f"{line.seconds * 1e6:.1f}", line.why or ""]
            rows.append([line.op, line.place, line.kernel, grid, *(last if known else ())])
        heads = ["op", "of", "kernel", "grid", *(("µs", "why") if known else ())]
        yield table(f"{s.title}: {len(s.lines)} launches", heads, rows, right=(4,))
    yield table(
        f"Launches of {entry.name}",
        ["", "launches", "times", "in all"],
        [*map(_counted, found), ["a step", "", "", str(len(entry.launches))]],
        right=(1, 2, 3),
    )
    others = [[e.name, str(len(e.launches))] for e in step.others]
    if others:
        yield table("Other entries", ["entry", "launches a step"], others, right=(1,))


def _counted(section: LaunchSection) -> list[str]:
    times, each = max(len(section.layers), 1), len(section.lines)
    return [section.title, str(each), str(times), str(each * times)]


def static_table(report: StaticReport, title: str) -> Table:
    """Resource usage of every kernel, most launched first."""
    shared = "LDS" if report.target.startswith("hip") else "shared"
    heads = ["kernel", "for", "launches", "warps", "registers", "spilled"]
    heads += [f"{shared}, of {report.shared_limit:,}", "matrix"]
    rows = [
        [
            k.symbol,
            ", ".join(k.ops),
            str(k.launches),
            str(k.num_warps),
            "" if k.registers is None else str(k.registers),
            spilled(k, report.target),
            f"{k.shared:,}",
            ", ".join(f"{n} {count}" for n, count in k.matrix.items()),
        ]
        for k in report.kernels
    ]
    return table(title, heads, rows, right=(2, 3, 4, 5, 6))


def static_lines(report: StaticReport) -> list[str]:
    """The verdict and its caveat, if any."""
    said = note(report.target)
    return [f"{report.target}: {report.verdict}", *([said] if said else [])]


def kernel_page(step: PlannedEntry) -> tuple[list[Table], list[str]]:
    """Tables and last lines of `--kernels`."""
    report = static_report(step.program, [step.entry])
    title = f"Kernels of {step.entry.name}, as built for {report.target}"
    tables = [*launch_tables(step), static_table(report, title)]
    lines = [] if step.choices else [_NO_REASONS]
    return tables, [*lines, *static_lines(report)]
