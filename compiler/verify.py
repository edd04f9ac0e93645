"""The verifier: every rule of the IR, checked over a whole graph."""

from __future__ import annotations

from .ir import Graph, Node, text_lines
from .ops.leaf import constant, param
from .types import TensorType, VerifyError, free_symbols

_CONTEXT = 10


def verify(graph: Graph) -> None:
    """Raise VerifyError, naming node, expectation and finding, at the first broken rule.

    Checked: every node's types are what its op infers; parameters are declared once and used as
    declared; dims use declared symbols only; one name is one weight of one type; an update has its
    parameter's type.
    """
    declared = {p.node for p in graph.params}
    names = [p.node.attrs["name"] for p in graph.params]
    if len(set(names)) != len(names):
        raise VerifyError(f"graph @{graph.name}: parameter names repeat: {sorted(names)}")
    constants: dict[str, TensorType] = {}
    for p in graph.params:
        _check_node(graph, p.node)
    for node in graph.nodes():
        if node.op is param and node not in declared:
            _fail(graph, node, f"%{node.attrs['name']} is not a parameter of the graph")
        if node.op is constant:
            known = constants.setdefault(node.attrs["name"], node.types[0])
            if known != node.types[0]:
                _fail(graph, node, f"weight @{node.attrs['name']} is {known} elsewhere")
        _check_node(graph, node)
    for name, value in graph.updates.items():
        if name not in names or graph.param(name).type != value.type:
            raise VerifyError(f"graph @{graph.name}: update of %{name} with a {value.type}")


def _check_node(graph: Graph, node: Node) -> None:
    for arg in node.args:
        if not 0 <= arg.index < len(arg.node.types):
            _fail(graph, node, f"{arg.op.name} has no result {arg.index}")
    try:
        inferred = node.op.infer(*(a.type for a in node.args), **node.attrs)
    except (VerifyError, TypeError) as error:
        _fail(graph, node, str(error))
    if inferred != node.types:
        expected, found = (", ".join(map(str, t)) for t in (inferred, node.types))
        _fail(graph, node, f"expected results {expected}, found {found}")
    for type_ in node.types:
        if unknown := free_symbols(type_.shape) - graph.symbols.keys():
            _fail(graph, node, f"{type_} uses undeclared symbols {sorted(unknown)}")


def _fail(graph: Graph, node: Node, message: str) -> None:
    raise VerifyError(f"{node.op.name}: {message}\n{excerpt(graph, node)}")


def excerpt(graph: Graph, node: Node) -> str:
    """The lines of the textual IR around `node`, which is marked with >."""
    lines, at = text_lines(graph)
    if node not in at:
        users = [n for n in graph.nodes() if any(a.node is node for a in n.args)]
        return f"in graph @{graph.name}, used by {', '.join(n.op.name for n in users) or 'nothing'}"
    here = at[node]
    first = max(0, here - _CONTEXT)
    shown = lines[first : here + _CONTEXT + 1]
    return "\n".join(f"{'>' if first + i == here else ' '} {row}" for i, row in enumerate(shown))
