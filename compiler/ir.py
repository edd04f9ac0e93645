"""The IR: ops, nodes, values and graphs. Immutable; a rewrite builds a new graph that shares nodes.

State is values: a graph maps parameters to outputs, and `updates` says which value becomes the
next content of which parameter (a KV cache, say). There are no side effects and no ordering edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy

from .axes import Axes, AxisRule
from .dtypes import DTYPES
from .types import Dim, TensorType, Types, VerifyError, attr_symbols, evaluate, free_symbols


@dataclass(frozen=True, slots=True)
class Cost:
    """Price of one node: floating-point operations, and bytes with each operand moved once."""

    flops: Dim
    bytes: Dim

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Sample:
    """Arguments that exercise an op: types (symbols allowed) and attributes.

    Integer arguments are drawn from [0, `high`); entries of `attrs` are passed as they are.
    """

    args: tuple[TensorType, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    high: int = 2


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed |a - b| relative to max |b|, by dtype of the result."""

    f64: float = 1e-12
    f32: float = 1e-5
    f16: float = 4e-3
    bf16: float = 3e-2

    def of(self, dtype: str) -> float:
        return getattr(self, dtype, 0.0)


def moved_bytes(args: Types, results: Types, **attrs: Any) -> Cost:
    """The default cost: no arithmetic worth counting, every operand moved once."""
    return Cost(0, sum((t.nbytes for t in (*args, *results)), 0))


def _given(args: Types, attrs: Mapping[str, Any]) -> str:
    return f"({', '.join([*map(str, args), *(f'{k}={v}' for k, v in attrs.items())])})"


@dataclass(frozen=True, eq=False)
class Op:
    """One operation: type rule, meaning, price, samples and tolerance, registered once by name.

    `infer(*types, **attrs)` gives the result types or raises VerifyError.
    `reference(*tensors, **attrs)` is the meaning, in torch; attrs come with all dims bound.
    `cost(arg_types, result_types, **attrs)` prices one node.
    `inplace`, where given, computes the op by writing result i into argument i for every result:
    the planner may then donate those arguments' memory.
    `stored`, where given, is the form in which others read the op's result: they are priced by it.
    `domain` says, by position, which numbers stand in integer arguments, where that is not any.
    `axes`, where given, is how dims of operands and results correspond (see axes.py): an op without
    is opaque to passes that slice, gather, permute or shard.
    `collective` says that ranks exchange data: `reference` takes a `communicator` beside attrs.
    """

    name: str
    infer: Callable[..., Types]
    reference: Callable[..., tuple[Any, ...]]
    cost: Callable[..., Cost] = moved_bytes
    samples: tuple[Sample, ...] = ()
    axes: AxisRule | None = None
    tolerance: Tolerance = Tolerance()
    commutative: bool = False
    inplace: Callable[..., None] | None = None
    stored: Callable[[Node], TensorType] | None = None
    domain: Mapping[int, range] = field(default_factory=dict[int, range])
    collective: bool = False

    registry: ClassVar[dict[str, Op]] = {}

    def __post_init__(self) -> None:
        if self.name in self.registry:
            raise ValueError(f"op {self.name!r} is already registered")
        self.registry[self.name] = self

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Op:
        return self

    def types(self, args: Types, attrs: Mapping[str, Any]) -> Types:
        """What `infer` gives; VerifyError names the op, what it expected and what came."""
        try:
            types = self.infer(*args, **attrs)
        except (TypeError, ValueError, IndexError, KeyError, ZeroDivisionError) as error:
            raise VerifyError(f"{self.name}: cannot take {_given(args, attrs)}: {error}") from error
        for type_ in types:
            if type_.dtype not in DTYPES:
                known = ", ".join(DTYPES)
                raise VerifyError(f"{self.name}: dtype is one of {known}; found {type_.dtype!r}")
            if any(isinstance(d, int) and d < 0 for d in type_.shape):
                raise VerifyError(
                    f"{self.name}: expected dims of at least 0, found {type_} of "
                    f"{_given(args, attrs)}"
                )
        return types

    def node(self, args: tuple[Value, ...], attrs: Mapping[str, Any], source: str = "") -> Node:
        """A checked node; VerifyError names the op, what it expected and what came."""
        types = self.types(tuple(a.type for a in args), attrs)
        return Node(self, args, dict(attrs), types, source)

    def all(self, /, *args: Value, **attrs: Any) -> tuple[Value, ...]:
        """Apply the op; every result."""
        return self.node(args, attrs).results

    def __call__(self, /, *args: Value, **attrs: Any) -> Value:
        """Apply an op that has one result."""
        (value,) = self.all(*args, **attrs)
        return value


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """An op applied to values. Immutable; compared by identity.

    `source` is where the model says this: a module path or a source line.
    """

    op: Op
    args: tuple[Value, ...]
    attrs: Mapping[str, Any]
    types: Types
    source: str = ""

    # A node stands for all that it is computed from: neither is shown or copied with it.
    def __repr__(self) -> str:
        attrs = "".join(f" {k}={show_attr(v)}" for k, v in self.attrs.items())
        return f"<{self.op.name}{attrs} : {', '.join(map(str, self.types))}>"

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Node:
        return self

    @property
    def results(self) -> tuple[Value, ...]:
        return tuple(Value(self, i) for i in range(len(self.types)))

    @property
    def is_symbolic(self) -> bool:
        """Whether a symbol stands in the node's types or attributes."""
        shapes = any(free_symbols(t.shape) for t in self.types)
        return shapes or any(attr_symbols(v) for v in self.attrs.values())

    @property
    def axes(self) -> Axes | None:
        """How dims of operands and results correspond; None for an op without an axis rule."""
        rule = self.op.axes
        return rule(tuple(a.type for a in self.args), self.types, self.attrs) if rule else None

    @property
    def cost(self) -> Cost:
        """Flops and bytes, in the symbols of the graph."""
        return self.op.cost(tuple(a.stored for a in self.args), self.types, **self.attrs)


