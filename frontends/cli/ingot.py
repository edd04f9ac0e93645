"""`ingot inspect` of an ingot: its manifest, kernels and weights as tables or JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from msgspec import structs, to_builtins
from rich.table import Table

from ...runtime.artifact.reader import Artifact
from ...runtime.program import entry_name
from ..launches import static_report
from ..show import show_bytes
from .kernels import static_lines, static_table
from .output import table


def ingot_data(artifact: Artifact, *, weights: bool) -> dict[str, Any]:
    """The description of an ingot for `--json`; `weights` reads and checks those too."""
    manifest, program = artifact.manifest, artifact.program
    groups: Counter[str] = Counter()
    for name, fact in manifest.files.items():
        groups[name.partition("/")[0]] += fact.size
    known: dict[str, Any] = to_builtins(manifest)
    data = {
        **{name: known[name] for name in known if name not in ("format", "version", "files")},
        "entries": [{"name": entry_name(e.symbols), **structs.asdict(e)} for e in manifest.entries],
        "static": None,
        "files": len(manifest.files),
        "bytes": dict(groups),
    }
    if program is not None:
        data["static"] = asdict(static_report(program, program.entries))
    if weights:
        data["weights"] = [
            {"name": name, "dtype": t.dtype, "shape": list(t.shape), "bytes": len(t.data)}
            for name, t in artifact.tensors().items()
        ]
    return data


def ingot_lines(data: Mapping[str, Any]) -> list[str]:
    """The ingot in a few lines."""
    sizes = [f"{name} {show_bytes(size)}" for name, size in sorted(data["bytes"].items())]
    meta = data["meta"]
    lines = [
        f"{data['model_type']} for {data['target']} in {data['dtype']}, with {data['made_with']}",
        f"{data['files']} files, {show_bytes(sum(data['bytes'].values()))}: {', '.join(sizes)}",
        (
            f"serves {meta['max_sequences']} sequences of {meta['max_tokens_per_sequence']} tokens "
            f"on {meta['pages']} pages of {meta['page_size']}, vocabulary {meta['vocab_size']}"
        ),
    ]
    if data["options"]:
        lines.append(f"compiled with {_settings(data['options'])}")
    lines += static_lines(data["static"]) if data["static"] else []
    if data["generation"]:
        made = ", ".join(f"{name} {value}" for name, value in data["generation"].items())
        lines.append(f"its makers sample with {made}")
    return lines


def _settings(options: Mapping[str, Any]) -> str:
    """Names and values of options; those that are None are left out."""
    return ", ".join(
        f"{name} ({_settings(value)})" if isinstance(value, Mapping) else f"{name} {value}"
        for name, value in options.items()
        if value is not None
    )


def ingot_tables(data: Mapping[str, Any]) -> Iterable[Table]:
    """Tables of the entries, of the kernels, and of the weights, each if there are any."""
    entries = [[e["name"], str(e["launches"])] for e in data["entries"]]
    if entries:
        yield table("Entries", ["entry", "launches"], entries, right=(1,))
    if data["static"]:
        yield static_table(data["static"], "Kernels of all entries")
    if "weights" in data:
        rows = [
            [w["name"], w["dtype"], "×".join(map(str, w["shape"])), show_bytes(w["bytes"])]
            for w in data["weights"]
        ]
        yield table("Weights, as checked", ["weight", "dtype", "shape", "size"], rows, right=(3,))
