"""A graph as Graphviz DOT, and as SVG through Graphviz."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...compiler.ir import INLINE, Graph, Node, Value
from ..layers import GraphSections, Layer, graph_sections
from ..show import show_numbers
from .inspect_view import value_names


class CannotDraw(Exception):
    """The graph cannot be drawn; says how to fix it."""


def dot(graph: Graph, *, everything: bool = False) -> str:
    """DOT of `graph`: a box for each node, a cluster for each layer, weights left out.

    Consecutive layers with the structure of earlier ones are one box, unless `everything`.
    """
    plan, names = graph_sections(graph), value_names(graph)
    at: dict[Node, str] = {}
    lines = [
        f"digraph {json.dumps(graph.name)} {{",
        '  node [shape=box, style="rounded,filled", fillcolor="#f4f4f4", fontname="Helvetica"];',
        '  edge [fontname="Helvetica", fontsize=9, color="#666666"];',
    ]
    for p in graph.params:
        at[p.node] = f"param_{p.attrs['name']}"
        lines.append(_box(at[p.node], f"%{p.attrs['name']}", str(p.type), "#dcebff"))
    lines += [*_boxes(plan.before, at, names)]
    run: list[Layer] = []
    for layer in plan.layers:
        if layer.same_as == layer.number or everything:
            lines += _folded(run, at)
            run = []
            lines += [f'  subgraph "cluster {layer.path}" {{', f'    label="{layer.path}";']
            lines += [*(f"  {line}" for line in _boxes(layer.nodes, at, names)), "  }"]
        else:
            run.append(layer)
    lines += [*_folded(run, at), *_boxes(plan.after, at, names)]
    lines += dict.fromkeys(_edges(graph, plan, at))
    return "\n".join([*lines, "}", ""])


def _box(name: str, title: str, note: str, colour: str = "") -> str:
    fill = f', fillcolor="{colour}"' if colour else ""
    return f"  {json.dumps(name)} [label={json.dumps(title + chr(10) + note)}{fill}];"


def _boxes(
    nodes: tuple[Node, ...], at: dict[Node, str], names: Mapping[Value, str]
) -> Iterator[str]:
    for node in nodes:
        at[node] = names[node.results[0]]
        weights = [a.attrs["name"].split(".") for a in node.args if a.op.name == "constant"]
        of = " ".join(".".join(parts[-2:]) for parts in weights)
        yield _box(at[node], f"{node.op.name} {of}".strip(), ", ".join(map(str, node.types)))


def _folded(run: list[Layer], at: dict[Node, str]) -> list[str]:
    """One box for several consecutive layers."""
    if not run:
        return []
    name = f"layers {run[0].number} to {run[-1].number}"
    at.update((node, name) for layer in run for node in layer.nodes)
    first = sorted({layer.same_as for layer in run})
    note = f"as layer {show_numbers(first)}"
    return [_box(name, f"layers {show_numbers([r.number for r in run])}", note, "#fff1d6")]


def _edges(graph: Graph, plan: GraphSections, at: Mapping[Node, str]) -> Iterator[str]:
    nodes = [*plan.before, *(n for layer in plan.layers for n in layer.nodes), *plan.after]
    pairs = [(arg, node) for node in nodes for arg in node.args]
    for arg, node in pairs:
        leaf = arg.op.name in INLINE and arg.op.name != "param"
        if leaf or at[arg.node] == at[node]:
            continue
        yield f"  {json.dumps(at[arg.node])} -> {json.dumps(at[node])};"
    for i, value in enumerate(graph.outputs):
        if value.node in at:
            yield _box(f"output {i}", "return", str(value.type), "#dcebff")
            yield f"  {json.dumps(at[value.node])} -> {json.dumps(f'output {i}')};"


def write_svg(source: str, path: Path) -> None:
    """Draw DOT text through Graphviz. CannotDraw when it is not installed or fails."""
    program = shutil.which("dot")
    if program is None:
        raise CannotDraw(
            "--svg needs Graphviz, which is not installed: `apt install graphviz` or "
            "`brew install graphviz`; or write --dot FILE and draw it elsewhere"
        )
    done = subprocess.run(
        [program, "-Tsvg", "-o", str(path)],
        check=False,
        input=source,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise CannotDraw(f"Graphviz failed: {(done.stderr.splitlines() or ['no message'])[0]}")