@dataclass(frozen=True, slots=True)
class Value:
    """One result of one node."""

    node: Node
    index: int = 0

    @property
    def type(self) -> TensorType:
        return self.node.types[self.index]

    @property
    def stored(self) -> TensorType:
        """The type by which a read of this value is priced: its own, or its packed form's."""
        return self.op.stored(self.node) if self.op.stored else self.type

    @property
    def op(self) -> Op:
        return self.node.op

    @property
    def attrs(self) -> Mapping[str, Any]:
        return self.node.attrs


@dataclass(frozen=True)
class Graph:
    """Parameters in, values out. `symbols` gives every named dim its range.

    `updates` maps the name of a parameter to the value that it holds after the graph ran.
    """

    name: str
    params: tuple[Value, ...]
    outputs: tuple[Value, ...]
    symbols: Mapping[str, range] = field(default_factory=dict[str, range], hash=False)
    updates: Mapping[str, Value] = field(default_factory=dict[str, Value], hash=False)

    @property
    def roots(self) -> tuple[Value, ...]:
        """Every value that the graph is there to compute: outputs, then updates."""
        return (*self.outputs, *self.updates.values())

    def nodes(self) -> Iterator[Node]:
        """Every node that the roots need, once, arguments before users."""
        return walk(self.roots)

    def param(self, name: str) -> Value:
        """The parameter called `name`; KeyError lists those there are."""
        for value in self.params:
            if value.node.attrs["name"] == name:
                return value
        raise KeyError(f"graph @{self.name} has no parameter {name!r}, only {param_names(self)}")

    def users(self) -> dict[Value, list[Node]]:
        """Value to the nodes that take it as an argument."""
        users: dict[Value, list[Node]] = {}
        for node in self.nodes():
            for arg in dict.fromkeys(node.args):
                users.setdefault(arg, []).append(node)
        return users

    def constants(self) -> set[Node]:
        """Nodes that depend on weights and literals alone, so that they are computed only once."""
        found: set[Node] = set()
        for node in self.nodes():
            fixed = node.op.name != "param" and not node.is_symbolic
            if fixed and all(a.node in found for a in node.args):
                found.add(node)
        return found

    def cost(self, binding: Mapping[str, int]) -> Cost:
        """Flops and bytes of one run with every symbol bound; KeyError for an unbound symbol.

        What depends on weights alone was computed before the run.
        """
        folded = self.constants()
        costs = [node.cost for node in self.nodes() if node not in folded]
        return Cost(
            sum(evaluate(sympy.sympify(c.flops), binding) for c in costs),
            sum(evaluate(sympy.sympify(c.bytes), binding) for c in costs),
        )

    def __str__(self) -> str:
        """The textual form, complete: `text.parse` reads it back."""
        return "\n".join(text_lines(self)[0])


