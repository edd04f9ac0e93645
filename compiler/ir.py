"""The IR: ops, nodes, values and graphs. Immutable; a rewrite builds a new graph that shares nodes.

State is values: a graph maps parameters to outputs, and `updates` says which value becomes the
next content of which parameter (a KV cache, say). There are no side effects and no ordering edges.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar

import sympy

from .attribute_kinds import KINDS, Kind
from .axes import Axes, AxisRule, Operands
from .dtypes import DTYPES
from .types import Dim, TensorType, Types, VerifyError, attr_symbols, evaluate, free_symbols

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cost:
    """Price of one node: floating-point operations, and bytes with each operand moved once."""

    flops: Dim
    bytes: Dim

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Sample:
    """Operands and attributes that exercise an op; types may have symbols.

    `args` are the types of its required operands, `named` those of optional ones and attributes.
    Integer operands are drawn from [0, `high`).
    """

    args: tuple[TensorType, ...]
    named: Mapping[str, Any] = field(default_factory=dict[str, Any])
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


def moved(operands: Operands, results: Types) -> Dim:
    """Bytes of every operand and result, each moved once."""
    return sum((t.nbytes for t in (*operands.values(), *results)), 0)


def moved_bytes(operands: Operands, results: Types, **attrs: Any) -> Cost:
    """The default cost: no arithmetic worth counting, every operand moved once."""
    return Cost(0, moved(operands, results))


def free(operands: Operands, results: Types, **attrs: Any) -> Cost:
    """The cost of what neither computes nor moves anything."""
    return Cost(0, 0)


def per_element(flops: int, of: str = "") -> Callable[..., Cost]:
    """A cost of so many flops for each element of operand `of`, without one of the first result."""

    def cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
        elements = (operands[of] if of else results[0]).numel
        return Cost(flops * elements, moved(operands, results))

    return cost


def _schema(name: str, infer: Callable[..., Types]) -> tuple[str, ...]:
    """The operands that `infer` takes, see `Op.operands`; ValueError where that is not clear."""
    operands: list[str] = []
    for parameter in inspect.signature(infer).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            operands.append(f"{parameter.name}*")
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            if parameter.default is not parameter.empty:
                raise ValueError(
                    f"op {name}: expected optional operands as keywords of infer, found {parameter}"
                )
            operands.append(parameter.name)
        elif parameter.annotation == "TensorType | None":
            operands.append(f"{parameter.name}?")
    if {"*", "?"} <= {operand[-1] for operand in operands}:
        raise ValueError(f"op {name}: expected any number of operands or optional ones, found both")
    return tuple(operands)


class _Attributes(NamedTuple):
    """The attributes that `infer` takes, by name, and which of them must be there; `open` says that
    it takes others, too, and checks them itself."""

    kinds: Mapping[str, Kind]
    needed: tuple[str, ...]
    open: bool


def _attributes(name: str, infer: Callable[..., Types]) -> _Attributes:
    """What `infer` says of attributes; ValueError for an annotation that is no kind."""
    taken = inspect.signature(infer).parameters.values()
    named = [p for p in taken if p.kind is p.KEYWORD_ONLY and p.annotation != "TensorType | None"]
    for p in named:
        if p.annotation not in KINDS:
            raise ValueError(f"op {name}: expected {p.name} of {', '.join(KINDS)}; found {p}")
    return _Attributes(
        {p.name: KINDS[p.annotation] for p in named},
        tuple(p.name for p in named if p.default is p.empty),
        any(p.kind is p.VAR_KEYWORD for p in taken),
    )


def _call(args: Types, named: Mapping[str, Any]) -> str:
    return f"({', '.join([*map(str, args), *(f'{k}={v}' for k, v in named.items())])})"


@dataclass(frozen=True, eq=False)
class Op:
    """One operation: type rule, meaning, price, samples and tolerance, registered once by name.

    `infer(*types, **named)` gives the result types or raises VerifyError.
    `meaning(*tensors, **named)` computes them in torch: one tensor, or several in a tuple (callers
    take `reference`, which always gives a tuple); attributes come with all dims bound.
    Both take required operands in order, and by name attributes and the optional operands that a
    node has. The signature of `infer` is the op's schema (see `operands`).
    `cost(operands, result_types, **attrs)` prices one node; `operands` are types by name.
    `inplace`, where given, computes the op by writing result i into argument i for every result:
    the planner may then donate those arguments' memory.
    `caches` names, for each of the first results, the optional operand into which its rows may be
    appended: what these hold next are the last results (see `Node.appends`).
    `stored`, where given, is the form in which others read the op's result: they are priced by it.
    `domain` says, by operand, which numbers stand in integers, where that is not any.
    `axes`, where given, is how dims of operands and results correspond (see axes.py): an op without
    is opaque to passes that slice, gather, permute or shard.
    `collective` says that ranks exchange data: `meaning` takes a `communicator` beside attrs.
    """

    name: str
    infer: Callable[..., Types]
    meaning: Callable[..., Any]
    cost: Callable[..., Cost] = moved_bytes
    samples: tuple[Sample, ...] = ()
    axes: AxisRule | None = None
    tolerance: Tolerance = Tolerance()
    commutative: bool = False
    inplace: Callable[..., None] | None = None
    caches: tuple[str, ...] = ()
    stored: Callable[[Node], TensorType] | None = None
    domain: Mapping[str, range] = field(default_factory=dict[str, range])
    collective: bool = False

    registry: ClassVar[dict[str, Op]] = {}

    def __post_init__(self) -> None:
        if self.name in self.registry:
            raise ValueError(f"op {self.name!r} is already registered")
        _ = self.attributes  # ValueError where `infer` has one of no kind
        taken = inspect.signature(self.meaning).parameters if self.optional else {}
        any_name = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        if unknown := [name for name in self.optional if name not in taken and not any_name]:
            raise ValueError(f"op {self.name}: its reference does not take {', '.join(unknown)}")
        self.registry[self.name] = self

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Op:
        return self

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands in order: `name` a required one, `name?` optional, `name*` any
        number.

        They are the parameters of `infer`: positional ones are required, keywords of the type
        `TensorType | None` optional, as in torch.library.infer_schema.
        """
        return _schema(self.name, self.infer)

    @cached_property
    def attributes(self) -> _Attributes:
        """The kinds of the attributes by name, from the annotations of `infer`."""
        return _attributes(self.name, self.infer)

    @cached_property
    def required(self) -> tuple[str, ...]:
        return tuple(name for name in self.operands if name[-1] not in "?*")

    @cached_property
    def optional(self) -> tuple[str, ...]:
        return tuple(name[:-1] for name in self.operands if name[-1] == "?")

    @property
    def is_variadic(self) -> bool:
        return self.operands[-1:] != () and self.operands[-1][-1] == "*"

    def by_name(self, args: Sequence[T], given: tuple[str, ...] = ()) -> dict[str, T]:
        """`args` by the names of the operands: required ones, then the optional ones in `given`.

        Of any number of operands `xs*` the names are xs[0], xs[1], …
        """
        more = len(args) - len(self.required) - len(given)
        several = (f"{self.operands[-1][:-1]}[{i}]" for i in range(more))
        return dict(zip((*self.required, *several, *given), args, strict=True))

    def reference(self, /, *tensors: Any, **named: Any) -> tuple[Any, ...]:
        """The results, computed as `meaning` says; attributes come with all dims bound."""
        results = self.meaning(*tensors, **named)
        return tuple(results) if isinstance(results, tuple | list) else (results,)

    def types(self, args: Types, named: Mapping[str, Any]) -> Types:
        """What `infer` gives; VerifyError names the op, what it expected and what came.

        `args` are the required operands, `named` the optional ones and attributes.
        """
        missing = len(args) - len(self.required)
        if missing < 0 or (missing and not self.is_variadic):
            expected = ", ".join(self.operands) or "no operands"
            raise VerifyError(f"{self.name}: expected {expected}; found {_call(args, named)}")
        self._check_attributes(named)
        try:
            types = self.infer(*args, **named)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise VerifyError(f"{self.name}: cannot take {_call(args, named)}: {error}") from error
        for type_ in types:
            if type_.dtype not in DTYPES:
                known = ", ".join(DTYPES)
                raise VerifyError(f"{self.name}: dtype is one of {known}; found {type_.dtype!r}")
            if any(isinstance(d, int) and d < 0 for d in type_.shape):
                raise VerifyError(
                    f"{self.name}: expected dims of at least 0, found {type_} of "
                    f"{_call(args, named)}"
                )
        return types

    def _check_attributes(self, named: Mapping[str, Any]) -> None:
        kinds, needed, is_open = self.attributes
        for name, value in named.items():
            if name in self.optional:
                continue
            if name in kinds:
                if not kinds[name].takes(value):
                    raise VerifyError(
                        f"{self.name}: expected {kinds[name].words} for {name}, found {value!r:.80}"
                    )
            elif not is_open:
                known = ", ".join((*kinds, *self.optional)) or "none"
                raise VerifyError(
                    f"{self.name}: expected attributes among {known}; found {name}={value!r:.80}"
                )
        if missing := [name for name in needed if name not in named]:
            raise VerifyError(f"{self.name}: expected {missing[0]}, an attribute; found none")

    def node(self, args: Sequence[Value], named: Mapping[str, Any], source: str = "") -> Node:
        """A checked node; VerifyError names the op, what it expected and what came.

        `args` are the required operands, `named` the optional ones (None is none) and attributes.
        """
        given = tuple(name for name in self.optional if named.get(name) is not None)
        optional = {name: named[name] for name in given}
        attrs = {name: value for name, value in named.items() if name not in self.optional}
        for name, value in (*optional.items(), *attrs.items()):
            if isinstance(value, Value) != (name in given):
                expected = ", ".join(self.optional) or "none"
                raise VerifyError(
                    f"{self.name}: expected values for its optional operands, {expected}; "
                    f"found {name}={value.type if isinstance(value, Value) else value}"
                )
        types = self.types(
            tuple(a.type for a in args), {**{n: v.type for n, v in optional.items()}, **attrs}
        )
        return Node(self, (*args, *optional.values()), attrs, types, source, given)

    def all(self, /, *args: Value, **named: Any) -> tuple[Value, ...]:
        """Apply the op; every result. Keywords are optional operands (None is none), attributes."""
        return self.node(args, named).results

    def __call__(self, /, *args: Value, **named: Any) -> Value:
        """Apply an op that has one result."""
        (value,) = self.all(*args, **named)
        return value


