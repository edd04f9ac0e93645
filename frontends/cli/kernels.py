"""`ingot inspect --kernels`: the launches of an entry by layer, and resource usage of kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from ..launches import PlannedEntry, sections, spilled, static_report
from .output import table

_NO_REASONS = (
    "the reasons for each kernel are known when a model is compiled: ingot inspect DIR --kernels"
)


def kernel_data(step: PlannedEntry) -> dict[str, Any]:
    """The launches and kernels of one entry for `--json`."""
    return {
        "entry": step.entry.name,
        "launches": len(step.entry.launches),
        "sections": [asdict(section) for section in sections(step)],
        "other_entries": {e.name: len(e.launches) for e in step.others},
        "static": asdict(static_report(step.program, [step.entry])),
    }


def kernel_page(data: Mapping[str, Any]) -> tuple[list[Table], list[str]]:
    """Tables and last lines of `--kernels` from `kernel_data`: each distinct layer once."""
    tables: list[Table] = []
    counts: list[list[str]] = []
    known = any(line["why"] for s in data["sections"] for line in s["launches"])
    heads = ["op", "of", "kernel", "grid", *(["µs", "why"] if known else [])]
    for s in data["sections"]:
        rows: list[list[str]] = []
        for line in s["launches"]:
            grid = "×".join(map(str, line["grid"]))
            # The estimate and the reason are for the whole op: shown once.
            last = ["", ""]
            if line["seconds"] is not None:
                last = [f"{line['seconds'] * 1e6:.1f}", line["why"]]
            cells = [line["op"], line["place"], line["kernel"], grid, *last]
            rows.append(cells[: len(heads)])
        each, times = len(rows), max(len(s["layers"]), 1)
        tables.append(table(f"{s['title']}: {each} launches", heads, rows, right=(4,)))
        counts.append([s["title"], *map(str, (each, times, each * times))])
    counts.append(["a step", "", "", str(data["launches"])])
    heads = ["", "launches", "times", "in all"]
    tables.append(table(f"Launches of {data['entry']}", heads, counts, right=(1, 2, 3)))
    if others := [[name, str(count)] for name, count in data["other_entries"].items()]:
        tables.append(table("Other entries", ["entry", "launches a step"], others, right=(1,)))
    tables.append(static_table(data["static"], f"Kernels of {data['entry']}"))
    return tables, [*([] if known else [_NO_REASONS]), *static_lines(data["static"])]


def static_table(static: Mapping[str, Any], title: str) -> Table:
    """Resource usage of every kernel of a StaticReport, as data; most launched first."""
    target = static["target"]
    shared = "LDS" if target.startswith("hip") else "shared"
    heads = ["kernel", "for", "launches", "warps", "registers", "spilled"]
    heads += [f"{shared}, of {static['shared_limit']:,}", "matrix"]
    rows = [
        [
            k["symbol"],
            ", ".join(k["ops"]),
            str(k["launches"]),
            str(k["num_warps"]),
            "" if k["registers"] is None else str(k["registers"]),
            spilled(k["spills"], k["scalar_spills"], target),
            f"{k['shared']:,}",
            ", ".join(f"{n} {count}" for n, count in k["matrix"].items()),
        ]
        for k in static["kernels"]
    ]
    return table(f"{title}, as built for {target}", heads, rows, right=(2, 3, 4, 5, 6))


def static_lines(static: Mapping[str, Any]) -> list[str]:
    """The verdict and its caveat, if any."""
    return [f"{static['target']}: {static['verdict']}", *filter(None, [static["note"]])]
