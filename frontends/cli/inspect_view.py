"""A graph as a page to read: what goes in, then each kind of layer once, then what comes out.

A display of the textual IR, not the IR: `str(graph)` is complete and can be parsed. Values have the
same names in both. Here weights are named below their layer, floats are rounded, types stand in a
column, and a layer that is built as an earlier one is a line that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby, pairwise
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

WIDTH = 100
_TYPES_AT = 76
_NAMED_GROUP = 3  # fewer lines than this (a norm, a residual sum) need no heading

_SYMBOLS = {
    "T": "tokens of one step, whoever they belong to",
    "L": "tokens of them whose logits are wanted",
}
_PARAMETERS = {
    "tokens": "token ids",
    "positions": "place of each token in its sequence",
    "slots": "the sequence of each token; -1 is padding",
    "page_table": "the pages of each slot, in order",
    "logit_rows": "the tokens whose logits are wanted",
    "k_cache": "keys [page, token, head, width]",
    "v_cache": "values [page, token, head, width]",
    "latent_cache": "c_kv and rotated k_pe [page, token, width]",
}


@dataclass(frozen=True)
class Layer:
    """One repeated layer: its number, its module path, its nodes in order, and what leaves it.

    `twin` is the number of the first layer that is built alike, its own for a layer without one.
    """

    number: int
    path: str
    nodes: tuple[Node, ...]
    leaving: tuple[Value, ...]
    twin: int

    @property
    def is_moe(self) -> bool:
        return any("experts" in node.op.name for node in self.nodes)


@dataclass(frozen=True)
class Layout:
    """The nodes of a graph by place: before the layers, in them, after them.

    `places` has the module path of every node; `folded` are those that depend on weights alone.
    """

    before: tuple[Node, ...]
    layers: tuple[Layer, ...]
    after: tuple[Node, ...]
    places: Mapping[Node, str]
    folded: Set[Node]

    @property
    def shown(self) -> tuple[Layer, ...]:
        """The layers that stand for all."""
        return tuple(layer for layer in self.layers if layer.twin == layer.number)


def layer_path(source: str) -> str:
    """The module path of the layer that a source lies in: `model.layers.3`, or nothing."""
    parts = source.split(" @")[0].split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def layout(graph: Graph) -> Layout:
    """Where each node of `graph` belongs, and which layers are alike.

    What several layers use and what depends on parameters and weights alone (rotary tables, masks)
    stands before the layers.
    """
    nodes = [n for n in graph.nodes() if n.op.name not in INLINE]
    users = graph.users()
    places = _places(nodes, users)
    home = {node: layer_path(place) for node, place in places.items()}
    for node in _shared(nodes, users, home):
        home[node] = ""
    inputs: set[Node] = set()  # nodes that need a value of some layer
    for node in nodes:
        if home[node] or any(a.node in inputs for a in node.args):
            inputs.add(node)
    before = tuple(n for n in nodes if not home[n] and n not in inputs)
    after = tuple(n for n in nodes if not home[n] and n in inputs)
    by_path: dict[str, list[Node]] = {}
    for node in nodes:
        if home[node]:
            by_path.setdefault(home[node], []).append(node)
    roots = set(graph.roots)
    layers: list[Layer] = []
    twins: dict[Any, int] = {}
    incoming = _leaving(before, users, roots)
    for path, members in by_path.items():
        leaving = _leaving(members, users, roots)
        number = int(path.rpartition(".")[2])
        key = _signature(path, members, leaving, incoming, graph)
        twin = twins.setdefault((path.rpartition(".")[0], key), number)
        layers.append(Layer(number, path, tuple(members), leaving, twin))
        incoming = leaving
    return Layout(before, tuple(layers), after, places, graph.constants())


def _places(nodes: Sequence[Node], users: Mapping[Value, Sequence[Node]]) -> dict[Node, str]:
    """The module path of every node: its source, or for one without what its weights or operands
    say. Rows taken for later layers alone belong to the first of those.
    """
    places: dict[Node, str] = {}
    order: dict[str, int] = {"": -1}

    def rank(place: str) -> int:
        return order.setdefault(layer_path(place), len(order))

    for node in nodes:
        weights = [a.attrs["name"].rpartition(".")[0] for a in node.args if a.op.name == "constant"]
        known = [places[a.node] for a in node.args if a.node in places]
        source = node.source.split(" @")[0]
        places[node] = source or max(weights or known, key=rank, default="")
        rank(places[node])
    for node in reversed(nodes):
        used_by = [places[u] for r in node.results for u in users.get(r, ())]
        first = min(used_by, key=rank, default="")
        if node.op.name == "take" and not node.source and rank(first) > rank(places[node]) >= 0:
            places[node] = first
    return places


def _shared(
    nodes: Sequence[Node], users: Mapping[Value, Sequence[Node]], home: Mapping[Node, str]
) -> set[Node]:
    """Nodes in a layer that no activation reaches and that something beyond the layer uses."""
    free: set[Node] = set()
    for node in nodes:
        if home[node] and all(a.node in free or a.op.name in INLINE for a in node.args):
            free.add(node)
    shared: set[Node] = set()
    for node in reversed(nodes):
        used_by = [u for r in node.results for u in users.get(r, ())]
        if node in free and any(u in shared or home[u] != home[node] for u in used_by):
            shared.add(node)
    return shared


def _leaving(
    members: Sequence[Node], users: Mapping[Value, Sequence[Node]], roots: set[Value]
) -> tuple[Value, ...]:
    inside = set(members)
    results = [r for node in members for r in node.results]
    return tuple(r for r in results if r in roots or any(u not in inside for u in users.get(r, ())))


def _signature(
    path: str,
    members: Sequence[Node],
    leaving: Sequence[Value],
    incoming: Sequence[Value],
    graph: Graph,
) -> Any:
    """What a layer computes, free of its number: equal for layers that are built alike."""
    index = {r: (i, r.index) for i, node in enumerate(members) for r in node.results}

    def sign(value: Value) -> Any:
        if value in index:
            return index[value]
        if value in incoming:
            return "from the layer before", incoming.index(value)
        if value.op.name == "constant":
            return _below(value.attrs["name"], path, "@"), str(value.type)
        if value.op.name == "param" and value.attrs["name"] in graph.updates:
            return value.attrs["name"].rpartition(".")[0], str(value.type)
        return show_inline(value) if value.op.name in INLINE else value

    body = tuple(
        (n.op.name, show_attr(tuple(n.attrs.items())), n.types, n.given, tuple(map(sign, n.args)))
        for n in members
    )
    states = {v: name.rpartition(".")[0] for name, v in graph.updates.items()}
    return body, tuple((index[v], states.get(v)) for v in leaving)


def _below(name: str, path: str, mark: str = "") -> str:
    return mark + name[len(path) + 1 :] if path and name.startswith(path + ".") else name


# ---- the page


def value_names(graph: Graph) -> dict[Value, str]:
    """The name of every value, as in the textual IR."""
    results = [r for n in graph.nodes() if n.op.name not in INLINE for r in n.results]
    return {result: f"%{i}" for i, result in enumerate(results)}


def page(graph: Graph, title: str) -> str:
    """The folded display; `title` says which graph this is (`after insert-kv-cache`)."""
    names, plan = value_names(graph), layout(graph)
    lines = [f"graph @{graph.name} {title}: {count_nodes(graph)} nodes", *_header(graph), ""]
    if plan.before:
        lines += [
            _rule(
                "embedding, and what all layers share" if plan.layers else "body",
                plan.before,
                plan.folded,
            ),
            "",
        ]
        lines += [*_body(plan.before, plan, names, ""), ""]
    for alike, run in groupby(plan.layers, key=lambda layer: layer.twin != layer.number):
        if alike:
            lines += [*_as_before(list(run), graph, names), ""]
            continue
        for layer in run:
            lines += [_rule(_layer_title(layer, plan), layer.nodes, plan.folded), ""]
            lines += [*_body(layer.nodes, plan, names, layer.path), ""]
    if plan.after:
        lines += [_rule("head", plan.after, plan.folded), ""]
        lines += [*_body(plan.after, plan, names, ""), ""]
    refer = {v: names.get(v) or show_inline(v) for v in graph.roots}
    outputs = ", ".join(f"{refer[v]} : {v.type}" for v in graph.outputs)
    return "\n".join([*lines, f"  return {outputs}", *_updates(graph, plan, refer)])


def _rule(title: str, nodes: Sequence[Node], folded: Set[Node]) -> str:
    """A heading with the number of ops that compute, and the weights that the section reads."""
    weights = {a.attrs["name"]: a for n in nodes for a in n.args if a.op.name == "constant"}
    size: Any = sum(a.type.nbytes for a in weights.values())
    count = len(computing(nodes, folded))
    note = f" {count} op{'s' if count != 1 else ''}"
    note += f", {len(weights)} weights, {show_bytes(size)}" if weights else ""
    return f"# {title} {'─' * (WIDTH - 3 - len(title) - len(note))}{note}"


def computing(nodes: Iterable[Node], folded: Set[Node]) -> list[Node]:
    """Those that do arithmetic when the graph runs: views, copies and cache writes move only."""
    return [n for n in nodes if n not in folded and n.cost.flops != 0]


def _layer_title(layer: Layer, plan: Layout) -> str:
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
        if name in graph.updates:
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
    nodes: Sequence[Node], plan: Layout, names: Mapping[Value, str], path: str
) -> Iterator[str]:
    """Lines of a section; submodules of more than a few lines get a heading, the rest a gap.

    What is made of weights alone comes last.
    """
    made = [node for node in nodes if node in plan.folded]
    nodes = [node for node in nodes if node not in plan.folded]

    def section_at(node: Node) -> str:
        return section_of(plan.places[node])

    small_before = True
    for i, (section, members) in enumerate(groupby(nodes, key=section_at)):
        run = list(members)
        small = len(run) < _NAMED_GROUP or section == path
        if i and not (small and small_before):
            yield ""
        heading = _below(section, path)
        if not small and heading:
            yield f"  # {heading}"
        yield from (_line(node, names, path) for node in run)
        small_before = small
    if made:
        yield from ("", "  # made of weights when they are loaded")
        yield from (_line(node, names, path) for node in made)


def _line(node: Node, names: Mapping[Value, str], path: str) -> str:
    def argument(value: Value) -> str:
        if value.op.name == "constant":
            return _below("@" + value.attrs["name"], "@" + path, "@")
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


def _as_before(run: Sequence[Layer], graph: Graph, names: Mapping[Value, str]) -> Iterator[str]:
    """Which layers are built as which, and where the last of them leaves its result."""
    by_twin: dict[int, list[int]] = {}
    for layer in run:
        by_twin.setdefault(layer.twin, []).append(layer.number)
    parts = [
        f"layer{'s' if len(numbers) > 1 else ''} {show_numbers(numbers)} as layer {twin}"
        for twin, numbers in by_twin.items()
    ]
    stream = [names[v] for v in run[-1].leaving if v not in set(graph.updates.values())]
    gives = f"; layer {run[-1].number} gives {', '.join(stream)}" if stream else ""
    yield f"# {', '.join(parts)}{gives}"


def _updates(graph: Graph, plan: Layout, refer: Mapping[Value, str]) -> Iterator[str]:
    """The new contents of the state, for the layers that are shown."""
    hidden = {n for layer in plan.layers if layer not in plan.shown for n in layer.nodes}
    kept = {name: v for name, v in graph.updates.items() if v.node not in hidden}
    for _, run in groupby(kept.items(), key=lambda item: item[1].node):
        yield "  update " + ", ".join(f"%{name} = {refer[v]}" for name, v in run)
    if len(kept) < len(graph.updates):
        yield f"# and {len(graph.updates) - len(kept)} more, of the layers that are not shown"


def show_numbers(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: `2`, `2 to 5`, `2, 4 … 10`, `1, 5, 6`."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 2 and steps == {1}:
        return f"{numbers[0]} to {numbers[-1]}"
    if len(numbers) > 3 and len(steps) == 1:
        return f"{numbers[0]}, {numbers[1]} … {numbers[-1]}"
    return ", ".join(map(str, numbers))


def show_bytes(nbytes: int) -> str:
    """Bytes in the unit that gives one to four digits."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def one_token(graph: Graph) -> dict[str, int]:
    """Every symbol at its smallest: one token of one sequence."""
    return {name: bounds.start for name, bounds in graph.symbols.items()}
