"""fuse-qkv-rope: the products that feed attention become one, with norms and rotary embedding.

q, k and v of one x are parts of one product whose weight is theirs one after the other; a query
alone (of latent attention, or over the keys of another layer) is a product of one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...compiler.ir import Graph, Node, Value
from ...compiler.ops import norm, rope, shape
from ...compiler.ops.attention import attention, cached_attention, kv_append
from ...compiler.ops.heads import project_heads
from ...compiler.ops.linear import linear
from ...compiler.ops.mla import cached_mla_attention, mla_attention
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
from ..moves import Rows, is_projection, one_product, viewed

# Ops that may stand between a product and attention, and how many of them at most: columns, view,
# columns, view, norm, RoPE, view.
_BETWEEN = (shape.view, shape.slice_, norm.rms_norm, rope.rope)
_MOST = 7


@dataclass(frozen=True)
class Part:
    """One of q, k, v: the ops between its product and attention, in the order in which they run.

    `rows` are those of the weight that it takes, one after the other.
    """

    result: Value
    product: Node
    heads: int
    size: int
    rows: Rows
    norm: Node | None
    norm_of: str
    turn: Node | None

    @property
    def width(self) -> int:
        return self.heads * self.size


class Chain:
    """Patterns of one part: a product of `x`, and any few ops of _BETWEEN after it."""

    def __init__(self, x: Pat, cos: Pat, sin: Pat) -> None:
        self.product = Pat(linear, (x, Pat()), where=is_projection)
        levels = [self.product]
        for _ in range(_MOST):
            below = levels[-1]
            step = (pat(shape.view, below), pat(shape.slice_, below), _normed(below))
            levels.append(either(*step, pat(rope.rope, below, cos, sin)))
        self.root = either(*reversed(levels))

    def part(self, m: Match) -> Part:
        return _part(m[self.root], m[self.product].node)


def _normed(x: Pat) -> Pat:
    return Pat(
        norm.rms_norm, (x,), where=lambda v: all(a.node.is_constant for a in v.node.args[1:])
    )


def _part(result: Value, product: Node) -> Part:
    """How `result` is made of `product`; Decline where project_heads cannot say it."""
    _, *dims = result.type.shape if result.type.rank == 3 else (0, 1, result.type.shape[-1])
    heads, size = dims
    if not isinstance(heads, int) or not isinstance(size, int):
        raise Decline(f"{result.type} is not made of heads")
    steps = _steps(result, product)
    works = [i for i, n in enumerate(steps) if n.op in (norm.rms_norm, rope.rope)]
    first = works[0] if works else len(steps)
    after = [n for n in steps[first:] if n.op is not shape.view]
    norms = [n for n in after if n.op is norm.rms_norm]
    turns = [n for n in after if n.op is rope.rope]
    if len(norms) + len(turns) < len(after):
        raise Decline("heads are chosen after their norm or RoPE")
    if len(norms) > 1 or len(turns) > 1:
        raise Decline("heads are normed or turned twice")
    if any(n.types[0].shape[-1] != size for n in turns):
        raise Decline(f"RoPE is not over heads of {size}")
    normed, turn = next(iter(norms), None), next(iter(turns), None)
    of = "head" if normed is None else _norm_of(normed, heads, size, after[0] is turn)
    rows = Rows.of(Value([product, *steps][first])).flat()
    return Part(result, product, heads, size, rows, normed, of, turn)


def _steps(result: Value, product: Node) -> list[Node]:
    """The nodes after `product` up to `result`, in the order in which they run."""
    nodes: list[Node] = []
    while result.node is not product:
        nodes.append(result.node)
        result = result.node.args[0]
    return nodes[::-1]


def _norm_of(normed: Node, heads: int, size: int, turned: bool) -> str:
    """What a norm is over, in the words of project_heads."""
    width = normed.types[0].shape[-1]
    if width == size:
        return "rotated head" if turned else "head"
    if width != heads * size or turned:
        raise Decline(f"a norm over {width} is neither over heads of {size} nor before RoPE")
    return "part"


def _one(name: str, found: Sequence[Any]) -> Any:
    """What all parts agree on."""
    if len(kinds := list(dict.fromkeys(found))) > 1:
        raise Decline(f"parts differ in {name}: {', '.join(map(str, kinds))}")
    return kinds[0]


# x·Wᵀ in some columns == x·(W in these rows)ᵀ, and x·Wᵀ ‖ x·Vᵀ == x·(W, then V)ᵀ
def _projected(parts: Sequence[Part]) -> tuple[Value, ...]:
    """The results of `parts` from one product."""
    for product in dict.fromkeys(p.product for p in parts):
        if sum(p.width for p in parts if p.product is product) > product.types[0].shape[-1]:
            raise Decline("parts share rows of a product")
    weight, bias = one_product([p.rows for p in parts])
    operands: dict[str, Value | None] = {"bias": bias}
    attrs: dict[str, Any] = {
        "heads": tuple(p.heads for p in parts),
        "dims": tuple(p.size for p in parts),
    }
    if norms := {f"norm_{i}": p for i, p in enumerate(parts) if p.norm}:
        operands |= {name: _norm_weight(p) for name, p in norms.items()}
        # Over one head or over a part of one head is the same.
        kinds = [p.norm_of for p in norms.values() if p.heads > 1 or p.norm_of == "rotated head"]
        if (of := _one("norm", kinds or ["head"])) != "head":
            attrs["norm_of"] = of
        attrs["head_eps"] = _one("eps", [p.norm.attrs["eps"] for p in norms.values() if p.norm])
    if turns := [p.turn for p in parts if p.turn]:
        operands["cos"], operands["sin"] = _one("tables", [n.args[1:] for n in turns])
        attrs["rotate"] = tuple(p.turn is not None for p in parts)
        attrs["form"] = _one("form", [n.attrs["form"] for n in turns])
        if start := _one("start", [n.attrs.get("start", 0) for n in turns]):
            attrs["start"] = start
    results = project_heads.all(parts[0].rows.x, weight, **operands, **attrs)
    return tuple(viewed(r, p.result.type.shape) for r, p in zip(results, parts, strict=True))


def _norm_weight(part: Part) -> Value:
    """The weight of a part's norm; ones where it has none."""
    assert part.norm is not None
    if weight := part.norm.operand("weight"):
        return weight
    type_ = part.norm.types[0]
    return shape.full(value=1.0, shape=type_.shape[-1:], dtype=type_.dtype)


