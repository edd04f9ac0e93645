"""What depends on weights alone: which values a program holds, and how each is made at load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..compiler.interpret import compute
from ..compiler.ir import Graph, Node, Value, walk
from ..compiler.ops.leaf import constant, literal
from ..compiler.ops.shape import slice_
from ..compiler.rewrite import rebuild
from ..compiler.weights import Bounds, Weights

# What hears of an op on weights: the node, its arguments and its results.
Observer = Callable[[Node, Sequence[Any], Sequence[Any]], None]


def folded(
    graph: Graph,
    packed: Callable[[Node, int], tuple[Value, Value] | None] = lambda node, position: None,
) -> dict[Value, str]:
    """The values of constant nodes that something else uses, with the names of their buffers.

    Where `packed` gives the codes and scales that a node reads in place of an argument, they take
    the place of the numbers that they stand for.
    """
    used: list[Value] = []
    for node in graph.nodes():
        if node.is_constant:
            continue
        for i, arg in enumerate(node.args):
            used.extend(packed(node, i) or ((arg,) if arg.node.is_constant else ()))
    used.extend(v for v in graph.roots if v.node.is_constant)
    values = list(dict.fromkeys(used))
    names: dict[Value, str] = {}
    for value in values:
        if value.op is not literal:
            plain = value.op is constant
            names[value] = f"@{value.attrs['name']}" if plain else f"@folded.{len(names)}"
    return names


def folded_graph(graph: Graph) -> Graph:
    """`graph` with all that depends on weights alone as weights, named as the buffers of `lower`.

    Lowered, it gives the same cpu program, whose buffers' content is then no more computed but
    stored.
    """
    swap: dict[Value, Value] = {}
    for value, name in folded(graph).items():
        if value.op is not constant:
            swap[value] = constant(name=name.removeprefix("@"), type=value.type)
    return rebuild(graph, swap)


class ConstantMaker:
    """Makes the content of weight buffers by name, each once.

    Results of one op that several buffers need (the codes and the scales of one weight) are
    computed once: what the others will ask for is kept until they do.
    """

    def __init__(
        self, names: Mapping[Value, str], weights: Weights, observe: Observer | None = None
    ) -> None:
        self._values = {name: value for value, name in names.items()}
        self._weights = weights
        self._observe = observe
        self._kept: dict[Value, torch.Tensor] = {}
        self._askers: dict[Value, set[str]] = {}
        needs: dict[Value, frozenset[Value]] = {}  # of several results, with the value itself
        for node in walk(tuple(names), lambda node: loaded_part(node) is not None):
            args = () if loaded_part(node) else node.args
            inner = frozenset[Value]().union(*{needs[arg] for arg in args})
            needs |= {v: inner | {v} if len(node.types) > 1 else inner for v in node.results}
        for value, name in names.items():
            for asked in needs[value]:
                self._askers.setdefault(asked, set()).add(name)

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of buffer `name`; ValueError, by the weight's name, where an op refuses it."""
        value = self._values[name]
        result = self._evaluate(value)
        for asked, names in self._askers.items():
            names.discard(name)
            if not names:
                self._kept.pop(asked, None)
        return result

    def _evaluate(self, value: Value) -> torch.Tensor:
        values: dict[Value, Any] = dict(self._kept)
        kept = {v.node for v in self._kept}
        nodes = list(walk((value,), lambda node: node in kept or loaded_part(node) is not None))
        last = {a.node: i for i, n in enumerate(nodes) for a in n.args}
        for i, node in enumerate(nodes):
            if node in kept:
                continue
            if part := loaded_part(node):
                values[Value(node)] = self._weights.load_part(*part)
                continue
            results = self._compute(node, tuple(values[a] for a in node.args))
            values.update(zip(node.results, results, strict=True))
            for arg in node.args:
                if last[arg.node] == i:
                    for result in arg.node.results:
                        values.pop(result, None)
        return values[value]

    def _compute(self, node: Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Weights may lie on a GPU; what an op makes out of nothing lies on the CPU.
        homes = {a.device for a in args if isinstance(a, torch.Tensor) and a.device.type != "cpu"}
        home = next(iter(homes), torch.device("cpu"))
        placed = tuple(a.to(home) if isinstance(a, torch.Tensor) else a for a in args)
        try:
            with home:
                results = compute(node, placed, {})
        except ValueError as error:
            raise ValueError(f"weight {node.source or 'unnamed'}: {error}") from error
        if self._observe:
            self._observe(node, args, results)
        asked = zip(node.results, results, strict=True)
        self._kept.update((v, tensor) for v, tensor in asked if self._askers.get(v))
        return results


def evaluate_constant(value: Value, weights: Weights) -> torch.Tensor:
    """The tensor that `value`, which depends on weights alone, stands for.

    Of a weight that is sliced only the slice is loaded.
    """
    return ConstantMaker({value: "value"}, weights)("value")


def loaded_part(node: Node) -> tuple[str, Bounds] | None:
    """Name and bounds where `node` is a weight, or consecutive indices of one along some dims."""
    if node.op is constant:
        shape: Any = node.types[0].shape
        return node.attrs["name"], tuple((0, size) for size in shape)
    if node.op is not slice_ or node.attrs.get("step", 1) != 1:
        return None
    inner = loaded_part(node.args[0].node)
    if inner is None:
        return None
    (name, bounds), axis = inner, node.attrs["dim"] % node.types[0].rank
    first = bounds[axis][0]
    there = (first + node.attrs["start"], first + node.attrs["stop"])
    return name, (*bounds[:axis], there, *bounds[axis + 1 :])
