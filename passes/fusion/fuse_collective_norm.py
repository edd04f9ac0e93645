"""fuse-collective-norm: the residual sum and the norm behind it, and the all-reduce before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...compiler.ir import Graph, Node, Value
from ...compiler.ops.collective import add_rms_norm, all_reduce
from ...compiler.ops.norm import rms_norm
from ...compiler.ops.pointwise import add
from ...compiler.pipeline import PassContext
from ...compiler.rewrite import Decline, Match, Pat, Rule, pat, rewrite
from .fuse_linear_residual import takes_sum
from .fuse_norm_linear import readers, takes_norm

X, DELTA, WEIGHT = Pat(), Pat(), Pat()
SUM = pat(add, X, DELTA)
NORM = pat(rms_norm, SUM, weight=WEIGHT)
REDUCED = pat(all_reduce, DELTA)
SUM_OF_RANKS = pat(add, X, REDUCED)
NORM_OF_RANKS = pat(rms_norm, SUM_OF_RANKS, weight=WEIGHT)


def _fused(m: Match, norm: Pat, **attrs: Any) -> tuple[Value, Value]:
    if m[X].type != m[DELTA].type:
        raise Decline(f"{m[X].type} and {m[DELTA].type} are broadcast in their sum")
    eps = m[norm].attrs["eps"]
    total, normed = add_rms_norm.all(m[X], m[DELTA], m[WEIGHT], eps=eps, **attrs)
    return normed, total


# s = x + all_reduce(d), rms_norm(s, w) == add_rms_norm(x, d, w) over the ranks
def _with_collective(m: Match) -> tuple[Value, Value]:
    if m[X] == m[REDUCED]:
        raise Decline("the all_reduce is added to itself, and would run twice")
    return _fused(m, NORM_OF_RANKS, ranks=m[REDUCED].attrs["ranks"])


def _rules(reading: Mapping[Value, Sequence[Node | None]]) -> tuple[Rule, ...]:
    # s = x + d, rms_norm(s, w) == add_rms_norm(x, d, w), where neither goes into a product
    def without_collective(m: Match) -> tuple[Value, Value]:
        if takes_sum(m[SUM], reading):
            raise Decline("the sum goes into the epilogue of a product")
        if takes_norm(m[NORM], reading):
            raise Decline("the norm goes into the prologue of a product")
        return _fused(m, NORM)

    return (
        Rule("all-reduce-add-rms-norm", (NORM_OF_RANKS, SUM_OF_RANKS), _with_collective),
        Rule("add-rms-norm", (NORM, SUM), without_collective),
    )


@dataclass(frozen=True)
class FuseCollectiveNorm:
    """all_reduce, residual sum and rms_norm -> add_rms_norm, which gives the sum and the norm.

    Without an all_reduce only where fuse-linear-residual would leave the sum and fuse-norm-linear
    the norm.
    """

    name: ClassVar[str] = "fuse-collective-norm"

    def expected(self, graph: Graph) -> int:
        """Sums over ranks that are added to something."""
        adds = (n for n in graph.nodes() if n.op is add)
        return sum(any(a.op is all_reduce for a in n.args) for n in adds)

    def __call__(self, graph: Graph, context: PassContext) -> Graph:
        return rewrite(graph, _rules(readers(graph)), context.log)