# ---- q, k and v of one x. Attention is part of the match, to find them, and stays as it is.

X, COS, SIN = Pat(), Pat(), Pat()
CHAINS = Q, K, V = tuple(Chain(X, COS, SIN) for _ in range(3))
ROOTS = tuple(c.root for c in CHAINS)
INDEX = Pat(), Pat(), Pat()
CACHES = Pat(), Pat()
APPENDED = tuple(pat(kv_append, *CACHES, *ROOTS[1:], *INDEX, index=i) for i in (0, 1))


def _qkv_rule(of: Pat, *stay: Pat) -> Rule:
    def build(m: Match) -> tuple[Value, ...]:
        return (m[of], *(m[p] for p in stay), *_projected([c.part(m) for c in CHAINS]))

    return Rule("qkv", (of, *stay, *ROOTS), build)


# ---- one part alone

ONE = Chain(X, COS, SIN)
TURNED = pat(rope.rope, ONE.root, COS, SIN)
ALONE = either(_normed(TURNED), TURNED)


def _alone(m: Match) -> Value:
    (result,) = _projected([_part(m[ALONE], m[ONE.product].node)])
    return result


RULES = (
    _qkv_rule(pat(attention, *ROOTS)),
    _qkv_rule(pat(cached_attention, Q.root, *APPENDED, *INDEX), *APPENDED),
    Rule("heads", (ALONE,), _alone),
)


@dataclass(frozen=True)
class FuseQkvRope:
    """project_heads from the products, norms and rotary embeddings in front of attention."""

    name: ClassVar[str] = "fuse-qkv-rope"

    def expected(self, graph: Graph) -> int:
        """Attentions whose q, k or v, or whose query of MLA, is not made by project_heads."""
        return sum(bool(_reasons(n)) for n in graph.nodes())

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        graph = rewrite(graph, RULES, context.log)
        for node in graph.nodes():
            for reason in _reasons(node):
                context.log.decline("qkv", node, reason)
        return graph


def _reasons(node: Node) -> list[str]:
    """Why q, k or v of an attention are not parts of a product, by the op in the way."""
    if node.op in (mla_attention, cached_mla_attention):
        ends = {"q_pe": node.args[1]}
    elif node.op in (attention, cached_attention):
        k, v = node.args[1:3]
        if k.op is kv_append:
            k, v = k.node.args[2:4]
        ends = {"q": node.args[0], "k": k, "v": v}
    else:
        return []
    found: list[str] = []
    for name, end in ends.items():
        value = end
        while value.op in _BETWEEN:
            value = value.node.args[0]
        if value.op is linear:
            found.append(f"{name} has a product of its own")
        elif value.op is not project_heads:
            found.append(f"{value.op.name} stands between {name} and its product")
    return found
