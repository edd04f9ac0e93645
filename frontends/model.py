"""Compiled language models (`Model`, `WrittenIngot`, `Plan`) and the `Report` on one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..codegen.entries import Choice
from ..compiler.ir import Graph
from ..compiler.pipeline import PassResult
from ..runtime.artifact.manifest import Manifest
from ..runtime.program import Program
from .aot import Exportable, export
from .show import show_bytes
from .speculate import SpeculationReport
from .text.text_model import TextModel
from .weight_report import WeightReport


@dataclass(frozen=True)
class Report:
    """Statistics of the compilation and sizes of the program.

    `entries` has, for each bucket of a GPU program, its name, its launches, and the bytes of arena
    that it uses.
    Sizes are bytes. `unused` has tensors of the checkpoint that the program does not read, and why.
    `seconds` is wall time by stage. `weights` is empty where nothing is quantized. `choices` says,
    for a GPU, by which kernels each node of each entry is computed, and why; `kernels_built` of
    those were built now, and `kernels_cached` came from the cache. `departures` say in which way
    the model is not what it or its caller asked for (a lowered limit, tokens that its generation
    config forbids), `import_check` what of its import was checked, and `notes` are both.
    `speculation` is there for a model that drafts tokens: what it did until now.
    """

    model_type: str
    target: str
    dtype: str
    passes: tuple[PassResult, ...]
    entries: tuple[tuple[str, int, int], ...]
    weight_bytes: int
    state_bytes: int
    arena_bytes: int
    unused: Mapping[str, str]
    seconds: Mapping[str, float]
    weights: tuple[WeightReport, ...] = ()
    choices: tuple[Choice, ...] = ()
    kernels_built: int = 0
    kernels_cached: int = 0
    departures: tuple[str, ...] = ()
    import_check: str = ""
    speculation: SpeculationReport | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know beside figures, a line each."""
        return (*self.departures, *filter(None, [self.import_check]))

    @property
    def kernels(self) -> list[dict[str, Any]]:
        """For each entry, op, its kernels in order, and why these: how many nodes, and seconds."""
        found: dict[object, dict[str, Any]] = {}
        for c in self.choices:
            use = {"entry": c.entry, "op": c.op, "kernels": list(c.kernels), "why": c.reason}
            key = (c.entry, c.op, c.kernels, c.reason)
            use = found.setdefault(key, {**use, "nodes": 0, "seconds": 0.0})
            use["nodes"] += 1
            use["seconds"] += c.seconds
        return list(found.values())

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        sizes = {"weights": self.weight_bytes, "cache": self.state_bytes}
        sizes["scratch"] = self.arena_bytes
        lines = [
            f"{self.model_type} for {self.target} in {self.dtype}, compiled in {total:.1f} s",
            ", ".join(f"{name} {show_bytes(size)}" for name, size in sizes.items()),
            *self.notes,
            *(self.speculation.lines() if self.speculation else ()),
        ]
        if self.choices:
            built, cached = self.kernels_built, self.kernels_cached
            lines.append(f"{built} kernels built, {cached} from the cache")
        for p in self.passes:
            matches = ", ".join(f"{name} {count}" for name, count in sorted(p.matches.items()))
            lines.append(f"{p.name}: {p.nodes_before} -> {p.nodes_after} nodes ({matches})")
            lines += [f"  {note}" for note in p.notes]
        for entry, uses in groupby(self.kernels, key=itemgetter("entry")):
            lines.append(f"kernels of {entry}")
            for use in uses:
                kernels = ", ".join(use["kernels"])
                lines.append(f"  {use['nodes']} x {use['op']}: {kernels} ({use['why']})")
        return "\n".join(lines)


def entry_sizes(program: Program) -> tuple[tuple[str, int, int], ...]:
    """(name, launches, bytes of arena used) of each entry."""
    return tuple(
        (e.name, len(e.launches), max((b.offset or 0) + b.nbytes for b in e.buffers))
        for e in program.entries
    )


class Compiled:
    """What was compiled, with its graph at every stage."""

    graphs: Mapping[str, Graph]

    def graph(self, which: str = "final") -> Graph:
        """The IR as "traced", "final", or after the pass of that name. KeyError lists the names."""
        if which not in self.graphs:
            raise KeyError(f"no graph {which!r}; there are {', '.join(self.graphs)}")
        return self.graphs[which]


@dataclass(eq=False)
class Model(TextModel, Compiled):
    """A compiled causal language model, serving in this process."""

    exportable: Exportable
    graphs: Mapping[str, Graph]
    compilation: Report

    @property
    def report(self) -> Report:
        """What the compiler did, and what speculation does until now."""
        return replace(self.compilation, speculation=self.speculation)

    @property
    def asked_tokens(self) -> int:
        """See TextModel."""
        return self.exportable.options["max_tokens_per_sequence"]

    def export(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model as an ingot, which `ingot.load` reads: see `export` in `aot`."""
        export(self.exportable, path, overwrite=overwrite)


@dataclass(frozen=True)
class WrittenIngot(Compiled):
    """An ingot that was written, and what the compiler did."""

    path: Path
    manifest: Manifest
    graphs: Mapping[str, Graph]
    report: Report


@dataclass(frozen=True)
class Plan(Compiled):
    """A model compiled for inspection: it cannot run, and no weight was read.

    `program` has the kernels of the entry that was asked for; none for the cpu target.
    """

    program: Program
    graphs: Mapping[str, Graph]
    report: Report
