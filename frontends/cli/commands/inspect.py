"""`ingot inspect`: a graph as a page or a picture, what the passes did, or what an ingot holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ....runtime.artifact.manifest import is_ingot
from ...options import AUTO, CompileOptions
from ..flags import MANY, ModelPath, UsageError
from ..models import check_compiled, check_options, compile_model
from ..output import Shown

if TYPE_CHECKING:
    from rich.table import Table

    from ...model import Plan


def command(
    source: ModelPath,
    after: Annotated[
        str | None,
        typer.Option(metavar="PASS", help="The graph after this pass; or traced, final (default)."),
    ] = None,
    passes: Annotated[bool, typer.Option("--passes", help="The table of passes.")] = False,
    entries: Annotated[bool, typer.Option("--entries", help="Launches of each entry.")] = False,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights", help="With --quantize: how each weight is held, and why. Of an ingot: all."
        ),
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels", help="What each launch of a step is, and every kernel as it was built."
        ),
    ] = False,
    entry: Annotated[
        str | None,
        typer.Option(help="With --kernels: the entry for so many tokens; without it, one."),
    ] = None,
    dot: Annotated[Path | None, typer.Option(help="Write the graph as Graphviz DOT.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the graph (needs Graphviz).")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every layer, as text that can be parsed.")
    ] = False,
    options: CompileOptions = MANY,
) -> Shown:
    """Print the graph after any pass; or what the passes did, or a picture; or what an ingot holds.

    Layers of the same structure are shown once; --all prints every one. With --kernels the target's
    device need not be here. A directory with config.json alone can be inspected too.
    """
    if entry is not None and not kernels:
        raise UsageError("--entry belongs to --kernels")
    if is_ingot(source):
        check_options(source, options, MANY)
        given = {"--after": after, "--passes": passes, "--dot": dot, "--svg": svg}
        check_compiled(source, *(flag for flag, value in given.items() if value))
        return _ingot(source, weights, everything, kernels, entry)
    from ...checkpoints.safetensors_files import holds_weights
    from ...launches import PlannedEntry
    from ..graph import dot as dot_text
    from ..graph import write_svg
    from ..inspect_view import page
    from ..kernels import kernel_data, kernel_page
    from ..report import (
        declined_lines,
        entry_table,
        pass_table,
        report_data,
        summary_lines,
        weight_table,
    )

    step: dict[str, Any] | None = None
    if kernels or not holds_weights(source):
        model = plan = _plan(source, options, kernels, entry)
        if kernels:
            step = kernel_data(PlannedEntry.of(plan.program, entry, plan.report.choices))
    else:
        model = compile_model(source, options)
    names = ("traced", *(p.name for p in model.report.passes), "final")
    which = after or "final"
    if which not in names:
        raise UsageError(f"--after {which}: expected one of {', '.join(names)}")
    graph = model.graph(which)
    if dot is not None:
        dot.write_text(dot_text(graph, everything=everything), encoding="utf-8")
    if svg is not None:
        write_svg(dot_text(graph, everything=everything), svg)
    if weights and not model.report.weights:
        raise UsageError("--weights lists quantized weights: give --quantize too")
    tables = passes or entries or weights or kernels
    wanted = after is not None or everything or not (tables or dot or svg)

    def data() -> dict[str, object]:
        text = {"graph": {"name": which, "text": str(graph)}} if wanted else {}
        return {**report_data(model), **text, **({"step": step} if step else {})}

    def parts() -> Iterator[Table | Sequence[str]]:
        if wanted:
            title = "as traced" if which == "traced" else f"after {which}"
            yield (str(graph) if everything else page(graph, title)).splitlines()
        if not tables:
            return
        report = report_data(model)
        if passes:
            yield pass_table(report)
            yield declined_lines(report)
        if entries:
            yield entry_table(report)
        if weights:
            yield weight_table(report)
        page_tables, page_lines = kernel_page(step) if step else ([], [])
        yield from page_tables
        yield [*summary_lines(report), *page_lines]

    return Shown(data, parts())


def _plan(directory: Path, options: CompileOptions, kernels: bool, entry: str | None) -> Plan:
    """A model that is only looked at; UsageError for kernels of the cpu target."""
    from ....compiler.target import TARGETS
    from ... import api
    from ...drivers import CPU, present_target

    if options.target == AUTO:
        options = replace(options, target=present_target())
    if kernels and options.target == CPU:
        gpus = ", ".join(t.name for t in TARGETS.values() if t.is_gpu)
        raise UsageError(f"--kernels: the cpu target has no kernels; give --target, one of {gpus}")
    return api.plan(directory, entry=entry, **options.keywords())


def _ingot(
    source: Path, weights: bool, everything: bool, kernels: bool, entry: str | None
) -> Shown:
    from ....runtime.artifact.reader import FINAL_GRAPH, open_ingot
    from ...launches import PlannedEntry
    from ..ingot import ingot_data, ingot_lines, ingot_tables
    from ..kernels import kernel_data, kernel_page

    artifact = open_ingot(source)
    data = ingot_data(artifact, weights=weights)
    page_tables, page_lines = [], []
    if kernels:
        if artifact.program is None:
            raise UsageError(f"--kernels: {source} is for the cpu target, which has no kernels")
        data["step"] = kernel_data(PlannedEntry.of(artifact.program, entry))
        page_tables, page_lines = kernel_page(data["step"])

    def parts() -> Iterator[Table | Sequence[str]]:
        if everything:
            yield artifact.graphs[FINAL_GRAPH].splitlines()
        yield from ingot_tables(data)
        yield from page_tables
        yield [*ingot_lines(data), *page_lines]

    return Shown(lambda: data, parts())
