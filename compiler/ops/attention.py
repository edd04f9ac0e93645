"""Attention, over the tokens of one sequence and over a paged cache, and the cache's append.

T tokens, H query heads, G key/value heads (H a multiple of G), D and V dims a head. A cache is
`[pages, page_size, G, D]`; `page_table[slot, i]` is the page that holds the slot's positions
[i · page_size, (i + 1) · page_size). A token of slot -1 is padding: it is not stored, and attends
to nothing (its result is 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..axes import Axes, rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Operands, Sample, moved
from ..torch_types import wide
from ..types import Dim, TensorType, Types, VerifyError
from .linear import product

# Query tokens whose scores are held at once by the references.
_QUERY_BLOCK = 256


def _check_heads(name: str, q: TensorType, k: TensorType, v: TensorType) -> None:
    """q [T, H, D], k [..., G, D], v [..., G, V]."""
    heads = (q.shape[-2:], k.shape[-2:], v.shape[-2:])
    sizes = [d for pair in heads for d in pair if isinstance(d, int)]
    if q.rank != 3 or len(sizes) != 6:
        raise VerifyError(f"{name}: expected q [T, H, D] with static heads, found {q}, {k}, {v}")
    h, d, g, kd, vg, _ = sizes
    if d != kd or g != vg or g < 1 or h % g:
        raise VerifyError(
            f"{name}: expected q [T, H, D], k [..., G, D], v [..., G, V] with H a multiple of G, "
            f"found {q}, {k}, {v}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in FLOATS:
        raise VerifyError(f"{name}: expected one float dtype, found {q}, {k}, {v}")


def _check_options(
    name: str, q: TensorType, sinks: TensorType | None, window: int, softcap: float
) -> None:
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.dtype not in FLOATS):
        raise VerifyError(f"{name}: expected a float sink for each head of {q}, found {sinks}")
    if window < 0 or not softcap >= 0:
        raise VerifyError(
            f"{name}: expected window and softcap of at least 0, found {window} and {softcap}"
        )


def _attend_pages(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """q [N, H, D] over keys [P, size, G, D] -> [N, H, V]; `hidden` is [N, P, size].

    Sums run page by page in order, so that a token's result does not depend on how many later
    pages or other tokens are given beside it.
    """
    tokens, heads, _ = q.shape
    pages, size, groups, _ = keys.shape
    rows = q.view(tokens, groups, -1, q.shape[-1]).permute(1, 2, 0, 3).flatten(1, 2)
    scores = product(rows[None].expand(pages, -1, -1, -1), keys.permute(0, 2, 1, 3))
    scores = scores.view(pages, groups, -1, tokens, size) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(hidden.transpose(0, 1)[:, None, None], -math.inf)
    top = scores.amax((0, -1))
    sink = None if sinks is None else sinks.to(q.dtype).view(groups, -1, 1)
    if sink is not None:
        top = torch.maximum(top, sink)
    weights = torch.exp(scores - top[..., None])
    total = torch.zeros_like(top) if sink is None else torch.exp(sink - top)
    out = q.new_zeros(groups, rows.shape[1], values.shape[-1])
    parts = product(weights.flatten(2, 3), values.permute(0, 2, 3, 1))
    for part, weight in zip(parts, weights.sum(-1), strict=True):
        out, total = out + part, total + weight
    out = out.view(groups, -1, tokens, values.shape[-1]) / total[..., None]
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, -1)


# ---- attention: every token sees itself and those before it, within `window` if it is not 0.
# `softcap` bounds scores by tanh; a sink is one more score a head that takes weight, adds nothing.


def _attention_infer(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    *,
    sinks: TensorType | None = None,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
) -> Types:
    _check_heads("attention", q, k, v)
    _check_options("attention", q, sinks, window, softcap)
    if k.rank != 3 or v.rank != 3 or k.shape[0] != v.shape[0]:
        raise VerifyError(f"attention: expected k [S, G, D] and v [S, G, V], found {k} and {v}")
    return (q.with_shape((*q.shape[:2], v.shape[2])),)


def _attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    seen = torch.arange(len(k), device=q.device)
    keys, values = wide(k)[None], wide(v)[None]
    blocks: list[torch.Tensor] = []
    for rows in torch.arange(len(q), device=q.device).split(_QUERY_BLOCK):
        at = rows[:, None, None] + (len(k) - len(q))
        hidden = (seen > at) & causal
        if window:
            hidden = hidden | (seen <= at - window)
        block = _attend_pages(wide(q[rows]), keys, values, hidden, sinks, scale, softcap)
        blocks.append(block.to(q.dtype))
    return torch.cat(blocks)


def _attention_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    q, k, v = (operands[name] for name in ("q", "k", "v"))
    flops = 2 * q.numel * k.shape[0] + 2 * results[0].numel * v.shape[0]
    return Cost(flops, moved(operands, results))


_Q, _K, _V, _SINKS = (TensorType("f32", shape) for shape in ((7, 4, 8), (7, 2, 8), (7, 2, 6), (4,)))
attention = Op(
    "attention",
    _attention_infer,
    _attention_reference,
    _attention_cost,
    (
        Sample((_Q, _K, _V), {"scale": 0.3}),
        Sample((_Q, _K, _V), {"sinks": _SINKS, "scale": 0.3, "window": 3}),
        Sample((_Q, _K, _V), {"scale": 0.3, "softcap": 2.0}),
        Sample((_Q, _K, _V), {"scale": 0.3, "causal": False}),
    ),
    axes=rule("q[t,(g r),d] k[s,g,d] v[s,g,v] sinks[(g r)]? -> [t,(g r),v]; t s d whole"),
)


# ---- kv_append: rows [T, G, D] written at their positions; kv_append(caches..., rows..., slots,
# positions, page_table) gives the new caches


def check_index(name: str, tokens: Any, index: tuple[TensorType, ...]) -> None:
    slots, positions, page_table = index
    expected = TensorType("i32", (tokens,))
    if (
        slots != expected
        or positions != expected
        or page_table.dtype != "i32"
        or page_table.rank != 2
    ):
        raise VerifyError(
            f"{name}: expected slots and positions {expected} and an i32 page table "
            f"[slots, pages], found {slots}, {positions}, {page_table}"
        )


def _append_infer(*args: TensorType) -> Types:
    count = (len(args) - 3) // 2
    if count < 1 or len(args) != 2 * count + 3:
        raise VerifyError(
            "kv_append: expected as many caches as rows, slots, positions, page table"
        )
    for cache, rows in zip(args[:count], args[count : 2 * count], strict=True):
        fits = cache.rank >= 3 and cache.shape[2:] == rows.shape[1:] and cache.dtype == rows.dtype
        if not fits or rows.shape[:1] != args[count].shape[:1]:
            raise VerifyError(
                f"kv_append: expected rows [T, ...] that fit cache {cache}, found {rows}"
            )
        if cache.shape[:2] != args[0].shape[:2]:
            raise VerifyError(
                f"kv_append: expected caches of equal pages, found {cache}, {args[0]}"
            )
    check_index("kv_append", args[count].shape[0], args[2 * count :])
    return args[:count]


def _append_inplace(*args: torch.Tensor) -> None:
    count = (len(args) - 3) // 2
    slots, positions, page_table = args[2 * count :]
    real = (slots >= 0).nonzero().squeeze(1)
    if not real.numel():
        return
    size = args[0].shape[1]
    where = positions[real].long()
    pages = page_table[slots[real].long(), where // size].long()
    _check_positive("kv_append", where, pages)
    for cache, rows in zip(args[:count], args[count : 2 * count], strict=True):
        cache[pages, where % size] = rows[real]


def _check_positive(name: str, positions: torch.Tensor, pages: torch.Tensor) -> None:
    """IndexError for negative ones, which torch counts from the end."""
    if min(int(positions.min()), int(pages.min())) < 0:
        raise IndexError(
            f"{name}: expected positions and pages from 0, found {int(positions.min())} and "
            f"{int(pages.min())} at least"
        )


def _append_reference(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    count = (len(args) - 3) // 2
    caches = tuple(cache.clone() for cache in args[:count])
    _append_inplace(*caches, *args[count:])
    return caches


def _append_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    rows = [*operands.values()][len(results) : 2 * len(results)]
    return Cost(0, sum((2 * t.nbytes for t in rows), 0))


def _append_axes(operands: Operands, results: Types, attrs: Mapping[str, Any]) -> Axes:
    """caches[p,z,...] rows[t,...] slots[t] positions[t] page_table[n,m] -> [p,z,...]"""
    names = [tuple(f"{i}.{j}" for j in range(cache.rank - 2)) for i, cache in enumerate(results)]
    caches = tuple(tuple((n,) for n in ("p", "z", *own)) for own in names)
    rows = tuple(tuple((n,) for n in ("t", *own)) for own in names)
    sizes: dict[str, Dim] = {}
    for own, cache in zip(names, results, strict=True):
        sizes.update(zip(("p", "z", *own), cache.shape, strict=True))
    positions, page_table = [*operands.values()][-2:]
    sizes.update(t=positions.shape[0], n=page_table.shape[0], m=page_table.shape[1])
    index = ((("t",),), (("t",),), (("n",), ("m",)))
    return Axes((*caches, *rows, *index), caches, sizes, whole=frozenset("pztnm"))


_CACHE, _INDEX = TensorType("f32", (6, 4, 2, 8)), TensorType("i32", (7,))
_TABLE = TensorType("i32", (2, 3))
kv_append = Op(
    "kv_append",
    _append_infer,
    _append_reference,
    _append_cost,
    inplace=_append_inplace,
    axes=_append_axes,
)


def append_rows(
    append: Callable[..., tuple[Any, ...]],
    rows: Sequence[Any],
    caches: Sequence[Any],
    index: Sequence[Any],
) -> tuple[Any, ...]:
    """What those of `caches` that are there hold next: each with its rows appended.

    For ops that write their results into caches; `append` is kv_append's infer or its reference,
    `index` slots, positions and page table. VerifyError where one of these is missing, or rows.
    """
    given = [(cache, own) for cache, own in zip(caches, rows, strict=False) if cache is not None]
    count = sum(cache is not None for cache in caches)
    if len(given) < count or any((x is not None) != bool(count) for x in index):
        raise VerifyError(
            "expected caches of results together with slots, positions and page table, found "
            f"{count} caches, {len(given)} of results, and {sum(x is not None for x in index)} of "
            "these three"
        )
    return append(*(c for c, _ in given), *(own for _, own in given), *index) if given else ()


def without_caches(
    operands: Operands, results: Types, caches: Sequence[str]
) -> tuple[Operands, Types]:
    """Operands and results of an op that appends to `caches`, but for those."""
    left = {name: type_ for name, type_ in operands.items() if name not in caches}
    return left, results[: len(results) - (len(operands) - len(left))]


# ---- cached_attention: token t sees its slot's cache up to its own position


def _cached_infer(
    q: TensorType,
    k_cache: TensorType,
    v_cache: TensorType,
    slots: TensorType,
    positions: TensorType,
    page_table: TensorType,
    *,
    sinks: TensorType | None = None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Types:
    _check_heads("cached_attention", q, k_cache, v_cache)
    _check_options("cached_attention", q, sinks, window, softcap)
    check_index("cached_attention", q.shape[0], (slots, positions, page_table))
    if k_cache.rank != 4 or k_cache.shape[:2] != v_cache.shape[:2]:
        raise VerifyError(
            f"cached_attention: expected caches [pages, size, G, D], found {k_cache}, {v_cache}"
        )
    return (q.with_shape((*q.shape[:2], v_cache.shape[3])),)


def _cached_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    page_table: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    size = k_cache.shape[1]
    out = q.new_zeros(*q.shape[:2], v_cache.shape[-1])
    for slot in slots.unique().tolist():
        if slot < 0:
            continue
        for mine in (slots == slot).nonzero().squeeze(1).split(_QUERY_BLOCK):
            at = positions[mine].long()[:, None, None]
            first = max(0, int(at.min()) - window + 1) // size if window else 0
            last = int(at.max()) // size
            if last >= page_table.shape[1]:
                raise IndexError(
                    f"cached_attention: expected positions below {page_table.shape[1] * size}, "
                    f"found {int(at.max())}"
                )
            pages = page_table[slot, first : last + 1].long()
            _check_positive("cached_attention", at, pages)
            seen = torch.arange(first * size, (first + len(pages)) * size, device=q.device)
            seen = seen.view(1, -1, size)
            hidden = (seen > at) | (seen <= at - window) if window else seen > at
            # What was never written may be anything, NaN too, and 0 · NaN is NaN.
            unwritten = (seen > at.max()).view(-1, size, 1, 1)
            keys, values = (wide(c[pages]).masked_fill(unwritten, 0.0) for c in (k_cache, v_cache))
            block = wide(q[mine])
            result = _attend_pages(block, keys, values, hidden, sinks, scale, softcap)
            out[mine] = result.to(q.dtype)
    return out


def _cached_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    """Bytes of every page a slot may hold: the most that the run can read."""
    names = ("q", "k_cache", "v_cache", "page_table")
    q, k_cache, v_cache, page_table = (operands[name] for name in names)
    context = page_table.shape[1] * k_cache.shape[1]
    flops = 2 * (q.numel + results[0].numel) * context
    pages_of = (c.with_shape(c.shape[1:]) for c in (k_cache, v_cache))
    cache = sum((page_table.numel * page.nbytes for page in pages_of), 0)
    return Cost(flops, q.nbytes + results[0].nbytes + cache)


cached_attention = Op(
    "cached_attention",
    _cached_infer,
    _cached_reference,
    _cached_cost,
    axes=rule(
        "q[t,(g r),d] k_cache[p,z,g,d] v_cache[p,z,g,v] slots[t] positions[t] page_table[n,m] "
        "sinks[(g r)]? -> [t,(g r),v]; p z n m d whole"
    ),
)
