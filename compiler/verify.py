"""The verifier: every rule of the IR, checked over a whole graph."""

from __future__ import annotations

from collections import Counter
from typing import Any, NoReturn

import sympy

from .ir import Graph, Node, text_lines
from .ops.leaf import constant, param
from .types import TensorType, Types, VerifyError, attr_symbols, free_symbols

_CONTEXT = 10
_ATTRIBUTES = "a number, string, dim, type, None or a tuple of them"
_ATTRIBUTE_TYPES = (int, float, str, sympy.Expr, TensorType)


def verify(graph: Graph) -> None:
    """Raise VerifyError, naming node, expectation and finding, at the first broken rule.

    Checked: every node's types are what its op infers; attributes can be written down; parameters
    are declared once and used as declared; dims and attributes use declared symbols only; one name
    is one weight of one type; an update has its parameter's type.
    """
    for name, bounds in graph.symbols.items():
        if not bounds or bounds.start < 1 or bounds.step != 1:
            shown = f"{bounds.start}..{bounds.stop - 1}"
            _fail(graph, None, f"symbol {name}: expected a range of positive sizes, found {shown}")
    declared: dict[str, Node] = {}
    times = Counter(graph.params)
    for p in graph.params:
        if p.op is not param:
            _fail(graph, p.node, "a parameter of the graph: expected a param node")
        _check_node(graph, p.node)
        name = p.attrs["name"]
        if declared.setdefault(name, p.node) is not p.node or times[p] > 1:
            _fail(graph, p.node, f"expected one parameter %{name}, found more: names repeat")
    constants: dict[str, TensorType] = {}
    for node in graph.nodes():
        if node.op is param and declared.get(node.attrs["name"]) is not node:
            name = node.attrs["name"]
            _fail(graph, node, f"expected a declared parameter, found %{name}, which is none")
        _check_node(graph, node)
        if node.op is constant:
            name = node.attrs["name"]
            known = constants.setdefault(name, node.types[0])
            if known != node.types[0]:
                found = node.types[0]
                _fail(graph, node, f"weight @{name}: expected {known} as elsewhere, found {found}")
    for root in graph.roots:
        if not 0 <= root.index < len(root.node.types):
            _fail(graph, root.node, f"expected a result to return, found no result {root.index}")
    for name, value in graph.updates.items():
        if name not in declared:
            _fail(graph, value.node, f"expected a parameter to update, found no parameter %{name}")
        expected = declared[name].types[0]
        if value.type != expected:
            _fail(graph, value.node, f"update of %{name}: expected {expected}, found {value.type}")


def _check_node(graph: Graph, node: Node) -> None:
    for arg in node.args:
        if not 0 <= arg.index < len(arg.node.types):
            found = f"{arg.op.name} has no result {arg.index}"
            _fail(graph, node, f"expected results of earlier nodes as arguments, found {found}")
    for key, value in node.attrs.items():
        if not _is_attribute(value):
            _fail(graph, node, f"{key}: expected {_ATTRIBUTES}, found {value!r}")
    inferred = _inferred(graph, node)
    if inferred != node.types:
        expected, found = (", ".join(map(str, t)) for t in (inferred, node.types))
        _fail(graph, node, f"expected results {expected}, found {found}")
    for shown, used in (
        *((str(t), free_symbols(t.shape)) for t in node.types),
        *((f"{k}={v}", attr_symbols(v)) for k, v in node.attrs.items()),
    ):
        if unknown := sorted(used - graph.symbols.keys()):
            known = ", ".join(graph.symbols) or "none"
            _fail(
                graph, node, f"expected symbols of the graph ({known}), found {unknown} in {shown}"
            )


def _inferred(graph: Graph, node: Node) -> Types:
    try:
        required, optional = node.taken([a.type for a in node.args])
        return node.op.types(required, {**optional, **node.attrs})
    except VerifyError as error:
        _fail(graph, node, str(error).removeprefix(f"{node.op.name}: "))


def _is_attribute(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_attribute, value))
    return value is None or isinstance(value, _ATTRIBUTE_TYPES)


def _fail(graph: Graph, node: Node | None, message: str) -> NoReturn:
    place = node.op.name if node else f"graph @{graph.name}"
    raise VerifyError(f"{place}: {message}\n{excerpt(graph, node)}")


def excerpt(graph: Graph, node: Node | None) -> str:
    """The lines of the textual IR around `node`, which is marked with >.

    A node without a line of its own is shown where it is first used, else at the head of the graph.
    """
    lines, at = text_lines(graph)
    if node is not None and node not in at:
        node = next((n for n in at if any(a.node is node for a in n.args)), None)
    here = 0 if node is None else at[node]
    first = max(0, here - _CONTEXT)
    shown = lines[first : here + _CONTEXT + 1]
    return "\n".join(f"{'>' if first + i == here else ' '} {row}" for i, row in enumerate(shown))
