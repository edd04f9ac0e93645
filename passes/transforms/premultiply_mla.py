"""Part of absorb-mla: the absorbed weights as products of their own, or pre-multiplied.

Run-time products read W_UQ and W_UK, pre-multiplied ones a matrix of R + P rows a head: which is
less depends on the model's sizes. So for W_UV and W_O.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import sympy

from ...compiler.ir import Graph, Value, walk
from ...compiler.ops import shape
from ...compiler.ops.linear import head_linear, linear, matmul
from ...compiler.ops.mla import mla_attention
from ...compiler.ops.rope import rope
from ...compiler.rewrite import Decline, Log, Match, Pat, Rule, pat, rewrite
from ...compiler.types import evaluate

Side = Literal["query", "output"]


def _moved(roots: tuple[Value, ...], leaves: tuple[Value, ...], binding: dict[str, int]) -> int:
    """Bytes that the nodes between `leaves` and `roots` move; weights are made before the run."""
    outside = set(walk(leaves))
    inside = [n for n in walk(roots) if n not in outside]
    run = [n for n in inside if not n.is_constant]
    return sum(evaluate(sympy.sympify(n.cost.bytes), binding) for n in run)


@dataclass
class _Choice:
    """Takes the pre-multiplied form or declines it, and keeps count of what was found."""

    premultiply: bool | Literal["auto"]
    binding: dict[str, int]
    found: Counter[tuple[Side, int, int, bool]] = field(default_factory=Counter)
    declined: list[str] = field(default_factory=list[str])

    def take(
        self,
        side: Side,
        before: tuple[Value, ...],
        after: tuple[Value, ...],
        leaves: tuple[Value, ...],
    ) -> None:
        """Decline where the run-time products are to stay."""
        now, new = (_moved(roots, leaves, self.binding) for roots in (before, after))
        taken = new < now if self.premultiply == "auto" else self.premultiply
        self.found[side, now, new, taken] += 1
        if not taken:
            self.declined.append(f"run-time products move {now:,} bytes, pre-multiplied {new:,}")
            raise Decline(self.declined[-1])


def _weight() -> Pat:
    return Pat(where=lambda v: v.node.is_constant)


def _heads(value: Value, *sizes: Any) -> Value:
    return shape.view(value, shape=sizes)


# ---- q_nope = W_UQ c_q: W_UKᵀ (W_UQ c_q) == (W_UKᵀ W_UQ) c_q, for the dims that rope keeps

C_Q, COS, SIN, LATENT = Pat(), Pat(), Pat(), Pat()
W_UQ, W_UK = _weight(), _weight()
TURNED = pat(rope, pat(shape.view, pat(linear, C_Q, W_UQ, absent=("bias",))), COS, SIN)
Q_NOPE, Q_PE = pat(shape.slice_, TURNED), pat(shape.slice_, TURNED)
QUERY = pat(mla_attention, pat(head_linear, Q_NOPE, W_UK), Q_PE, LATENT)


def _span(part: Value) -> tuple[int, int]:
    if part.attrs["dim"] % part.type.rank != 2 or part.attrs.get("step", 1) != 1:
        raise Decline("the query is not cut along the dims of its heads")
    return part.attrs["start"], part.attrs["stop"]


def _query(choice: _Choice, m: Match) -> Value:
    tokens, heads, size = m[TURNED].type.shape
    (nope, nope_end), (pe, pe_end) = _span(m[Q_NOPE]), _span(m[Q_PE])
    first: Any = m[TURNED].attrs.get("start", 0)
    last = first + 2 * m[COS].type.shape[1]
    if m[TURNED].node.args[0].type.shape != (tokens, heads, size) or m[W_UQ].type.rank != 2:
        raise Decline("the query is no product by heads")
    if not pe <= first <= last <= pe_end or nope < last and first < nope_end:
        raise Decline(f"dims {first} to {last} of {m[TURNED].type} are rotated before W_UK")
    rank, inner = m[W_UK].type.shape[1], m[C_Q].type.shape[-1]
    by_head = _heads(m[W_UQ], heads, size, inner)
    w_nope = shape.slice_(by_head, dim=1, start=nope, stop=nope_end)
    w_pe = shape.slice_(by_head, dim=1, start=pe, stop=pe_end)
    joined = shape.cat(matmul(m[W_UK], w_nope), w_pe, dim=1)
    width: Any = joined.type.shape[1]
    q = linear(m[C_Q], _heads(joined, heads * width, inner))
    q = _heads(q, tokens, heads, width)
    start = rank + first - pe
    turned = rope(q, m[COS], m[SIN], form=m[TURNED].attrs["form"], start=start)
    q_latent = shape.slice_(turned, dim=2, start=0, stop=rank)
    q_pe = shape.slice_(turned, dim=2, start=rank, stop=width)
    leaves = tuple(m[p] for p in (C_Q, COS, SIN, W_UQ, W_UK))
    choice.take("query", m[QUERY].node.args[:2], (q_latent, q_pe), leaves)
    return mla_attention(q_latent, q_pe, m[LATENT], **m[QUERY].attrs)


# ---- W_O (W_UV o) == (W_O W_UV) o, heads side by side

MIXED = Pat(where=lambda v: v.op is mla_attention)
W_UV, W_O = _weight(), _weight()
JOINED = pat(shape.view, pat(head_linear, MIXED, W_UV))
OUTPUT = pat(linear, JOINED, W_O)


def _output(choice: _Choice, m: Match) -> Value:
    (tokens, heads, rank), size = m[MIXED].type.shape, m[W_UV].type.shape[1]
    if m[JOINED].type.shape != (tokens, heads * size):
        raise Decline(f"the output is projected as {m[JOINED].type}, not heads side by side")
    rows = m[W_O].type.shape[0]
    by_head = shape.permute(_heads(m[W_O], rows, heads, size), dims=(1, 0, 2))
    weight = shape.permute(matmul(by_head, m[W_UV]), dims=(1, 0, 2))
    mixed = _heads(m[MIXED], tokens, heads * rank)
    product = m[OUTPUT].node
    after = Value(product.replace(x=mixed, weight=_heads(weight, rows, heads * rank)))
    leaves = (m[MIXED], m[W_UV], m[W_O], *product.args[2:])
    choice.take("output", (m[OUTPUT],), (after,), leaves)
    return after


def premultiplied(graph: Graph, premultiply: bool | Literal["auto"], log: Log) -> Graph:
    """`graph` with the weights around mla_attention multiplied where `premultiply` says so.

    What was chosen is noted, with the bytes that one token moves either way.
    """
    choice = _Choice(premultiply, {name: r.start for name, r in graph.symbols.items()})
    rules = [
        Rule("premultiply-query", (QUERY,), partial(_query, choice)),
        Rule("premultiply-output", (OUTPUT,), partial(_output, choice)),
    ]
    graph = rewrite(graph, rules, log)
    chosen = tuple(f": {reason}" for reason in choice.declined)
    log.declined[:] = [d for d in log.declined if not d.endswith(chosen)]
    log.notes += _notes(graph, choice)
    return graph


_PRODUCTS: dict[Side, str] = {"query": "W_UQ and W_UK", "output": "W_UV and W_O"}


def _notes(graph: Graph, choice: _Choice) -> list[str]:
    layers = sum(n.op is mla_attention for n in graph.nodes())
    notes: list[str] = []
    for side, products in _PRODUCTS.items():
        left = layers
        for (found, now, new, taken), count in choice.found.items():
            if found != side:
                continue
            left -= count
            verdict = "pre-multiplied" if taken else "two products"
            notes.append(
                f"{products}, {side} of {count} of {layers} layers: {verdict} "
                f"({now:,} bytes a token as two products, {new:,} pre-multiplied)"
            )
        if left:
            notes.append(
                f"{products}, {side} of {left} of {layers} layers: two products "
                f"(something lies between them)"
            )
    return notes
