"""Multi-head latent attention in its absorbed form (DeepSeek-V2, arXiv:2405.04434, section 2.1).

T tokens, H heads. A token's row of latent is c_kv (R dims) ‖ k_pe (P dims), the same for all heads:
keys are the whole row, values its first R dims. It is all that a cache holds of a token.
"""

from __future__ import annotations

from typing import Any

import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Operands, Sample, moved
from ..types import TensorType, Types, VerifyError
from .attention import (
    append_rows,
    attention,
    cached_attention,
    check_index,
    kv_append,
    without_caches,
)
from .norm import rms_norm
from .rope import FORMS, rope


def _check_query(name: str, q_latent: TensorType, q_pe: TensorType, rows: TensorType) -> None:
    """q_latent [T, H, R], q_pe [T, H, P], rows [..., R + P]."""
    sizes = (*q_latent.shape[1:], *q_pe.shape[1:], *rows.shape[-1:])
    one_dtype = q_latent.dtype == q_pe.dtype == rows.dtype and q_latent.dtype in FLOATS
    if q_latent.rank == q_pe.rank == 3 and one_dtype and all(isinstance(d, int) for d in sizes):
        heads, rank, heads_pe, size_pe, width = sizes
        same = heads == heads_pe and q_latent.shape[0] == q_pe.shape[0]
        if same and rank + size_pe == width and rank > 0 and size_pe > 0:
            return
    raise VerifyError(
        f"{name}: expected q_latent [T, H, R], q_pe [T, H, P] and rows [..., R + P] of one float "
        f"dtype with static heads, found {q_latent}, {q_pe}, {rows}"
    )


# ---- mla_attention: every token sees itself and those before it, in one sequence


def _attention_infer(
    q_latent: TensorType, q_pe: TensorType, latent: TensorType, *, scale: float
) -> Types:
    _check_query("mla_attention", q_latent, q_pe, latent)
    if latent.rank != 2 or latent.shape[0] != q_latent.shape[0]:
        raise VerifyError(
            f"mla_attention: expected a latent [T, R + P] of the tokens of {q_latent}, "
            f"found {latent}"
        )
    return (q_latent,)


def _attention_reference(
    q_latent: torch.Tensor, q_pe: torch.Tensor, latent: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, ...]:
    rank = q_latent.shape[-1]
    q, k = torch.cat((q_latent, q_pe), -1), latent.unsqueeze(1)
    return attention.reference(q, k, k[..., :rank], scale=scale)


def _flops(operands: Operands, results: Types, context: Any) -> Any:
    """Scores over R + P dims, and values of R dims, for each of `context` rows."""
    queries = operands["q_latent"].numel + operands["q_pe"].numel
    return 2 * (queries + results[0].numel) * context


def _attention_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    return Cost(_flops(operands, results, operands["latent"].shape[0]), moved(operands, results))


_ROWS, _WIDE_ROWS = (TensorType("f32", (7, n)) for n in (14, 5))
mla_attention = Op(
    "mla_attention",
    _attention_infer,
    _attention_reference,
    _attention_cost,
    (
        Sample(
            (TensorType("f32", (7, 4, 10)), TensorType("f32", (7, 4, 4)), _ROWS), {"scale": 0.3}
        ),
        Sample(
            (TensorType("f32", (7, 1, 3)), TensorType("f32", (7, 1, 2)), _WIDE_ROWS), {"scale": 1.0}
        ),
    ),
    axes=rule("q_latent[t,h,r] q_pe[t,h,p] latent[s,c] -> [t,h,r]; t s r p c whole"),
)


# ---- cached_mla_attention: token t sees its slot's rows of the paged cache up to its own position


def _cached_infer(
    q_latent: TensorType,
    q_pe: TensorType,
    cache: TensorType,
    slots: TensorType,
    positions: TensorType,
    page_table: TensorType,
    *,
    scale: float,
) -> Types:
    _check_query("cached_mla_attention", q_latent, q_pe, cache)
    check_index("cached_mla_attention", q_latent.shape[0], (slots, positions, page_table))
    if cache.rank != 3:
        raise VerifyError(
            f"cached_mla_attention: expected a cache [pages, size, R + P], found {cache}"
        )
    return (q_latent,)


