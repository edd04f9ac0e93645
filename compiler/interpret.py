"""Running a graph through the references: the meaning of the IR and the oracle of all tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .ir import Graph, Node, Value
from .ops.collective import Communicator
from .ops.leaf import constant, param
from .torch_types import dtype_name, torch_dtype
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
    attrs = {k: bind_attr(v, binding) for k, v in node.attrs.items()}
    required, optional = node.taken(_literals_as_tensors(node, args))
    line = {"communicator": communicator} if node.op.collective else {}
    results = node.op.reference(*required, **optional, **attrs, **line)
    for result, type_ in zip(results, node.types, strict=True):
        if isinstance(result, torch.Tensor):
            expected = type_.bind(binding)
            if (dtype_name(result.dtype), tuple(result.shape)) != (expected.dtype, expected.shape):
                found = f"{dtype_name(result.dtype)}{list(result.shape)}"
                raise VerifyError(f"{node.op.name}: reference gave {found}, not {expected}")
    return results


def _literals_as_tensors(node: Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` with the numbers of literals as tensors, unless a tensor beside them has their dtype.

    Only there does torch give the result that dtype for a plain number.
    """
    beside = {a.type.dtype for a, x in zip(node.args, args, strict=True) if _is_tensor(x)}
    return tuple(
        x
        if _is_tensor(x) or a.type.dtype in beside
        else torch.tensor(x, dtype=torch_dtype(a.type.dtype))
        for a, x in zip(node.args, args, strict=True)
    )


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


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
    nodes = list(graph.nodes())
    last: dict[Node, int] = {a.node: i for i, n in enumerate(nodes) for a in n.args}
    kept = {r.node for r in graph.roots}
    values: dict[Value, Any] = {}
    for i, node in enumerate(nodes):
        if node.op is param:
            values[Value(node)] = inputs[node.attrs["name"]]
        elif node.op is constant:
            if weights is None:
                raise KeyError(f"weight @{node.attrs['name']} is needed, but no weights were given")
            values[Value(node)] = _load(node, weights)
        else:
            results = compute(node, tuple(values[a] for a in node.args), binding, communicator)
            values.update(zip(node.results, results, strict=True))
        for arg in node.args:
            if last[arg.node] == i and arg.node not in kept:
                for result in arg.node.results:
                    values.pop(result, None)
    return Results(
        tuple(values[o] for o in graph.outputs), {n: values[v] for n, v in graph.updates.items()}
    )


def _load(node: Node, weights: Weights) -> torch.Tensor:
    name = node.attrs["name"]
    if (found := weights[name].type) != node.types[0]:
        raise VerifyError(f"weight @{name}: expected {node.types[0]}, the store has {found}")
    return weights.load(name)


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
