"""Attention with keys and values of their own: over one sequence, and over paged caches."""

from __future__ import annotations

from ...kernel_query import Arg, Candidate, Declined, KernelQuery, Operand
from ..rowwise.rows import Pages
from .attend import Keys, Query, Variant
from .attend_plan import Attention, PagedIndex, padded, plan


def key_parts(d: int) -> tuple[int, int]:
    """`d` key dims as a power of two and the rest, so that 192 takes 128 + 64 and not 256."""
    first = 1 << (d.bit_length() - 1)
    return first, d - first


def paged_index(query: KernelQuery, caches: int, start: int) -> PagedIndex | Declined:
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
    return PagedIndex(Pages(*(Arg(start + i) for i in range(3)), per_slot, size), slots)


def _rows(index: int, x: Operand, d: int) -> Keys:
    """[..., rows, G, D] as rows of heads, of which the first `d` dims are taken."""
    return Keys(Arg(index), x.strides[-3], x.strides[-2], d, padded(d))


def _attention(query: KernelQuery, index: PagedIndex | None) -> Candidate | Declined:
    q, k, v = query.args[:3]
    if any(x.strides[-1] != 1 for x in (q, k, v)):
        return Declined("expected heads whose dims follow one another")
    if (sinks := query.operand("sinks")) and not sinks.dense:
        return Declined("expected dense sinks")
    tokens, heads, dims = q.shape
    d, d_rest = key_parts(dims)
    steps = q.strides[:2]
    attrs = query.attrs
    job = Attention(
        tokens,
        heads,
        k.shape[-2],
        q.type.dtype,
        Query(Arg(0), *steps, 0, d, padded(d)),
        Query(Arg(0), *steps, d, d_rest, padded(d_rest)) if d_rest else None,
        _rows(1, k, d),
        _rows(2, v, v.shape[-1]),
        index.context if index else k.shape[0],
        Variant(
            attrs["scale"],
            attrs.get("window", 0),
            attrs.get("softcap", 0.0),
            attrs.get("causal", True),
            query.ref("sinks"),
        ),
        index,
    )
    return plan(job, query)


def attention(query: KernelQuery) -> Candidate | Declined:
    """attention(q, k, v[, sinks])."""
    return _attention(query, None)


def cached_attention(query: KernelQuery) -> Candidate | Declined:
    """cached_attention(q, k_cache, v_cache, slots, positions, page_table[, sinks])."""
    index = paged_index(query, 1, 3)
    return index if isinstance(index, Declined) else _attention(query, index)


TEMPLATES = {"attention": (attention,), "cached_attention": (cached_attention,)}
