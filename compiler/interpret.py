"""Running a graph through the references: the meaning of the IR and the oracle of all tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from .ir import Graph, Node, Value
from .ops.collective import Communicator
from .ops.leaf import constant, param
from .ops.shape import view
from .torch_types import dtype_name, literals_as_tensors, torch_dtype
from .types import TensorType, VerifyError, bind_attr, evaluate, free_symbols
from .weights import Weights


@dataclass(frozen=True)
class Results:
    """What one run gave: the outputs in order, and the new content of each updated parameter."""

    outputs: tuple[torch.Tensor, ...]
    updates: dict[str, torch.Tensor]


def bind_symbols(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The value of every symbol, from the shapes of the parameters by name.

    ValueError names a parameter whose shape does not fit, or a symbol out of its range.
    """
    binding: dict[str, int] = {}
    for p in graph.params:
        name, type_ = p.attrs["name"], p.type
        if name not in shapes or len(shapes[name]) != type_.rank:
            found = list(shapes[name]) if name in shapes else "nothing"
            raise ValueError(f"parameter %{name}: expected {type_}, found {found}")
        for d, size in zip(type_.shape, shapes[name], strict=True):
            if not isinstance(d, int) and d.is_Symbol:
                binding.setdefault(str(d), size)
    for p in graph.params:
        name, type_ = p.attrs["name"], p.type
        if not free_symbols(type_.shape) <= binding.keys():
            raise ValueError(f"parameter %{name}: no parameter's shape gives all of {type_}")
        if type_.bind(binding).shape != tuple(shapes[name]):
            raise ValueError(f"parameter %{name}: expected {type_}, found {list(shapes[name])}")
    if missing := sorted(graph.symbols.keys() - binding.keys()):
        raise ValueError(f"no parameter's shape gives the symbols {', '.join(missing)}")
    for name, size in binding.items():
        if name not in graph.symbols:
            raise ValueError(f"{name} is not a symbol of graph @{graph.name}")
        if size not in graph.symbols[name]:
            bounds = graph.symbols[name]
            raise ValueError(f"{name} = {size} is not in {bounds.start}..{bounds.stop - 1}")
    return binding


def compute(
    node: Node,
    args: tuple[Any, ...],
    binding: Mapping[str, int],
    communicator: Communicator | None = None,
) -> tuple[Any, ...]:
    """One node through its reference; VerifyError when a result is not what its type says.

    `communicator` is this rank's way to the others, for collectives.
    """
    given = literals_as_tensors(args, [a.type.dtype for a in node.args])
    required, optional = node.taken(given)
    line = {"communicator": communicator} if node.op.collective else {}
    results = node.op.reference(*required, **optional, **_attrs(node, binding), **line)
    for result, type_ in zip(results, node.types, strict=True):
        if isinstance(result, torch.Tensor):
            expected = type_.bind(binding)
            if (dtype_name(result.dtype), tuple(result.shape)) != (expected.dtype, expected.shape):
                found = f"{dtype_name(result.dtype)}{list(result.shape)}"
                raise VerifyError(f"{node.op.name}: reference gave {found}, not {expected}")
    return results


def _attrs(node: Node, binding: Mapping[str, int]) -> dict[str, Any]:
    return {k: bind_attr(v, binding) for k, v in node.attrs.items()}


