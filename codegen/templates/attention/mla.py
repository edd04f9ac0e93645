"""Latent attention: keys are rows of c_kv ‖ k_pe, values their c_kv; and the rows themselves."""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl

from ...kernel_query import Arg, Call, Candidate, Declined, KernelQuery
from ..pdl import pdl_wait
from ..rowwise.rows import append_pages, append_refs, cache_row
from .attend import Keys, Query, Variant
from .attend_plan import Attention, padded, plan
from .grouped_query import pages_of
from .latent_rows import LatentRows, latent_row, store_latent_row
from .rope import Rotation

# ---- mla_latent: rms_norm(c_kv) ‖ rope(k_pe)


@triton.jit
def latent_kernel(rows, out, cache, pages, PROGRAMMATIC: tl.constexpr):
    """Program t: row t of LatentRows, to `out`, to the token's row of `cache`, or to both."""
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = rows.RANK + 2 * rows.rotation.HALF
    row = latent_row(rows, token)
    if out is not None:
        store_latent_row(rows, out + token * WIDTH, row, True)
    if cache is not None:
        place = cache_row(pages, token)
        store_latent_row(rows, cache + place * WIDTH, row, place >= 0)


def mla_latent(query: KernelQuery) -> Candidate | Declined:
    """mla_latent(kv, norm_weight, cos, sin)."""
    rows = latent_rows(query, 0)
    if isinstance(rows, Declined):
        return rows
    into = ", written into the cache" if query.append else ""
    return Candidate((rows_call(query, rows, 0),), query.seconds(1), f"a program a token{into}")


def latent_rows(query: KernelQuery, first: int) -> LatentRows | Declined:
    """LatentRows of the arguments kv, norm_weight, cos and sin, from `first` on."""
    kv, weight, cos, sin = query.args[first : first + 4]
    if kv.strides[1] != 1 or not (weight.dense and cos.dense and sin.dense):
        return Declined("expected rows whose columns follow one another, dense weight and tables")
    rank, half = weight.shape[0], cos.shape[1]
    tables = Arg(first + 2), Arg(first + 3)
    return LatentRows(
        Arg(first),
        Arg(first + 1),
        Rotation(*tables, query.attrs["form"], rank, half, half),
        kv.strides[0],
        rank,
        query.attrs["eps"],
        triton.next_power_of_2(rank),
        triton.next_power_of_2(half),
    )


def rows_call(query: KernelQuery, rows: LatentRows, result: int) -> Call:
    """The launch that makes `rows`, which are result `result` of the node."""
    out, cache = append_refs(query, result)
    return Call(
        latent_kernel,
        {"rows": rows, "out": out, "cache": cache, "pages": append_pages(query)},
        (query.results[result].shape[0], 1, 1),
        tuple(ref for ref in (out, cache) if ref is not None),
    )


# ---- mla_attention, cached_mla_attention: all heads share the one row that a token has


def mla_attention(query: KernelQuery) -> Iterable[Candidate | Declined] | Declined:
    """mla_attention(q_latent, q_pe, latent), and with a paged cache cached_mla_attention(q_latent,
    q_pe, cache, slots, positions, page_table)."""
    pages = pages_of(query, 2)
    if isinstance(pages, Declined):
        return pages
    q, q_pe, rows = query.args[:3]
    if any(x.strides[-1] != 1 for x in (q, q_pe, rows)):
        return Declined("expected rows whose dims follow one another")
    rank, rest = q.shape[2], q_pe.shape[2]
    job = Attention(
        query,
        1,
        Query(Arg(0), *q.strides[:2], 0, rank, padded(rank)),
        Query(Arg(1), *q_pe.strides[:2], 0, rest, padded(rest)),
        Keys(Arg(2), rows.strides[-2], 0, rank, padded(rank)),
        None,
        Variant(query.attrs["scale"], 0, 0.0, True, None),
        pages,
    )
    return plan(job)


TEMPLATES = {
    "mla_latent": (mla_latent,),
    "mla_attention": (mla_attention,),
    "cached_mla_attention": (mla_attention,),
}
