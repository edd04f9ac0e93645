"""fuse-shared-experts: an MLP beside the experts becomes more experts, which every token has.

Runs before fuse-swiglu, which would join the MLP's products, and before fuse-moe-gating, which
takes the router with the columns of the shared experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...compiler.ir import Graph, Node, Value, walk
from ...compiler.ops import pointwise, shape
from ...compiler.ops.glu import glu
from ...compiler.ops.linear import linear
from ...compiler.ops.moe import experts, router
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import (
    Decline,
    Match,
    Pat,
    Rule,
    either,
    pat,
    rewrite,
)
from ..moves import Rows, by_parts, concatenated, is_projection


def _product(x: Pat) -> Pat:
    return Pat(linear, (x, Pat()), where=is_projection)


X, ROWS = Pat(), Pat()

# ---- the experts of a router's choice, of all tokens or of those that a `take` chose

CHOICE = tuple(Pat(router, index=i) for i in (0, 1))
CHOSEN = tuple(either(c, pat(shape.take, c, ROWS)) for c in CHOICE)
ROUTED = Pat(
    experts,
    (X, *CHOSEN, Pat(), Pat()),
    absent=("residual",),
    where=lambda v: all(a.node.is_constant for a in v.node.args[3:]),
)

# ---- a gated MLP of the same x: gate and up are two products, or columns of one

TWO = _product(X), _product(X)
BOTH = _product(X)
HALVES = pat(shape.slice_, BOTH), pat(shape.slice_, BOTH)
UNIT = either(pat(glu, *TWO), pat(glu, *HALVES))
DOWN = _product(UNIT)
ROOT = pat(pointwise.add, ROUTED, DOWN)


def _each(value: Value, count: int) -> Value:
    """[count · n, …] as [count, n, …]: the rows of each expert."""
    size, *tail = value.type.shape
    return shape.view(value, shape=(count, size // count, *tail))


def _columns_of_each(weight: Value, count: int) -> Value:
    """A down weight [D, count · I] as [count, D, I]."""

    def split(v: Value) -> Value:
        rows, width = v.type.shape
        if width % count:
            raise Decline("packed groups of the shared down weight straddle two experts")
        parts = shape.view(v, shape=(rows, count, width // count))
        return shape.permute(parts, dims=(1, 0, 2))

    return by_parts(split, weight)


# down·(act(gate·x) ∘ up·x) == Σ_s down[:, s]·(act(gate[s]·x) ∘ up[s]·x) over S parts s of its
# width: S experts that weigh 1, in the same sum as the chosen ones
def _joined(m: Match) -> Value:
    routed, down = m[ROUTED], Rows.of(m[DOWN])
    gate, up = map(Rows.of, m[UNIT].node.args)
    (choice,) = nodes if len(nodes := {m[c].node for c in CHOICE}) == 1 else (None,)
    if choice is None or choice.attrs.get("shared"):
        raise Decline("weights and indices are not one router's, or have shared experts already")
    gate_up, down_weight = routed.node.args[3:5]
    biases = [b for n in ("gate_up_bias", "down_bias") if (b := routed.node.operand(n))]
    if {k: v for k, v in routed.attrs.items() if k != "gated"} != m[UNIT].attrs:
        raise Decline(f"experts have {dict(routed.attrs)}, the shared one {dict(m[UNIT].attrs)}")
    if not routed.attrs.get("gated", True):
        raise Decline("experts are not gated, the shared one is")
    if {b is not None for b in (gate.bias, up.bias, down.bias)} != {bool(biases)}:
        raise Decline("some of experts and shared expert have biases, others have none")
    width, own = down.weight.type.shape[1], down_weight.type.shape[2]
    if not isinstance(width, int) or not isinstance(own, int) or width % own:
        raise Decline(f"a shared width of {width} is no multiple of the experts' {own}")
    count = width // own
    parts = [by_parts(lambda v: _each(v, count), o.weight) for o in (gate, up)]
    operands = {
        "gate_up": concatenated([gate_up, concatenated(parts, 1)]),
        "down": concatenated([down_weight, _columns_of_each(down.weight, count)]),
    }
    if gate.bias and up.bias and down.bias:
        ends = shape.cat(_each(gate.bias, count), _each(up.bias, count), dim=1)
        operands["gate_up_bias"] = shape.cat(biases[0], ends, dim=0)
        operands["down_bias"] = _down_bias(biases[1], down.bias, count)
    columns = choice.replace(shared=count).results
    if ROWS in m:
        columns = tuple(shape.take(c, m[ROWS]) for c in columns)
    weights, indices = columns
    return Value(routed.node.replace(weights=weights, indices=indices, **operands))


def _down_bias(biases: Value, shared: Value, count: int) -> Value:
    """The shared bias is added once: by the first of the shared experts."""
    (size,), dtype = shared.type.shape, shared.type.dtype
    rest = [shape.full(value=0.0, shape=(count - 1, size), dtype=dtype)] if count > 1 else []
    return shape.cat(biases, shape.view(shared, shape=(1, size)), *rest, dim=0)


@dataclass(frozen=True)
class FuseSharedExperts:
    """experts(x, …) + MLP(x) -> experts(x, …) with the MLP among them."""

    name: ClassVar[str] = "fuse-shared-experts"

    def expected(self, graph: Graph) -> int:
        """Experts to which something that is computed from their input is added."""
        return len({node for node, _ in _shared(graph)})

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        graph = rewrite(graph, (Rule("shared-experts", (ROOT,), _joined),), context.log)
        for node, other in _shared(graph):
            context.log.decline("shared-experts", node, f"{other.op.name} is added to it")
        return graph


def _shared(graph: Graph) -> Iterator[tuple[Node, Value]]:
    """Experts, and what is added to them that is computed from what they are given."""
    users = graph.users()
    for node in graph.nodes():
        if node.op is not experts:
            continue
        for user in users.get(Value(node), ()):
            yield from ((node, v) for v in user.args if _is_shared(v, node.args[0]))


def _is_shared(value: Value, x: Value) -> bool:
    """Whether `value` is computed from what the experts are given, other than by experts."""
    return value.op is not experts and value != x and x.node in set(walk((value,)))
