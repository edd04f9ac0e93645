"""Which template computes a node: all are asked for candidates, and the cheapest wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from . import pointwise
from .kernel_query import Candidate, Declined, KernelQuery, Template
from .templates.attention import grouped_query as attention
from .templates.attention import heads, latent_attention, mla, project_attention, rope
from .templates.gemm import linear
from .templates.moe import experts, gating
from .templates.rowwise import copy, indexed, norms, reductions, rows
from .templates.sampling import draft, feed
from .templates.sampling import sample as sampling

_TABLES: tuple[Mapping[str, Sequence[Template]], ...] = tuple(
    module.TEMPLATES
    for module in (
        pointwise,
        attention,
        copy,
        draft,
        experts,
        feed,
        gating,
        heads,
        indexed,
        latent_attention,
        linear,
        mla,
        norms,
        project_attention,
        rope,
        rows,
        reductions,
        sampling,
    )
)
# Operands that templates read in packed form, by op: what the modules' PACKED_WEIGHTS say.
PACKED_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    op: names
    for m in (experts, heads, linear, project_attention)
    for op, names in m.PACKED_WEIGHTS.items()
}


def templates_of(op: str) -> Sequence[Template]:
    """The templates that are asked for nodes of the op called `op`."""
    return [t for table in _TABLES for t in table.get(op, ())]


def select(query: KernelQuery, prefer: str = "") -> Candidate | Declined:
    """The cheapest candidate, which has the others; or every reason for declining.

    Those that launch the kernel `prefer` (of price_table.Launched) come before all others.
    """
    found: list[Candidate] = []
    reasons: list[str] = []
    for template in templates_of(query.op.name):
        answer = template(query)
        for each in (answer,) if isinstance(answer, Candidate | Declined) else answer:
            if isinstance(each, Candidate):
                found.append(each)
            else:
                reasons.append(f"{template.__name__}: {each.reason}")
    if found:
        best, *others = sorted(found, key=lambda each: (not _launches(each, prefer), *_rank(each)))
        return replace(best, others=tuple(others))
    types = ", ".join(str(o.type) for o in query.args)
    return Declined(
        f"no kernel for {query.op.name}({types}) on {query.target.name}: "
        + ("; ".join(reasons) or "no template knows the op")
    )


def _rank(candidate: Candidate) -> tuple[float, int]:
    """Its price, and of prices that are equal to the nanosecond the fewer launches."""
    return round(candidate.seconds, 9), len(candidate.calls)


def _launches(candidate: Candidate, kernel: str) -> bool:
    return any(priced.kernel == kernel for priced in candidate.priced)
