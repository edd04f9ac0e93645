"""Attention with keys and values of their own: over one sequence, and over paged caches."""

from __future__ import annotations

from collections.abc import Iterable

from ...kernel_query import Arg, Candidate, Declined, KernelQuery, Operand
from ..rowwise.rows import Pages
from .attend import Keys, Query, Variant
from .attend_plan import Attention, padded, plan


def key_parts(d: int) -> tuple[int, int]:
    """`d` key dims as a power of two and the rest, so that 192 takes 128 + 64 and not 256."""
    first = 1 << (d.bit_length() - 1)
    return first, d - first


def pages_of(query: KernelQuery, caches: int) -> Pages | Declined | None:
    """The index of the paged caches that are the arguments from `caches` on; None for an op
    without."""
    slots, table = query.ref("slots"), query.operand("page_table")
    if slots is None or table is None:
        return None
    start = slots.index
    size = query.args[caches].shape[1]
    if size < 16 or size & (size - 1):
        return Declined(f"expected a page size of a power of two of at least 16, found {size}")
    for cache in query.args[caches:start]:
        if cache.strides[0] != size * cache.strides[1]:
            return Declined(f"expected pages one after the other, found strides {cache.strides}")
    if not all(a.dense for a in query.args[start : start + 3]):
        return Declined("expected a dense index")
    return Pages(*(Arg(start + i) for i in range(3)), table.shape[1], size)


def _rows(index: int, x: Operand, d: int) -> Keys:
    """[..., rows, G, D] as rows of heads, of which the first `d` dims are taken."""
    return Keys(Arg(index), x.strides[-3], x.strides[-2], d, padded(d))


def attention(query: KernelQuery) -> Iterable[Candidate | Declined] | Declined:
    """attention(q, k, v, sinks?), and with paged caches cached_attention(q, k_cache, v_cache,
    slots, positions, page_table, sinks?)."""
    pages = pages_of(query, 1)
    if isinstance(pages, Declined):
        return pages
    q, k, v = query.args[:3]
    if any(x.strides[-1] != 1 for x in (q, k, v)):
        return Declined("expected heads whose dims follow one another")
    if (sinks := query.operand("sinks")) and not sinks.dense:
        return Declined("expected dense sinks")
    d, d_rest = key_parts(q.shape[2])
    steps = q.strides[:2]
    attrs = query.attrs
    variant = Variant(
        attrs["scale"],
        attrs.get("window", 0),
        attrs.get("softcap", 0.0),
        attrs.get("causal", True),
        query.ref("sinks"),
    )
    job = Attention(
        query,
        k.shape[-2],
        Query(Arg(0), *steps, 0, d, padded(d)),
        Query(Arg(0), *steps, d, d_rest, padded(d_rest)) if d_rest else None,
        _rows(1, k, d),
        _rows(2, v, v.shape[-1]),
        variant,
        pages,
    )
    return plan(job)


TEMPLATES = {"attention": (attention,), "cached_attention": (attention,)}
