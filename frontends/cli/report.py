"""The compilation report: tables for people, plain data for `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..show import show_bytes
from .output import table

if TYPE_CHECKING:
    from ..model import Model, Plan, WrittenIngot


def report_data(model: Model | WrittenIngot | Plan) -> dict[str, Any]:
    """The report for `--json`."""
    report = model.report
    # Of one token of one sequence, over full caches: as traced, then after each pass.
    graphs = [model.graph("traced"), *(p.graph for p in report.passes)]
    costs = [graph.cost({n: r.start for n, r in graph.symbols.items()}) for graph in graphs]
    moved = [{"flops": int(c.flops), "bytes": int(c.bytes)} for c in costs]
    return {
        "model_type": report.model_type,
        "target": report.target,
        "dtype": report.dtype,
        "passes": [
            {
                "name": p.name,
                "matches": dict(p.matches),
                "declined": list(p.declined),
                "notes": list(p.notes),
                "expected": p.expected,
                "found": p.found,
                "nodes": {"before": p.nodes_before, "after": p.nodes_after},
                "one_token": {"before": before, "after": after},
                "seconds": p.seconds,
            }
            for p, before, after in zip(report.passes, moved[:-1], moved[1:], strict=True)
        ],
        "entries": [
            {"name": name, "launches": launches, "scratch_bytes": scratch}
            for name, launches, scratch in report.entries
        ],
        "kernels": report.kernels,
        "kernel_count": {"built": report.kernels_built, "from_cache": report.kernels_cached},
        "weights": [asdict(weight) for weight in report.weights],
        "weight_bytes": report.weight_bytes,
        "state_bytes": report.state_bytes,
        "arena_bytes": report.arena_bytes,
        "one_token": moved[-1],
        "unused": dict(report.unused),
        "notes": list(report.notes),
        "speculation": report.speculation and asdict(report.speculation),
        "seconds": dict(report.seconds),
    }


def pass_table(data: Mapping[str, Any]) -> Table:
    """The passes of `report_data`: matches of each, and the cost of one token before and after."""
    rows: list[list[str]] = []
    for p in data["passes"]:
        matches = [f"{name} {count}" for name, count in sorted(p["matches"].items())]
        before, after = p["one_token"]["before"], p["one_token"]["after"]
        moved = f"{show_bytes(before['bytes'])} → {show_bytes(after['bytes'])}"
        nodes = f"{p['nodes']['before']} → {p['nodes']['after']}"
        declined = str(len(p["declined"])) if p["declined"] else ""
        found = "" if p["expected"] is None else f"{p['found']} of {p['expected']}"
        time = f"{p['seconds']:.2f}"
        rows.append([p["name"], "\n".join(matches), found, declined, nodes, moved, time])
    heads = ["pass", "rewritten", "found", "declined", "nodes", "bytes a token", "seconds"]
    return table("Passes; bytes are with full caches", heads, rows, right=(2, 3, 4, 5, 6))


def declined_lines(data: Mapping[str, Any], most: int = 5) -> list[str]:
    """Notes of each pass, and its first reasons for declining matches."""
    lines: list[str] = []
    for p in data["passes"]:
        lines += [f"{p['name']}: {note}" for note in p["notes"]]
        lines += [f"{p['name']} declined {reason}" for reason in p["declined"][:most]]
        if len(p["declined"]) > most:
            lines.append(f"{p['name']} declined {len(p['declined']) - most} more (see --json)")
    return lines


def entry_table(data: Mapping[str, Any]) -> Table:
    """Launches and scratch of each bucket."""
    rows = [
        [e["name"], str(e["launches"]), show_bytes(e["scratch_bytes"])] for e in data["entries"]
    ]
    return table("Entries", ["entry", "launches", "scratch"], rows, right=(1, 2))


def weight_table(data: Mapping[str, Any]) -> Table:
    """Format and quantization error of each weight of a matrix product or embedding, and why."""
    rows: list[list[str]] = []
    for w in data["weights"]:
        error = "" if w["error"] is None else f"{w['error']:.2%}"
        rows.append([w["name"], w["format"], f"{w['bits']:g}", error, w["reason"]])
    heads = ["weight", "format", "bits", "relative error", "why"]
    return table("Weights", heads, rows, right=(2, 3))


def summary_lines(data: Mapping[str, Any]) -> list[str]:
    """Sizes, the cost of one token, and times, in a few lines."""
    token = data["one_token"]
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in data["seconds"].items())
    sizes = [show_bytes(data[f"{kind}_bytes"]) for kind in ("weight", "state", "arena")]
    lines = [
        f"{data['model_type']} for {data['target']} in {data['dtype']}",
        "weights {}, cache {}, scratch {}".format(*sizes),
        f"one token, caches full: {token['flops'] / 1e6:.1f} Mflop, {show_bytes(token['bytes'])}",
        f"compiled in {sum(data['seconds'].values()):.1f} s: {stages}",
    ]
    if data["kernels"]:
        count = data["kernel_count"]
        lines.append(f"{count['built']} kernels built, {count['from_cache']} from the cache")
    lines += data["notes"]
    by_reason: dict[str, list[str]] = {}
    for name, reason in data["unused"].items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        lines.append(f"{len(names)} tensors of the checkpoint are not used ({reason}): {shown}")
    return lines
