"""Latent attention over a paged cache by rows that it makes and appends itself."""

from __future__ import annotations

from typing import Any

import torch

from ..axes import rule
from ..ir import Cost, Op, Operands
from ..types import TensorType, Types, VerifyError
from .mla import cached_mla_attention, mla_latent
from .rope import rope

# ---- latent_attention: row = mla_latent(kv, norm_weight, cos, sin) appended to cache, and
# cached_mla_attention(q_latent, q_pe, cache, slots, positions, page_table) of what it holds then
# -> [T, H, R], row [T, R + P] and the new cache. With `rotate` q_pe is rotated first, as k_pe is.
#
# Rounds where the ops do.

INDEX = ("slots", "positions", "page_table")


def _infer(
    q_latent: TensorType,
    q_pe: TensorType,
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
    scale: float,
    rotate: bool,
) -> Types:
    if cache is None or slots is None or positions is None or page_table is None:
        raise VerifyError("latent_attention: expected a cache and its index")
    index = {"slots": slots, "positions": positions, "page_table": page_table}
    try:
        if rotate:
            rope.infer(q_pe, cos, sin, form=form)
        row, after = mla_latent.infer(
            kv, norm_weight, cos, sin, cache=cache, **index, eps=eps, form=form
        )
        (out,) = cached_mla_attention.infer(q_latent, q_pe, after, *index.values(), scale=scale)
    except VerifyError as error:
        raise VerifyError(f"latent_attention: {error}") from error
    return (out, row, after)


def _reference(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    form: str,
    scale: float,
    rotate: bool,
    **named: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    row, after = mla_latent.reference(kv, norm_weight, cos, sin, eps=eps, form=form, **named)
    if rotate:
        (q_pe,) = rope.reference(q_pe, cos, sin, form=form)
    index = (named[name] for name in INDEX)
    (out,) = cached_mla_attention.reference(q_latent, q_pe, after, *index, scale=scale)
    return (out, row, after)


def _cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    """Both ops, the index moved by neither."""
    names = ("kv", "norm_weight", "cos", "sin", "cache")
    first = mla_latent.cost({n: operands[n] for n in names}, results[1:], **attrs)
    names = ("q_latent", "q_pe", "cache", "page_table")
    then = cached_mla_attention.cost({n: operands[n] for n in names}, results[:1], **attrs)
    return Cost(first.flops + then.flops, first.bytes + then.bytes)


latent_attention = Op(
    "latent_attention",
    _infer,
    _reference,
    _cost,
    caches=("", "cache"),
    axes=rule(
        "q_latent[t,h,r] q_pe[t,h,q] kv[t,c] norm_weight[r] cos[t,f] sin[t,f] cache[p,z,w] "
        "slots[t] positions[t] page_table[a,b] -> [t,h,r], [t,c], [p,z,w]; "
        "r q c f p z w a b t whole"
    ),
)
