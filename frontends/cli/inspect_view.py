"""Renders a graph for reading: parameters, each distinct layer once, outputs.

`str(graph)` is the complete, parsable IR; values have the same names in both. Here weight names are
relative to their layer, floats are rounded, types are in a column, and a layer that is identical to
an earlier one is one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import groupby
from typing import Any

from ...compiler.ir import (
    INLINE,
    Graph,
    Node,
    Value,
    section_of,
    show_arguments,
    show_attr,
    show_inline,
)
from ...compiler.pipeline import count_nodes
from ..layers import GraphSections, Layer, graph_sections, relative_name
from ..show import show_bytes, show_numbers

WIDTH = 100
_TYPES_AT = 76
_NAMED_GROUP = 3  # fewer lines than this (a norm, a residual sum) need no heading

_SYMBOLS = {
    "T": "tokens of one step, over all sequences",
    "L": "rows of logits, one per sampled token",
}
_PARAMETERS = {
    "tokens": "token ids",
    "positions": "position in its sequence",
    "slots": "the sequence of each token; -1 is padding",
    "page_table": "the pages of each slot, in order",
    "logit_rows": "the tokens whose logits are computed",
    "k_cache": "keys [page, token, head, width]",
    "v_cache": "values [page, token, head, width]",
    "latent_cache": "c_kv and rotated k_pe [page, token, width]",
}


def value_names(graph: Graph) -> dict[Value, str]:
    """The name of every value in the textual IR."""
    results = [r for n in graph.nodes() if n.op.name not in INLINE for r in n.results]
    return {result: f"%{i}" for i, result in enumerate(results)}


def page(graph: Graph, title: str) -> str:
    """The folded display; `title` says which graph this is (`after insert-kv-cache`)."""
    names, plan = value_names(graph), graph_sections(graph)
    lines = [f"graph @{graph.name} {title}: {count_nodes(graph)} nodes", *_header(graph), ""]
    if plan.before:
        lines += [
            _heading(
                "embedding, and values shared by all layers" if plan.layers else "body",
                plan.before,
                plan.folded,
            ),
            "",
        ]
        lines += [*_body(plan.before, plan, names, ""), ""]
    for alike, run in groupby(plan.layers, key=lambda layer: layer.same_as != layer.number):
        if alike:
            lines += [*_repeated(list(run), graph, names), ""]
            continue
        for layer in run:
            lines += [_heading(_layer_title(layer, plan), layer.nodes, plan.folded), ""]
            lines += [*_body(layer.nodes, plan, names, layer.path), ""]
    if plan.after:
        lines += [_heading("head", plan.after, plan.folded), ""]
        lines += [*_body(plan.after, plan, names, ""), ""]
    refer = {v: names.get(v) or show_inline(v) for v in graph.roots}
    outputs = ", ".join(f"{refer[v]} : {v.type}" for v in graph.outputs)
    return "\n".join([*lines, f"  return {outputs}", *_updates(graph, plan, refer)])


def _heading(title: str, nodes: Sequence[Node], folded: Set[Node]) -> str:
    """A heading with the number of ops that compute, and the weights that the section reads."""
    weights = {a.attrs["name"]: a for n in nodes for a in n.args if a.op.name == "constant"}
    size: Any = sum(a.type.nbytes for a in weights.values())
    count = len(compute_nodes(nodes, folded))
    note = f" {count} op{'s' if count != 1 else ''}"
    note += f", {len(weights)} weights, {show_bytes(size)}" if weights else ""
    return f"# {title} {'─' * (WIDTH - 3 - len(title) - len(note))}{note}"


def compute_nodes(nodes: Iterable[Node], folded: Set[Node]) -> list[Node]:
    """Nodes that do arithmetic at run time: no views, copies and cache writes."""
    return [n for n in nodes if n not in folded and n.cost.flops != 0]


def _layer_title(layer: Layer, plan: GraphSections) -> str:
    kinds = {other.is_moe for other in plan.layers}
    kind = (", mixture of experts" if layer.is_moe else ", dense") if len(kinds) > 1 else ""
    return f"layer {layer.number}{kind}: {layer.path}"


def _header(graph: Graph) -> Iterator[str]:
    rows: list[tuple[str, str, str, str]] = []
    for name, bounds in graph.symbols.items():
        span = f"{bounds.start}..{bounds.stop - 1}"
        rows.append(("symbols", name, span, _SYMBOLS.get(name, "")))
    state: dict[tuple[str, str], list[str]] = {}
    for p in graph.params:
        name, type_ = p.attrs["name"], str(p.type)
        if name in graph.state:
            state.setdefault((name.rpartition(".")[0] or name, type_), []).append(name)
        else:
            rows.append(("parameters", f"%{name}", type_, _PARAMETERS.get(name, "")))
    for (stem, type_), members in state.items():
        first, last = f"%{members[0]}", members[-1].rpartition(".")[2]
        span = first if len(members) == 1 else f"{first} … {last}"
        rows.append(("state", span, type_, _PARAMETERS.get(stem, "")))
    constants = {n.attrs["name"]: n for n in graph.nodes() if n.op.name == "constant"}
    size: Any = sum(n.types[0].nbytes for n in constants.values())
    if constants:
        rows.append(("weights", f"{len(constants)} tensors", show_bytes(size), ""))
    wide = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    before = ""
    for row in rows:
        kind = row[0] if row[0] != before else ""
        before = row[0]
        cells = [kind.ljust(wide[0]), row[1].ljust(wide[1]), row[2].ljust(wide[2]), row[3]]
        yield ("#   " + "   ".join(cells)).rstrip()


def _body(
    nodes: Sequence[Node], plan: GraphSections, names: Mapping[Value, str], path: str
) -> Iterator[str]:
    """Lines of a section; submodules of more than a few lines get a heading, others a blank line.

    Nodes that depend on weights only come last.
    """
    made = [node for node in nodes if node in plan.folded]
    nodes = [node for node in nodes if node not in plan.folded]
    small_before = True
    sections = groupby(nodes, key=lambda node: section_of(plan.module_paths[node]))
    for i, (section, members) in enumerate(sections):
        run = list(members)
        small = len(run) < _NAMED_GROUP or section == path
        if i and not (small and small_before):
            yield ""
        heading = relative_name(section, path)
        if not small and heading:
            yield f"  # {heading}"
        yield from (_line(node, names, path) for node in run)
        small_before = small
    if made:
        yield from ("", "  # computed from weights when they are loaded")
        yield from (_line(node, names, path) for node in made)


def _line(node: Node, names: Mapping[Value, str], path: str) -> str:
    def argument(value: Value) -> str:
        if value.op.name == "constant":
            return relative_name("@" + value.attrs["name"], "@" + path, "@")
        return names.get(value) or show_inline(value)

    left = f"  {', '.join(names[r] for r in node.results):5} = {node.op.name}("
    arguments = show_arguments(node, argument, _attribute)
    call = _wrapped(left, arguments, ")", _TYPES_AT - 1)
    types = _wrapped(": ", [str(t) for t in node.types], "", WIDTH - _TYPES_AT)
    gap = max(len(call[-1]) + 1, _TYPES_AT)
    rows = [*call[:-1], f"{call[-1]:{gap}}{types[0]}"]
    return "\n".join([*rows, *(" " * gap + row for row in types[1:])])


def _wrapped(start: str, items: Sequence[str], end: str, width: int) -> list[str]:
    """`start item, item, ... end` in lines of up to `width`, items below each other."""
    lines, indent = [start], " " * len(start)
    for i, item in enumerate(items):
        piece = item + (", " if i + 1 < len(items) else end)
        if len(lines[-1]) + len(piece.rstrip()) > width and lines[-1].strip() != start.strip():
            lines.append(indent)
        lines[-1] += piece
    return [line.rstrip() if line.strip() else line for line in lines] if items else [start + end]


def _attribute(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show_attr(value)


def _repeated(run: Sequence[Layer], graph: Graph, names: Mapping[Value, str]) -> Iterator[str]:
    """Which layers repeat which, and the output value of the last."""
    repeats: dict[int, list[int]] = {}
    for layer in run:
        repeats.setdefault(layer.same_as, []).append(layer.number)
    parts = [
        f"layer{'s' if len(numbers) > 1 else ''} {show_numbers(numbers)} as layer {twin}"
        for twin, numbers in repeats.items()
    ]
    stream = [names[v] for v in run[-1].outputs if v not in set(graph.updates.values())]
    gives = f"; layer {run[-1].number} gives {', '.join(stream)}" if stream else ""
    yield f"# {', '.join(parts)}{gives}"


def _updates(graph: Graph, plan: GraphSections, refer: Mapping[Value, str]) -> Iterator[str]:
    """The new contents of the state, for the layers that are shown."""
    hidden = {n for layer in plan.layers if layer not in plan.distinct for n in layer.nodes}
    kept = {name: v for name, v in graph.updates.items() if v.node not in hidden}
    for _, run in groupby(kept.items(), key=lambda item: item[1].node):
        yield "  update " + ", ".join(f"%{name} = {refer[v]}" for name, v in run)
    if len(kept) < len(graph.updates):
        yield f"# and {len(graph.updates) - len(kept)} more, of the layers that are not shown"
