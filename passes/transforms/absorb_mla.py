"""absorb-mla: multi-head latent attention over its latent, not over keys and values made of it.

W_UK goes into the query and W_UV into the output (DeepSeek-V2, arXiv:2405.04434, section 2.1.2):
attention is then over c_kv ‖ k_pe, one row a token for all heads, which is all that a cache holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from ...compiler.ir import Graph, Node, Value
from ...compiler.ops import pointwise, shape
from ...compiler.ops.attention import attention
from ...compiler.ops.linear import head_linear
from ...compiler.ops.mla import mla_attention, mla_latent
from ...compiler.ops.norm import rms_norm
from ...compiler.ops.rope import rope
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Decline, Match, Pat, Rule, pat, rewrite
from ..moves import Rows, sliced
from ..raising.canonicalize import common_subexpressions
from ..raising.raise_rope import span_of
from .premultiply_mla import premultiplied

Users = Mapping[Value, list[Node]]

Q, V = Pat(), Pat()
KEYS = Pat(where=lambda v: v.op is shape.cat and len(v.node.args) == 2)
ROOT = pat(attention, Q, KEYS, V)


@dataclass(frozen=True)
class _Keys:
    """k = k_nope ‖ k_pe or k_pe ‖ k_nope: the latter one row for all heads.

    `at` are the dims of k_nope and those of k_pe, each [start, stop).
    """

    nope: Rows
    pe: Value
    at: tuple[tuple[int, int], tuple[int, int]]
    nodes: frozenset[Node]


def _keys(k: Value, c_kv: Value) -> _Keys:
    """The parts of k [T, H, D], where k_nope is made of `c_kv`."""
    if k.node.attrs["dim"] % k.type.rank != 2:
        raise Decline("the parts of the keys are not joined along the last dim")
    parts, reasons = k.node.args, list[str]()
    sizes: list[Any] = [p.type.shape[2] for p in parts]
    spans = ((0, sizes[0]), (sizes[0], sum(sizes)))
    for i in (0, 1):
        try:
            nope = _rows_of_heads(parts[i])
            pe, nodes = _of_all_heads(parts[1 - i])
        except Decline as reason:
            reasons.append(str(reason))
            continue
        if nope.x == c_kv:
            return _Keys(nope, pe, (spans[i], spans[1 - i]), nodes | nope.nodes | {k.node})
        reasons.append("keys and values are not made of one latent")
    raise Decline("; ".join(dict.fromkeys(reasons)))


def _rows_of_heads(value: Value) -> Rows:
    """y[t, h, d] = weight[h, d] · x[t] + bias[h, d]."""
    rows = Rows.of(value)
    if rows.weight.type.rank != 3:
        raise Decline(f"the product becomes rows {rows.weight.type}, not rows of heads")
    return rows


def _of_all_heads(part: Value) -> tuple[Value, frozenset[Node]]:
    """The rows [T, P] that `part` [T, H, P] repeats for every head, and the nodes that do so."""
    tokens, heads, size = part.type.shape
    nodes: set[Node] = set()
    if part.op is shape.expand:
        nodes.add(part.node)
        part = part.node.args[0]
    elif heads != 1:
        raise Decline(f"{part.op.name} gives each head a part of its own on either side of the cat")
    if part.type.shape != (tokens, 1, size):
        raise Decline(f"{part.type} is not one part of the keys for all heads")
    if part.op is shape.view and part.node.args[0].type.shape == (tokens, size):
        return part.node.args[0], frozenset((*nodes, part.node))
    return shape.view(part, shape=(tokens, size)), frozenset(nodes)


def _cut(q: Value, at: tuple[int, int]) -> Value:
    """q[..., start:stop), or the part of a concatenation that it is."""
    if q.op is shape.cat and q.node.attrs["dim"] % q.type.rank == 2:
        end: Any = 0
        for part in q.node.args:
            start, end = end, end + part.type.shape[2]
            if (start, end) == at:
                return part
    return sliced(q, 2, *at)


def _latent(c_kv: Value, k_pe: Value, shared: bool) -> Value:
    """c_kv ‖ k_pe as the norm and rotation of one product where they are that, else joined.

    With `shared` they have other users: to compute them in one op too would run them twice.
    """
    joined = shape.cat(c_kv, k_pe, dim=1)
    weight = c_kv.node.operand("weight") if c_kv.op is rms_norm else None
    if shared or weight is None or k_pe.op is not rope:
        return joined
    x, (turned, cos, sin) = c_kv.node.args[0], k_pe.node.args
    low, high = span_of(x), span_of(turned)
    beside = low.base == high.base and low.step == high.step == 1 and low.stop == high.start
    if not beside or 2 * cos.type.shape[1] != k_pe.type.shape[1]:
        return joined
    kv = sliced(low.base, 1, low.start, high.stop)
    attrs = {"eps": c_kv.attrs["eps"], "form": k_pe.attrs["form"]}
    return mla_latent(kv, weight, cos, sin, **attrs)


def _refuse(node: Node) -> None:
    """Decline what attention over the latent does not know."""
    (q, k), attrs = node.args[:2], node.attrs
    reasons = {
        "it is not causal": not attrs.get("causal", True),
        "it has a window": attrs.get("window", 0),
        "it has a soft cap": attrs.get("softcap", 0.0),
        "it has sinks": node.operand("sinks"),
        f"{q.type} attends to other rows, {k.type}": q.type.shape[0] != k.type.shape[0],
        f"heads of {q.type} share those of {k.type}": q.type.shape[1] != k.type.shape[1],
    }
    if reason := next((r for r, holds in reasons.items() if holds), None):
        raise Decline(reason)


# Scores and values, for c = c_kv, W_UK [D, R] and W_UV [V, R] of one head:
#   q_nope · (W_UK c) == (W_UKᵀ q_nope) · c
#   Σ p (W_UV c) == W_UV (Σ p c)
# and with biases b_UK, b_UV of the up-projection: q_nope · b_UK is the same for all keys, which
# softmax does not see, and Σ p b_UV == b_UV, for the weights p sum to 1.
def _absorbed(users: Users, roots: frozenset[Value], m: Match) -> Value:
    node, (q, k, v) = m[ROOT].node, (m[p] for p in (Q, KEYS, V))
    _refuse(node)
    values = _rows_of_heads(v)
    c_kv = values.x
    keys = _keys(k, c_kv)
    inner = keys.nodes | values.nodes | {node}

    def leaks(value: Value) -> bool:
        return value in roots or any(u not in inner for u in users.get(value, ()))

    for part in inner - {node}:
        if any(map(leaks, part.results)):
            raise Decline(f"{part.op.name} inside the match is used outside")
    expanded = k.type.shape[1] * (k.type.shape[2] + v.type.shape[2])
    shared = leaks(c_kv) or leaks(keys.pe)
    latent = _latent(c_kv, keys.pe, shared)
    if latent.type.shape[1] >= expanded:
        raise Decline(f"a latent row of {latent.type.shape[1]} is no less than {expanded} of k, v")
    q_nope, q_pe = (_cut(q, at) for at in keys.at)
    w_uk = shape.permute(keys.nope.weight, dims=(0, 2, 1))
    q_latent = head_linear(q_nope, w_uk)
    mixed = mla_attention(q_latent, q_pe, latent, scale=node.attrs["scale"])
    out = head_linear(mixed, values.weight)
    return out if values.bias is None else pointwise.add(out, values.bias)


@dataclass(frozen=True)
class AbsorbMla:
    """attention over k, v made of c_kv and k_pe -> head_linear, mla_attention, head_linear.

    `premultiply` says whether W_UK and W_UV remain products of their own at run time (False) or are
    multiplied into the query's and the output's projection where nothing lies between (True);
    "auto" takes what moves fewer bytes a token. The bytes of both are noted. Pre-multiplied weights
    are rounded once more.
    """

    name: ClassVar[str] = "absorb-mla"
    premultiply: bool | Literal["auto"] = "auto"

    def expected(self, graph: Graph) -> int:
        """Attentions over keys of two parts, one of which may be all heads'."""
        return sum(n.op is attention and n.args[1].op is shape.cat for n in graph.nodes())

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        users, roots = graph.users(), frozenset(graph.roots)
        rule = Rule("absorb-mla", (ROOT,), partial(_absorbed, users, roots))
        absorbed = rewrite(graph, [rule], context.log)
        if absorbed is graph:
            return graph
        absorbed = common_subexpressions(absorbed, context.log)
        return common_subexpressions(
            premultiplied(absorbed, self.premultiply, context.log), context.log
        )