class Interpreter:
    """A graph that is run again and again: its nodes in order, and what is let go after each."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._nodes = list(graph.nodes())
        last = {a.node: i for i, n in enumerate(self._nodes) for a in n.args}
        kept = {r.node for r in graph.roots}
        ends = {node: i for node, i in last.items() if node not in kept}
        self._dead = [
            {v for a in node.args if ends.get(a.node) == i for v in a.node.results}
            for i, node in enumerate(self._nodes)
        ]
        self._touched: dict[tuple[tuple[str, int], ...], int] = {}
        state = frozenset(map(graph.param, graph.state))
        self._in_place = {n for n in in_place_nodes(graph, self._nodes, state) if n.op.inplace}

    def run(
        self,
        params: Mapping[str, torch.Tensor],
        constants: Callable[[Node], torch.Tensor],
        binding: Mapping[str, int],
        communicator: Communicator | None = None,
        *,
        in_place: bool = False,
    ) -> Results:
        """Run every node's reference once, and free values after their last use.

        With `in_place` ops write into the parameters that are state, where nothing else reads
        these: the update is then the parameter itself. `constants` gives weights.
        """
        values: dict[Value, Any] = {}
        for node, dead in zip(self._nodes, self._dead, strict=True):
            if node.op is param:
                values[Value(node)] = params[node.attrs["name"]]
            elif node.op is constant:
                values[Value(node)] = constants(node)
            else:
                args = tuple(values[a] for a in node.args)
                if in_place and node in self._in_place:
                    assert node.op.inplace is not None
                    node.op.inplace(*args, **_attrs(node, binding))
                    results = args[: len(node.types)]
                else:
                    results = compute(node, args, binding, communicator)
                values.update(zip(node.results, results, strict=True))
            for value in dead:
                del values[value]
        return Results(
            tuple(values[o] for o in self.graph.outputs),
            {name: values[v] for name, v in self.graph.updates.items()},
        )

    def touched_bytes(self, binding: Mapping[str, int]) -> int:
        """Bytes that a run reads and writes, but of state, of which it touches a few rows."""
        key = tuple(binding.items())
        if key not in self._touched:
            sizes, state = self._sizes(binding), {self.graph.param(n) for n in self.graph.state}
            self._touched[key] = sum(
                sizes[v]
                for node in self._nodes
                if node.op is not view
                for v in (*node.args, *node.results)
                if v not in state and v.node not in self._in_place
            )
        return self._touched[key]

    def peak_bytes(self, binding: Mapping[str, int]) -> int:
        """Bytes of all values but parameters and weights that are there at once, at most."""
        sizes, now, most = self._sizes(binding), 0, 0
        for node, dead in zip(self._nodes, self._dead, strict=True):
            now += sum(sizes[v] for v in node.results if v.op not in (param, constant))
            most = max(most, now)
            now -= sum(sizes[v] for v in dead if v.op not in (param, constant))
        return most

    def _sizes(self, binding: Mapping[str, int]) -> dict[Value, int]:
        return {v: v.type.bind(binding).nbytes for node in self._nodes for v in node.results}  # pyright: ignore[reportReturnType]


def in_place_nodes(graph: Graph, nodes: Sequence[Node], params: Set[Value]) -> set[Node]:
    """Those of `nodes`, in their order, whose results may take over the memory of what they update:
    of `params` that nothing else, no other operand either, looks at, or of what such a node made
    of one, after all attention to that. (Attention reads pages; what else reads may be a view.)
    """
    uses = graph.use_counts()
    place = {node: i for i, node in enumerate(nodes)}
    users = graph.users()
    found: set[Node] = set()

    def is_free(donor: Value, node: Node) -> bool:
        if donor in params:
            return uses[donor] == 1
        others = [user for user in users.get(donor, ()) if user is not node]
        attend = all("page_table" in user.op.operands for user in others)
        read = donor in graph.roots or node.args.count(donor) > 1
        return (
            donor.node in found
            and attend
            and not read
            and all(place[user] < place[node] for user in others)
        )

    for node in nodes:
        count = len(node.types) if node.op.inplace else 0
        donors = [*node.args[:count], *(node.args[a.cache] for a in node.appends)]
        if donors and all(is_free(donor, node) for donor in donors):
            found.add(node)
    return found


def interpret(
    graph: Graph,
    inputs: Mapping[str, torch.Tensor],
    weights: Weights | None = None,
    communicator: Communicator | None = None,
) -> Results:
    """Run every node's reference once.

    `inputs` are the parameters by name, `communicator` the way to other ranks (`ranks` runs several
    graphs at once). Values are freed after their last use. KeyError for a weight that the store
    lacks, ValueError for inputs that do not fit, VerifyError for a reference that breaks its type
    rule.
    """
    binding = bind_symbols(graph, {n: tuple(t.shape) for n, t in inputs.items()})
    for p in graph.params:
        if (found := dtype_name(inputs[p.attrs["name"]].dtype)) != p.type.dtype:
            raise ValueError(f"parameter %{p.attrs['name']}: expected {p.type}, found {found}")

    def load(node: Node) -> torch.Tensor:
        name = node.attrs["name"]
        if weights is None:
            raise KeyError(f"weight @{name} is needed, but no weights were given")
        if (found := weights[name].type) != node.types[0]:
            raise VerifyError(f"weight @{name}: expected {node.types[0]}, the store has {found}")
        return weights.load(name)

    return Interpreter(graph).run(inputs, load, binding, communicator)


def random_tensor(
    type_: TensorType, generator: torch.Generator | None = None, high: int = 2, low: int = 0
) -> torch.Tensor:
    """A tensor of a bound type: standard normal floats, integers in [low, high), random bools."""
    shape, dtype = [evaluate(d, {}) for d in type_.shape], torch_dtype(type_.dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(low, high, shape, generator=generator, dtype=dtype)
