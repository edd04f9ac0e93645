"""Attention with keys and values of their own: over one sequence, and over paged caches."""

from __future__ import annotations

from ...kernel_query import Arg, Candidate, Declined, KernelQuery, Operand
from .attend_plan import Attention, Pages, Query, Rows, plan


def key_parts(d: int) -> tuple[int, int]:
    """`d` key dims as a power of two and the rest, so that 192 takes 128 + 64 and not 256."""
    first = 1 << (d.bit_length() - 1)
    return first, d - first


def paged_index(query: KernelQuery, caches: int, start: int) -> Pages | Declined:
    """The index of the paged caches that are the arguments from `caches` on, followed by slots,
    positions and page table at `start`."""
    table = query.args[start + 2]
    size = query.args[caches].shape[1]
    if size < 16 or size & (size - 1):
        return Declined(f"expected a page size of a power of two of at least 16, found {size}")
    for cache in query.args[caches:start]:
        if cache.strides[0] != size * cache.strides[1]:
            return Declined(f"expected pages one after the other, found strides {cache.strides}")
    if not all(a.dense for a in query.args[start : start + 3]):
        return Declined("expected a dense index")
    slots, per_slot = table.shape
    return Pages(Arg(start), Arg(start + 1), Arg(start + 2), slots, per_slot, size)


def _rows(index: int, x: Operand) -> Rows:
    """[..., rows, G, D] as rows of heads."""
    return Rows(Arg(index), x.strides[-3], x.strides[-2])


def _attention(query: KernelQuery, pages: Pages | None) -> Candidate | Declined:
    q, k, v = query.args[:3]
    if any(x.strides[-1] != 1 for x in (q, k, v)):
        return Declined("expected heads whose dims follow one another")
    if (sinks := query.operand("sinks")) and not sinks.dense:
        return Declined("expected dense sinks")
    tokens, heads, dims = q.shape
    d, d_rest = key_parts(dims)
    q_rows = Query(Arg(0), q.strides[0], q.strides[1])
    job = Attention(
        tokens,
        heads,
        k.shape[-2],
        d,
        d_rest,
        v.shape[-1],
        q.type.dtype,
        q_rows,
        Query(Arg(0), q_rows.token, q_rows.head, d) if d_rest else None,
        _rows(1, k),
        _rows(2, v),
        pages.per_slot * pages.size if pages else k.shape[0],
        query.attrs["scale"],
        pages,
        query.ref("sinks"),
        query.attrs.get("window", 0),
        query.attrs.get("softcap", 0.0),
        query.attrs.get("causal", True),
    )
    return plan(job, query)


def attention(query: KernelQuery) -> Candidate | Declined:
    """attention(q, k, v[, sinks])."""
    return _attention(query, None)


def cached_attention(query: KernelQuery) -> Candidate | Declined:
    """cached_attention(q, k_cache, v_cache, slots, positions, page_table[, sinks])."""
    pages = paged_index(query, 1, 3)
    return pages if isinstance(pages, Declined) else _attention(query, pages)


TEMPLATES = {"attention": (attention,), "cached_attention": (cached_attention,)}
