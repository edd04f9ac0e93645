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
from .rope import Rotation

# ---- mla_latent: rms_norm(c_kv) ‖ rope(k_pe)


@triton.jit
def latent_kernel(
    kv,
    weight,
    rotation,
    out,
    cache,
    pages,
    STEP: tl.constexpr,
    RANK: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Program t: row t of `kv`, rows STEP elements apart, RANK + 2 · HALF columns.

    It goes to `out`, to the token's row of `cache`, or to both.
    """
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    row = kv + token * STEP
    HALF: tl.constexpr = rotation.HALF
    FORM: tl.constexpr = rotation.FORM
    WIDTH: tl.constexpr = RANK + 2 * HALF
    dim = tl.arange(0, BLOCK_RANK)
    inside = dim < RANK
    c_kv = tl.load(row + dim, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(c_kv * c_kv, 0) / RANK + EPS)
    c_kv = c_kv * scale * tl.load(weight + dim, mask=inside, other=0.0).to(tl.float32)

    pair = tl.arange(0, BLOCK_HALF)
    paired = pair < HALF
    a_at = pair if FORM == "half" else 2 * pair
    b_at = pair + HALF if FORM == "half" else 2 * pair + 1
    a_to = 2 * pair if FORM == "interleaved" else pair
    b_to = 2 * pair + 1 if FORM == "interleaved" else pair + HALF
    a = tl.load(row + RANK + a_at, mask=paired, other=0.0).to(tl.float32)
    b = tl.load(row + RANK + b_at, mask=paired, other=0.0).to(tl.float32)
    c = tl.load(rotation.cos + token * rotation.STEP + pair, mask=paired, other=0.0).to(tl.float32)
    s = tl.load(rotation.sin + token * rotation.STEP + pair, mask=paired, other=0.0).to(tl.float32)
    turned_a = a * c - b * s
    turned_b = b * c + a * s
    if out is not None:
        to = out + token * WIDTH
        tl.store(to + dim, c_kv.to(out.dtype.element_ty), mask=inside)
        tl.store(to + RANK + a_to, turned_a.to(out.dtype.element_ty), mask=paired)
        tl.store(to + RANK + b_to, turned_b.to(out.dtype.element_ty), mask=paired)
    if cache is not None:
        place = cache_row(pages, token)
        to = cache + place * WIDTH
        inside &= place >= 0
        paired &= place >= 0
        tl.store(to + dim, c_kv.to(cache.dtype.element_ty), mask=inside)
        tl.store(to + RANK + a_to, turned_a.to(cache.dtype.element_ty), mask=paired)
        tl.store(to + RANK + b_to, turned_b.to(cache.dtype.element_ty), mask=paired)


def mla_latent(query: KernelQuery) -> Candidate | Declined:
    """mla_latent(kv, norm_weight, cos, sin)."""
    kv, weight, cos, sin = query.args[:4]
    if kv.strides[1] != 1 or not (weight.dense and cos.dense and sin.dense):
        return Declined("expected rows whose columns follow one another, dense weight and tables")
    rank, half = weight.shape[0], cos.shape[1]
    out, cache = append_refs(query, 0)
    call = Call(
        latent_kernel,
        {
            "kv": Arg(0),
            "weight": Arg(1),
            "rotation": Rotation(Arg(2), Arg(3), query.attrs["form"], rank, half, half),
            "out": out,
            "cache": cache,
            "pages": append_pages(query),
            "STEP": kv.strides[0],
            "RANK": rank,
            "EPS": query.attrs["eps"],
            "BLOCK_RANK": triton.next_power_of_2(rank),
            "BLOCK_HALF": triton.next_power_of_2(half),
        },
        (kv.shape[0], 1, 1),
        tuple(ref for ref in (out, cache) if ref is not None),
    )
    into = ", written into the cache" if query.append else ""
    return Candidate((call,), query.seconds(1), f"a program a token{into}")


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
