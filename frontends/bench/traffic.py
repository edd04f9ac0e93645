"""What a step must move and compute, from the costs of its ops: the bytes that bound its speed.

Weights and caches count, each read once; activations do not, since they stay in the cache of the
device. Of experts those are read that tokens choose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass

from ...codegen.kernel_backend import launch_label
from ...compiler.dtypes import FLOATS
from ...compiler.ir import Graph, Node, Value
from ...compiler.ops.leaf import param
from ...compiler.types import TensorType, bind_attr
from .workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights and caches that must be read, and floating-point operations."""

    bytes: int
    flops: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.flops + other.flops)


NOTHING = Traffic(0, 0)


def traffic_by_label(graph: Graph, work: Workload) -> dict[str, Traffic]:
    """The traffic of the nodes behind the launches of each label, without padding."""
    binding = {"T": work.tokens, "L": work.batch}
    found: dict[str, Traffic] = defaultdict(lambda: NOTHING)
    state = {v for name in graph.state for v in (graph.param(name), graph.updates[name])}
    for node in graph.nodes():
        if node.op is not param and not node.is_constant:
            found[launch_label(node)] += _traffic(node, state, binding, work)
    return dict(found)


def _traffic(node: Node, state: Set[Value], binding: Mapping[str, int], work: Workload) -> Traffic:
    operands = {name: value.stored.bind(binding) for name, value in node.operands.items()}
    attrs = {name: bind_attr(value, binding) for name, value in node.attrs.items()}
    results = tuple(t.bind(binding) for t in node.types)
    passing = [
        value.type.bind(binding)
        for value in (*node.operands.values(), *node.results)
        if not value.node.is_constant and value not in state and value.type.dtype in FLOATS
    ]
    by_one = by_all = operands
    if "page_table" in operands and "scale" in attrs:
        # What one token sees counts for the arithmetic, what all new ones see for the bytes.
        window = attrs.get("window") or work.seen
        by_one = _seen(operands, work.batch, min(window, work.seen))
        by_all = _seen(operands, work.batch, min(window + work.new - 1, work.seen))
    flops = node.op.cost(by_one, results, **attrs).flops
    moved = node.op.cost(_chosen(by_all, work), results, **attrs).bytes
    return Traffic(max(int(moved) - sum(int(t.nbytes) for t in passing), 0), int(flops))


def _seen(operands: dict[str, TensorType], batch: int, positions: int) -> dict[str, TensorType]:
    """The operands with caches of so many positions of each sequence, a page each."""
    caches = {
        name: type_.with_shape((positions, 1, *type_.shape[2:]))
        for name, type_ in operands.items()
        if name.endswith("cache")
    }
    table = operands["page_table"].with_shape((batch, positions))
    return {**operands, **caches, "page_table": table}


def _chosen(operands: dict[str, TensorType], work: Workload) -> dict[str, TensorType]:
    """The operands with as many choices as different experts are expected to be chosen.

    Tokens that choose k of E at random, each on its own, leave an expert out with (1 - k/E)^T.
    """
    indices, held = operands.get("indices"), operands.get("gate_up")
    if indices is None or held is None:
        return operands
    count, each = int(held.shape[0]), int(indices.shape[-1])
    left_out = (1 - min(each / count, 1.0)) ** work.tokens
    return {**operands, "indices": indices.with_shape((round(count * (1 - left_out)), 1))}
