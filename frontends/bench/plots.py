"""Pictures of a benchmark: bandwidths of launches, a timeline of the step, and a Perfetto trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .measure import Span, StepFigures
from .run import Result


def write_plots(result: Result, folder: Path) -> None:
    """Of the first step bandwidth.png, timeline.png and trace.json (ui.perfetto.dev)."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    step = result.measured.steps[0]
    _bandwidth(result, step, folder / "bandwidth.png")
    if step.timeline:
        _timeline(step, folder / "timeline.png")
        events = [*_trace_events(step.timeline)]
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ns"})
        (folder / "trace.json").write_text(text, encoding="utf-8")


def _bandwidth(result: Result, step: StepFigures, path: Path) -> None:
    """Each kind of launch: bytes that it must read, against the bytes a second that it reads."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    limit = result.rates.bytes_per_second
    axes.axhline(limit / 1e12, color="black", linewidth=1)
    axes.text(1.0, limit / 1e12, " read bandwidth", va="bottom", fontsize=8)
    for part in (part for part in step.parts if part.bytes):
        each = part.bytes / part.count
        rate = each / (1e-6 * part.microseconds)
        axes.scatter(each / 1e6, rate / 1e12, s=20 + 1500 * part.share, alpha=0.5)
        axes.annotate(f"{part.op} ×{part.count}", (each / 1e6, rate / 1e12), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="MB that a launch must read", ylabel="TB/s")
    axes.set_title(
        f"{result.model}, {step.workload}: {step.milliseconds:.3f} ms, "
        f"{step.of_limit:.0%} of the limit (areas: share of the time)"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _timeline(step: StepFigures, path: Path) -> None:
    """The launches of a step in time, one row an op."""
    from matplotlib import pyplot

    rows = {op: i for i, op in enumerate(dict.fromkeys(span.op for span in step.timeline))}
    figure, axes = pyplot.subplots(figsize=(14, 1.5 + 0.3 * len(rows)), layout="constrained")
    for op, row in rows.items():
        spans = [(s.start, s.end - s.start) for s in step.timeline if s.op == op]
        axes.broken_barh(spans, (row - 0.4, 0.8))
    axes.set_yticks(list(rows.values()), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("µs")
    axes.set_title(f"{step.workload}: {step.milliseconds:.3f} ms in {step.launches} launches")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _trace_events(timeline: tuple[Span, ...]) -> Iterator[dict[str, Any]]:
    """Complete events of the Trace Event Format, in microseconds."""
    for span in timeline:
        op, _, place = span.label.partition(" ")
        yield {
            "name": op,
            "cat": "launch",
            "ph": "X",
            "ts": span.start,
            "dur": span.end - span.start,
            "pid": 0,
            "tid": 0,
            "args": {"of": place},
        }