def _cached_reference(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    page_table: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    rank = q_latent.shape[-1]
    q, k = torch.cat((q_latent, q_pe), -1), cache.unsqueeze(2)
    index = (slots, positions, page_table)
    return cached_attention.reference(q, k, k[..., :rank], *index, scale=scale)


def _cached_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    """Bytes of every page a slot may hold, each read once for keys and values together."""
    names = ("q_latent", "q_pe", "cache", "page_table")
    q_latent, q_pe, cache, page_table = (operands[name] for name in names)
    page = cache.with_shape(cache.shape[1:])
    read = q_latent.nbytes + q_pe.nbytes + page_table.numel * page.nbytes
    flops = _flops(operands, results, page_table.shape[1] * cache.shape[1])
    return Cost(flops, read + results[0].nbytes)


cached_mla_attention = Op(
    "cached_mla_attention",
    _cached_infer,
    _cached_reference,
    _cached_cost,
    axes=rule(
        "q_latent[t,h,r] q_pe[t,h,q] cache[p,z,c] slots[t] positions[t] page_table[n,m] "
        "-> [t,h,r]; p z n m r q c whole"
    ),
)


# ---- mla_latent: rms_norm(c_kv) ‖ rope(k_pe) of c_kv ‖ k_pe, each rounded once; with a cache the
# row is appended to it, as by kv_append, and the new cache is the last result


def _latent_infer(
    kv: TensorType,
    norm_weight: TensorType,
    cos: TensorType,
    sin: TensorType,
    *,
    cache: TensorType | None = None,
    slots: TensorType | None = None,
    positions: TensorType | None = None,
    page_table: TensorType | None = None,
    eps: float,
    form: str,
) -> Types:
    if form not in FORMS:
        raise VerifyError(f"mla_latent: form is one of {', '.join(FORMS)}, found {form!r}")
    kinds = {kv.dtype, norm_weight.dtype, cos.dtype} <= {*FLOATS}
    ranks = (kv.rank, norm_weight.rank, cos.rank) == (2, 1, 2)
    if not kinds or not ranks or cos != sin or cos.shape[0] != kv.shape[0]:
        raise VerifyError(
            f"mla_latent: expected floats kv [T, R + P], norm_weight [R], cos and sin [T, P/2], "
            f"found {kv}, {norm_weight}, {cos}, {sin}"
        )
    if kv.shape[1] != norm_weight.shape[0] + 2 * cos.shape[1]:
        raise VerifyError(
            f"mla_latent: expected kv of {norm_weight.shape[0]} + 2 · {cos.shape[1]} columns, "
            f"found {kv}"
        )
    return (kv, *append_rows(kv_append.infer, (kv,), (cache,), (slots, positions, page_table)))


def _latent_reference(
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    cache: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    eps: float,
    form: str,
) -> tuple[torch.Tensor, ...]:
    rank = norm_weight.shape[0]
    (c_kv,) = rms_norm.reference(kv[:, :rank], weight=norm_weight, eps=eps)
    (k_pe,) = rope.reference(kv[:, rank:], cos, sin, form=form)
    row = torch.cat((c_kv, k_pe), -1)
    index = (slots, positions, page_table)
    return (row, *append_rows(kv_append.reference, (row,), (cache,), index))


def _latent_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    """Of the cache it writes the rows, which count as the result, alone."""
    operands, results = without_caches(operands, results, ("cache",))
    return Cost(4 * operands["kv"].numel, moved(operands, results))


_KV, _NORM, _TABLE = (TensorType("f32", shape) for shape in ((5, 14), (6,), (5, 4)))
mla_latent = Op(
    "mla_latent",
    _latent_infer,
    _latent_reference,
    _latent_cost,
    tuple(Sample((_KV, _NORM, _TABLE, _TABLE), {"eps": 1e-6, "form": form}) for form in FORMS),
    caches=("cache",),
    axes=rule(
        "kv[t,c] norm_weight[r] cos[t,f] sin[t,f] cache[p,z,w]? slots[t]? positions[t]? "
        "page_table[a,b]? -> [t,c], [p,z,w]; c r f p z w a b whole; t whole if slots"
    ),
)
