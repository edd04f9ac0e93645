"""The layers of a graph: which nodes are in each, and which layers have the same structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ..compiler.ir import INLINE, Graph, Node, Value, show_attr, show_inline


@dataclass(frozen=True)
class Layer:
    """One repeated layer: its number, module path, nodes in order, and output values.

    `same_as` is the number of the first layer with the same structure, which may be its own.
    """

    number: int
    path: str
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    same_as: int

    @property
    def is_moe(self) -> bool:
        return any("experts" in node.op.name for node in self.nodes)


@dataclass(frozen=True)
class GraphSections:
    """The nodes of a graph: before the layers, in each layer, and after the layers.

    `module_paths` has the module path of every node; `folded` depend on weights only.
    """

    before: tuple[Node, ...]
    layers: tuple[Layer, ...]
    after: tuple[Node, ...]
    module_paths: Mapping[Node, str]
    folded: Set[Node]

    @property
    def distinct(self) -> tuple[Layer, ...]:
        """The first layer of each structure."""
        return tuple(layer for layer in self.layers if layer.same_as == layer.number)


def layer_path(source: str) -> str:
    """The module path of the layer that contains a source: `model.layers.3`, or ""."""
    parts = source.split(" @")[0].split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def graph_sections(graph: Graph) -> GraphSections:
    """Group the nodes of `graph` by layer, and find layers of the same structure.

    Nodes that several layers use and that no activation reaches (rotary tables, masks) are before
    the layers.
    """
    nodes = [n for n in graph.nodes() if n.op.name not in INLINE]
    users = graph.users()
    places = _module_paths(nodes, users)
    layer_of = {node: layer_path(place) for node, place in places.items()}
    for node in _shared_nodes(nodes, users, layer_of):
        layer_of[node] = ""
    inputs: set[Node] = set()  # nodes that depend on a layer
    for node in nodes:
        if layer_of[node] or any(a.node in inputs for a in node.args):
            inputs.add(node)
    before = tuple(n for n in nodes if not layer_of[n] and n not in inputs)
    after = tuple(n for n in nodes if not layer_of[n] and n in inputs)
    by_path: dict[str, list[Node]] = {}
    for node in nodes:
        if layer_of[node]:
            by_path.setdefault(layer_of[node], []).append(node)
    roots = set(graph.roots)
    layers: list[Layer] = []
    twins: dict[Any, int] = {}
    incoming = _outputs(before, users, roots)
    for path, members in by_path.items():
        leaving = _outputs(members, users, roots)
        number = int(path.rpartition(".")[2])
        key = _signature(path, members, leaving, incoming, graph)
        twin = twins.setdefault((path.rpartition(".")[0], key), number)
        layers.append(Layer(number, path, tuple(members), leaving, twin))
        incoming = leaving
    return GraphSections(before, tuple(layers), after, places, graph.constants())


def _module_paths(nodes: Sequence[Node], users: Mapping[Value, Sequence[Node]]) -> dict[Node, str]:
    """The module path of every node: its source, or else that of its weights or operands.

    A `take` of rows for later layers belongs to the first of those.
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


def _shared_nodes(
    nodes: Sequence[Node], users: Mapping[Value, Sequence[Node]], layer_of: Mapping[Node, str]
) -> set[Node]:
    """Nodes in a layer that no activation reaches and that nodes outside the layer use."""
    free: set[Node] = set()
    for node in nodes:
        if layer_of[node] and all(a.node in free or a.op.name in INLINE for a in node.args):
            free.add(node)
    shared: set[Node] = set()
    for node in reversed(nodes):
        used_by = [u for r in node.results for u in users.get(r, ())]
        if node in free and any(u in shared or layer_of[u] != layer_of[node] for u in used_by):
            shared.add(node)
    return shared


def _outputs(
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
    """The structure of a layer without its number, for comparison."""
    index = {r: (i, r.index) for i, node in enumerate(members) for r in node.results}

    def sign(value: Value) -> Any:
        if value in index:
            return index[value]
        if value in incoming:
            return "from the layer before", incoming.index(value)
        if value.op.name == "constant":
            return relative_name(value.attrs["name"], path, "@"), str(value.type)
        if value.op.name == "param" and value.attrs["name"] in graph.state:
            return value.attrs["name"].rpartition(".")[0], str(value.type)
        return show_inline(value) if value.op.name in INLINE else value

    body = tuple(
        (n.op.name, show_attr(tuple(n.attrs.items())), n.types, n.given, tuple(map(sign, n.args)))
        for n in members
    )
    states = {graph.updates[name]: name.rpartition(".")[0] for name in graph.state}
    return body, tuple((index[v], states.get(v)) for v in leaving)


def relative_name(name: str, path: str, mark: str = "") -> str:
    """A name within the module at `path` without that; `mark` goes before it."""
    return mark + name[len(path) + 1 :] if path and name.startswith(path + ".") else name
