"""Attention over a paged cache by heads out of one product, which are appended to it first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..axes import Axes, rule
from ..ir import Cost, Op, Operands
from ..types import TensorType, Types, VerifyError
from .attention import cached_attention
from .heads import project_heads

# ---- project_attention: q, k, v = project_heads(x, weight, …) with k and v appended to k_cache and
# v_cache, and cached_attention(q, k_cache, v_cache, slots, positions, page_table, sinks) of what
# these hold then -> [T, H, V], k and v, s if there is a delta, and the new caches.
#
# Rounds where the two ops do.

# Operands and attributes that are the attention's alone.
_ATTENTION = ("sinks", "scale", "window", "softcap")
# Caches as project_heads has them.
CACHES = {"cache_1": "k_cache", "cache_2": "v_cache"}
INDEX = ("slots", "positions", "page_table")


def _infer(
    x: TensorType,
    weight: TensorType,
    *,
    norm: TensorType | None = None,
    delta: TensorType | None = None,
    post_norm: TensorType | None = None,
    bias: TensorType | None = None,
    norm_0: TensorType | None = None,
    norm_1: TensorType | None = None,
    norm_2: TensorType | None = None,
    cos: TensorType | None = None,
    sin: TensorType | None = None,
    sinks: TensorType | None = None,
    k_cache: TensorType | None = None,
    v_cache: TensorType | None = None,
    slots: TensorType | None = None,
    positions: TensorType | None = None,
    page_table: TensorType | None = None,
    heads: tuple[int, ...],
    dims: tuple[int, ...],
    rotate: tuple[bool, ...] = (),
    form: str = "",
    start: int = 0,
    norm_of: str = "head",
    head_eps: float | None = None,
    eps: float | None = None,
    post_eps: float | None = None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Types:
    if k_cache is None or v_cache is None or len(heads) != 3:
        raise VerifyError(
            f"project_attention: expected heads of q, k and v, and the caches of k and v, "
            f"found heads {heads}, caches {k_cache} and {v_cache}"
        )
    optional = {
        "norm": norm,
        "delta": delta,
        "post_norm": post_norm,
        "bias": bias,
        "norm_0": norm_0,
        "norm_1": norm_1,
        "norm_2": norm_2,
        "cos": cos,
        "sin": sin,
        "slots": slots,
        "positions": positions,
        "page_table": page_table,
    }
    attrs = {
        "heads": heads,
        "dims": dims,
        "rotate": rotate,
        "form": form,
        "start": start,
        "norm_of": norm_of,
        "head_eps": head_eps,
        "eps": eps,
        "post_eps": post_eps,
    }
    try:
        q, *rest = project_heads.infer(
            x, weight, **optional, **attrs, cache_1=k_cache, cache_2=v_cache
        )
        caches: Any = (*rest[-2:], slots, positions, page_table)
        (out,) = cached_attention.infer(
            q, *caches, sinks=sinks, scale=scale, window=window, softcap=softcap
        )
    except VerifyError as error:
        raise VerifyError(f"project_attention: {error}") from error
    return (out, *rest)


def parted(named: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What project_heads takes of the optional operands and attributes, and cached_attention."""
    given = {new: named[old] for new, old in CACHES.items()}
    heads = {n: v for n, v in named.items() if n not in (*_ATTENTION, *CACHES.values())}
    return {**heads, **given}, {n: v for n, v in named.items() if n in _ATTENTION}


def _reference(x: torch.Tensor, weight: torch.Tensor, **named: Any) -> tuple[torch.Tensor, ...]:
    heads, attends = parted(named)
    q, *rest = project_heads.reference(x, weight, **heads)
    index = (named[name] for name in INDEX)
    (out,) = cached_attention.reference(q, *rest[-2:], *index, **attends)
    return (out, *rest)


def _cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    """Both ops, q moved by neither, and the index by none."""
    heads, attends = parted({**operands, **attrs})
    q = results[0].with_shape((results[0].shape[0], attrs["heads"][0], attrs["dims"][0]))
    read = {n: x for n, x in heads.items() if isinstance(x, TensorType) and n not in INDEX}
    first = project_heads.cost(read, (q, *results[1:]), **attrs)
    seen = {n: operands[n] for n in ("k_cache", "v_cache", "page_table")}
    then = cached_attention.cost({"q": q, **seen}, results[:1], **attends)
    return Cost(first.flops + then.flops, first.bytes + then.bytes - 2 * q.nbytes)


def _axes(operands: Operands, results: Types, attrs: Mapping[str, Any]) -> Axes:
    """x[t,k] weight[n,k] … -> [t,h,v], k [t,g,d] and v [t,g,v], s [t,k], caches."""
    sums = "[t,k], " if "delta" in operands else ""
    return rule(
        "x[t,k] weight[n,k] norm[k]? delta[t,k]? post_norm[k]? bias[n]? norm_0[w0]? norm_1[w1]? "
        "norm_2[w2]? cos[t,r]? sin[t,r]? k_cache[p,z,g,d] v_cache[p,z,g,e] slots[t] positions[t] "
        f"page_table[a,b] sinks[h]? -> [t,h,e], [t,g,d], [t,g,e], {sums}[p,z,g,d], [p,z,g,e]; "
        "k dot; k whole if norm delta; n r h g d e w0 w1 w2 p z a b t whole"
    )(operands, results, attrs)


project_attention = Op(
    "project_attention",
    _infer,
    _reference,
    _cost,
    caches=("", *CACHES.values()),
    axes=_axes,
)
