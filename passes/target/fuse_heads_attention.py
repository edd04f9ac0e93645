"""fuse-heads-attention: attention over a paged cache makes what it takes itself, heads or rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...compiler.ir import Graph, Node, Value
from ...compiler.ops.attention import cached_attention
from ...compiler.ops.heads import project_heads
from ...compiler.ops.latent_attention import latent_attention
from ...compiler.ops.leaf import param
from ...compiler.ops.linear import linear
from ...compiler.ops.mla import cached_mla_attention, mla_latent
from ...compiler.ops.project_attention import CACHES, INDEX, project_attention
from ...compiler.ops.rope import rope
from ...compiler.ops.shape import slice_, view
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Applied, Decline


def _producer(attends: Node, users: dict[Value, list[Node]], roots: tuple[Value, ...]) -> Node:
    """The node of all heads that `attends` takes; Decline where there is none."""
    q, *caches = attends.args[:3]
    maker = q.node
    if maker.op is not project_heads or q.index != 0:
        raise Decline("its queries are not the first heads of a product")
    rows = {a.row: Value(maker, a.updated) for a in maker.appends}
    if len(maker.attrs["heads"]) != 3 or rows != dict(enumerate(caches, 1)):
        raise Decline("its caches are not what the product appends keys and values to")
    if any(attends.operand(name) != maker.operand(name) for name in INDEX):
        raise Decline("it has other slots, positions or pages than what is appended")
    if users[q] != [attends] or q in roots:
        raise Decline("its queries are read elsewhere")
    sinks = attends.operand("sinks")
    if sinks and not (sinks.node.is_constant or sinks.op is param):
        raise Decline("its sinks are computed")
    return maker


# attention(q, caches) of q, caches = heads(x, caches) is project_attention(x, caches)
def _fused(maker: Node, attends: Node) -> Applied:
    named: dict[str, Any] = {**maker.operands, **maker.attrs, **attends.attrs}
    x, weight = (named.pop(name) for name in project_heads.required)
    named |= {new: named.pop(old) for old, new in CACHES.items()}
    named["sinks"] = attends.operand("sinks")
    node = project_attention.node((x, weight), named, attends.source)
    # Checked for tokens 0, 1, ... of one sequence: each has a place of its own.
    given: dict[Value, Any] = dict.fromkeys((named[name] for name in INDEX), "index")
    given[named["slots"]] = "zeros"
    before = (attends.results[0], *maker.results[1:])
    return Applied(FuseHeadsAttention.name, node.args, before, node.results, given)


def _row_maker(attends: Node) -> Node:
    """The node of the rows that latent attention reads; Decline where there is none."""
    maker = attends.args[2].node
    if maker.op is not mla_latent or attends.args[2] not in [
        Value(maker, a.updated) for a in maker.appends
    ]:
        raise Decline("its cache is not what rows of a latent are appended to")
    if any(attends.operand(name) != maker.operand(name) for name in INDEX):
        raise Decline("it has other slots, positions or pages than what is appended")
    return maker


def _is_turned(
    q_pe: Value, maker: Node, users: dict[Value, list[Node]], roots: tuple[Value, ...]
) -> bool:
    """Whether queries are rotated as the rows of `maker` are, for this attention alone."""
    node = q_pe.node
    if node.op is not rope or len(users[q_pe]) > 1 or q_pe in roots:
        return False
    alike = node.attrs["form"] == maker.attrs["form"] and node.attrs.get("start", 0) == 0
    return alike and [*node.args[1:3]] == [*maker.args[2:4]]


def _unturned(heads: Value) -> Value | None:
    """`heads` [T, H, D] before they are rotated, and rounded; None where they are normed too."""
    node = heads.node
    if node.op is rope:
        return node.args[0]
    if node.op is not project_heads or node.attrs["heads"] != heads.type.shape[1:2]:
        return None
    if node.attrs.get("rotate") != (True,) or not {*node.given} <= {"norm", "bias", "cos", "sin"}:
        return None
    named = {name: node.operand(name) for name in ("norm", "bias")}
    product = linear(*node.args[:2], **named, eps=node.attrs.get("eps"))
    return view(product, shape=heads.type.shape)


# slice(rope(x), pe) == rope(slice(x, pe)) and slice(rope(x), nope) == slice(x, nope)
def _apart(
    attends: Node, users: dict[Value, list[Node]], roots: tuple[Value, ...]
) -> Applied | None:
    """What latent attention takes of queries whose last dims are rotated: those rotated alone, so
    that it can do that, and the others as they are. None where it is not so."""
    q_pe = attends.args[1]
    try:
        maker = _row_maker(attends)
    except Decline:  # which is logged where it is fused
        return None
    if q_pe.op is not slice_ or q_pe in roots:
        return None
    heads, form = q_pe.node.args[0], maker.attrs["form"]
    cos, sin = maker.args[2:4]
    found = [heads.node.operands.get(name) for name in ("cos", "sin")]
    if found != [cos, sin] or heads.node.attrs["form"] != form or heads in roots:
        return None
    if (raw := _unturned(heads)) is None:
        return None
    first = heads.node.attrs.get("start", 0)
    last = first + 2 * cos.type.shape[1]
    after: list[Value] = []
    for node in users[heads]:
        if node.op is not slice_ or node.attrs["dim"] != heads.type.rank - 1:
            return None
        part = Value(slice_.node((raw,), node.attrs, node.source))
        start, stop = node.attrs["start"], node.attrs["stop"]
        if (start, stop) == (first, last):
            part = Value(rope.node((part, cos, sin), {"form": form}, node.source))
        elif start < last and stop > first:
            return None
        after.append(part)
    before = tuple(map(Value, users[heads]))
    return Applied(FuseHeadsAttention.name, heads.node.args, before, tuple(after))


# mla_attention(q, rope(p), cache) of _, cache = mla_latent(kv, cache) is latent_attention(q, p, kv)
def _latent_fused(maker: Node, attends: Node, rotate: bool) -> Applied:
    q_latent, q_pe = attends.args[:2]
    if rotate:
        q_pe = q_pe.node.args[0]
    kv, norm_weight, cos, sin = (maker.operands[name] for name in mla_latent.required)
    index: dict[str, Any] = {name: maker.operand(name) for name in (*INDEX, "cache")}
    attrs = {"eps": maker.attrs["eps"], "form": maker.attrs["form"]}
    attrs |= {"scale": attends.attrs["scale"], "rotate": rotate}
    args = (q_latent, q_pe, kv, norm_weight, cos, sin)
    node = latent_attention.node(args, {**index, **attrs}, attends.source)
    # Checked for tokens 0, 1, ... of one sequence: each has a place of its own.
    given: dict[Value, Any] = dict.fromkeys((index[name] for name in INDEX), "index")
    given[index["slots"]] = "zeros"
    return Applied(
        FuseHeadsAttention.name,
        node.args,
        (attends.results[0], *maker.results),
        node.results,
        given,
    )


@dataclass(frozen=True)
class FuseHeadsAttention:
    """cached_attention of what project_heads makes and appends -> project_attention;
    cached_mla_attention of rows that mla_latent makes and appends, and of queries that are rotated
    as these are -> latent_attention."""

    name: ClassVar[str] = "fuse-heads-attention"

    def expected(self, graph: Graph) -> int:
        """Attention over a cache that a product of heads, or what makes latent rows, appends to."""
        of_heads = (n for n in graph.nodes() if n.op is cached_attention)
        of_rows = (n for n in graph.nodes() if n.op is cached_mla_attention)
        found = sum(n.args[1].op is project_heads for n in of_heads)
        return found + sum(n.args[2].op is mla_latent for n in of_rows)

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        fused: list[Applied] = []
        users, roots = graph.users(), graph.roots
        latent = (n for n in graph.nodes() if n.op is cached_mla_attention)
        apart = (_apart(n, users, roots) for n in latent)
        if found := [*filter(None, apart)]:
            graph = context.log.apply(graph, found)
            users, roots = graph.users(), graph.roots
        for node in graph.nodes():
            if node.op not in (cached_attention, cached_mla_attention):
                continue
            try:
                if node.op is cached_attention:
                    fused.append(_fused(_producer(node, users, roots), node))
                else:
                    maker = _row_maker(node)
                    turned = _is_turned(node.args[1], maker, users, roots)
                    fused.append(_latent_fused(maker, node, turned))
            except Decline as reason:
                context.log.decline(self.name, node, str(reason))
        return context.log.apply(graph, fused)