def walk(
    roots: tuple[Value, ...], is_leaf: Callable[[Node], bool] = lambda node: False
) -> Iterator[Node]:
    """Every node that `roots` need, once, arguments before users, in a stable order.

    A leaf is taken without its arguments.
    """
    done: set[Node] = set()
    stack = [(root.node, False) for root in reversed(roots)]
    while stack:
        node, args_done = stack.pop()
        if node in done:
            continue
        if args_done:
            done.add(node)
            yield node
        else:
            stack.append((node, True))
            if is_leaf(node):
                continue
            stack.extend((arg.node, False) for arg in reversed(node.args) if arg.node not in done)


def param_names(graph: Graph) -> list[str]:
    return [p.node.attrs["name"] for p in graph.params]


# Nodes of these ops are written where they are used; they have no line of their own.
INLINE = ("param", "constant", "literal")


def section_of(source: str) -> str:
    """The part of a source that heads a section of text: a module path, cut below its layer's
    children (`model.layers.3.self_attn.q_proj @model.py:7` gives `model.layers.3.self_attn`).
    """
    parts = source.split(" @")[0].split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: layer + 2])


def show_attr(value: Any) -> str:
    """An attribute as text: dims bare, tuples in brackets, strings quoted."""
    if isinstance(value, tuple):
        return f"[{', '.join(show_attr(v) for v in value)}]"
    return repr(value) if isinstance(value, str) else str(value)


def show_inline(value: Value) -> str:
    """How a parameter, constant or literal is written as an argument.

    Anything else is out of place here: errors show it as %?op.index.
    """
    attrs = value.attrs
    if value.op.name == "param":
        return f"%{attrs['name']}"
    if value.op.name == "constant":
        return f"@{attrs['name']}"
    if value.op.name == "literal":
        return f"{attrs['dtype']}({attrs['value']})"
    return f"%?{value.op.name}.{value.index}"


def show_node(node: Node, names: Mapping[Value, str]) -> str:
    """One line of the textual form: results = op(arguments, attributes) : types."""
    args = [names[a] if a in names else show_inline(a) for a in node.args]
    attrs = [f"{k}={show_attr(v)}" for k, v in node.attrs.items()]
    return (
        f"{', '.join(names[r] for r in node.results)} = {node.op.name}({', '.join(args + attrs)})"
        f" : {', '.join(map(str, node.types))}"
    )


def text_lines(graph: Graph) -> tuple[list[str], dict[Node, int]]:
    """The lines of the textual form, and the index of the line of each node that has one."""
    symbols = "".join(f" {n}={r.start}..{r.stop - 1}" for n, r in graph.symbols.items())
    params = ", ".join(f"{show_inline(p)}: {p.type}" for p in graph.params)
    lines = [f"graph @{graph.name}({params}){symbols} {{"]
    at: dict[Node, int] = {}
    names: dict[Value, str] = {}
    constants: dict[str, TensorType] = {}
    section, count = "", 0
    for node in graph.nodes():
        if node.op.name == "constant":
            constants[node.attrs["name"]] = node.types[0]
        if node.op.name in INLINE:
            continue
        if (here := section_of(node.source)) and here != section:
            section = here
            lines += ["", f"  # {section}"] if at else [f"  # {section}"]
        for result in node.results:
            names[result] = f"%{count}"
            count += 1
        at[node] = len(lines)
        lines.append(f"  {show_node(node, names)}")
    refer = {v: names[v] if v in names else show_inline(v) for v in graph.roots}
    lines.append(f"  return {', '.join(refer[v] for v in graph.outputs)}")
    lines += [f"  update %{name} = {refer[v]}" for name, v in graph.updates.items()]
    if not constants:
        return [*lines, "}"], at
    lines.append("} where {")
    lines += [f"  @{name}: {type_}" for name, type_ in sorted(constants.items())]
    return [*lines, "}"], at