class Appended(NamedTuple):
    """Rows that a node writes into a paged cache: result `row` goes to operand `cache`, whose next
    content is result `updated`."""

    row: int
    cache: int
    updated: int


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """An op applied to values. Immutable; compared by identity.

    `args` are the operands that are there, in the order of the op's schema: the optional ones last,
    which `given` names. `source` is where the model says this: a module path or a source line.
    `is_constant` says that it is computed from weights and literals alone: it can be folded.
    """

    op: Op
    args: tuple[Value, ...]
    attrs: Mapping[str, Any]
    types: Types
    source: str = ""
    given: tuple[str, ...] = ()
    is_constant: bool = field(init=False)

    def __post_init__(self) -> None:
        computed = self.op.name != "param" and all(a.node.is_constant for a in self.args)
        object.__setattr__(self, "is_constant", computed and not self.is_symbolic)

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
    def operands(self) -> Mapping[str, Value]:
        """The operands that are there, by name (see `Op.by_name`)."""
        return self.op.by_name(self.args, self.given)

    def operand(self, name: str) -> Value | None:
        """The operand called `name`, None if it is not there. KeyError if the op has no such."""
        if name not in self.given and name in self.op.optional:
            return None
        return self.operands[name]

    def index_of(self, name: str) -> int:
        """Where in `args` the operand called `name` is; ValueError if it is not there."""
        return [*self.operands].index(name)

    def taken(self, items: Sequence[T]) -> tuple[tuple[T, ...], dict[str, T]]:
        """`items`, one for each of `args`, as the op takes them: in order, and by name."""
        first = len(self.args) - len(self.given)
        return tuple(items[:first]), dict(zip(self.given, items[first:], strict=True))

    def rebuilt(self, args: Sequence[Value], attrs: Mapping[str, Any] | None = None) -> Node:
        """The node over `args`, the same operands as its own, checked anew."""
        if self.op.is_variadic:
            return self.op.node(args, self.attrs if attrs is None else attrs, self.source)
        required, optional = self.taken(args)
        named = {**optional, **(self.attrs if attrs is None else attrs)}
        return self.op.node(required, named, self.source)

    def replace(self, **changes: Any) -> Node:
        """The node with these operands and attributes in place of its own or beside them.

        None takes one away.
        """
        named = {**self.operands, **self.attrs, **changes}
        required = tuple(named.pop(name) for name in self.op.required)
        kept = {name: value for name, value in named.items() if value is not None}
        return self.op.node(required, kept, self.source)

    @property
    def appends(self) -> tuple[Appended, ...]:
        """The results that the node appends to caches, in order."""
        rows = [i for i, name in enumerate(self.op.caches) if name in self.given]
        first = len(self.types) - len(rows)
        return tuple(
            Appended(row, self.index_of(self.op.caches[row]), first + i)
            for i, row in enumerate(rows)
        )

    @property
    def is_symbolic(self) -> bool:
        """Whether a symbol stands in the node's types or attributes."""
        shapes = any(free_symbols(t.shape) for t in self.types)
        return shapes or any(attr_symbols(v) for v in self.attrs.values())

    @property
    def axes(self) -> Axes | None:
        """How dims of operands and results correspond; None for an op without an axis rule."""
        rule = self.op.axes
        if rule is None:
            return None
        return rule({name: v.type for name, v in self.operands.items()}, self.types, self.attrs)

    @property
    def cost(self) -> Cost:
        """Flops and bytes, in the symbols of the graph."""
        operands = {name: value.stored for name, value in self.operands.items()}
        return self.op.cost(operands, self.types, **self.attrs)


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

    `updates` maps the name of a parameter to the value that it holds after the graph ran: it is
    state, which stays. One whose shape has symbols is fed: an input, which a run leaves for the
    next one of the same sizes.
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

    @property
    def state(self) -> tuple[str, ...]:
        """The updated parameters that are state."""
        return tuple(n for n in self.updates if not free_symbols(self.param(n).type.shape))

    @property
    def fed(self) -> tuple[str, ...]:
        """The updated parameters that are inputs."""
        return tuple(n for n in self.updates if free_symbols(self.param(n).type.shape))

    def nodes(self) -> Iterator[Node]:
        """Every node that the roots need, once, arguments before users."""
        return walk(self.roots)

    def param(self, name: str) -> Value:
        """The parameter called `name`; KeyError lists those there are."""
        if name in self._by_name:
            return self._by_name[name]
        raise KeyError(f"graph @{self.name} has no parameter {name!r}, only {param_names(self)}")

    @cached_property
    def _by_name(self) -> Mapping[str, Value]:
        """The parameters; of those that share a name the first."""
        return {p.node.attrs["name"]: p for p in reversed(self.params)}

    def users(self) -> dict[Value, list[Node]]:
        """Value to the nodes that take it as an argument."""
        users: dict[Value, list[Node]] = {}
        for node in self.nodes():
            for arg in dict.fromkeys(node.args):
                users.setdefault(arg, []).append(node)
        return users

    def use_counts(self) -> Counter[Value]:
        """How often each value is read, by nodes and as a root."""
        uses = Counter(a for node in self.nodes() for a in node.args)
        uses.update(self.roots)
        return uses

    def constants(self) -> set[Node]:
        """Nodes that depend on weights and literals alone, so that they are computed only once."""
        return {node for node in self.nodes() if node.is_constant}

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
    arguments = show_arguments(node, lambda a: names[a] if a in names else show_inline(a))
    return (
        f"{', '.join(names[r] for r in node.results)} = {node.op.name}({', '.join(arguments)})"
        f" : {', '.join(map(str, node.types))}"
    )


def show_arguments(
    node: Node, operand: Callable[[Value], str], attribute: Callable[[Any], str] = show_attr
) -> list[str]:
    """What stands in the brackets of a node: operands, optional ones by name, then attributes."""
    required, optional = node.taken([operand(a) for a in node.args])
    attrs = {name: attribute(value) for name, value in node.attrs.items()}
    return [*required, *(f"{name}={shown}" for name, shown in (optional | attrs).items())]


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
