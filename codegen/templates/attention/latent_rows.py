"""The rows of a latent cache, rms_norm(c_kv) ‖ rope(k_pe), made by whoever stores them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .heads_within import stored


class LatentRows(NamedTuple):
    """Rows c_kv ‖ k_pe of `kv`, STEP elements apart: RANK dims normed by `norm`, 2 · HALF dims of
    `rotation` turned. BLOCK_RANK and BLOCK_HALF are the powers of 2 that hold them."""

    kv: Any
    norm: Any
    rotation: Any
    STEP: Any
    RANK: Any
    EPS: Any
    BLOCK_RANK: Any
    BLOCK_HALF: Any


class LatentWithin(NamedTuple):
    """LatentRows that attention appends itself, of BLOCK tokens at most. BY_WAVE as in
    arrival.Arrivals."""

    rows: Any
    BLOCK: Any
    BY_WAVE: Any


@triton.jit
def latent_row(rows, token):
    """The row of a token (i64) in f32: c_kv [BLOCK_RANK], and the two halves of k_pe's pairs
    [BLOCK_HALF]."""
    row = rows.kv + token * rows.STEP
    HALF: tl.constexpr = rows.rotation.HALF
    FORM: tl.constexpr = rows.rotation.FORM
    dim = tl.arange(0, rows.BLOCK_RANK)
    inside = dim < rows.RANK
    c_kv = tl.load(row + dim, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(rows.norm + dim, mask=inside, other=0.0).to(tl.float32)
    pair = tl.arange(0, rows.BLOCK_HALF)
    paired = pair < HALF
    a_at = pair if FORM == "half" else 2 * pair
    b_at = pair + HALF if FORM == "half" else 2 * pair + 1
    a = tl.load(row + rows.RANK + a_at, mask=paired, other=0.0).to(tl.float32)
    b = tl.load(row + rows.RANK + b_at, mask=paired, other=0.0).to(tl.float32)
    table = token * rows.rotation.STEP + pair
    c = tl.load(rows.rotation.cos + table, mask=paired, other=0.0).to(tl.float32)
    s = tl.load(rows.rotation.sin + table, mask=paired, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(c_kv * c_kv, 0) / rows.RANK + rows.EPS)
    return c_kv * scale * gain, a * c - b * s, b * c + a * s


@triton.jit
def store_latent_row(rows, to, row, some):
    """Write what latent_row gives to the row at `to`, where `some`."""
    HALF: tl.constexpr = rows.rotation.HALF
    FORM: tl.constexpr = rows.rotation.FORM
    c_kv, a, b = row
    kind: tl.constexpr = to.dtype.element_ty
    dim = tl.arange(0, rows.BLOCK_RANK)
    tl.store(to + dim, c_kv.to(kind), mask=some & (dim < rows.RANK))
    pair = tl.arange(0, rows.BLOCK_HALF)
    paired = some & (pair < HALF)
    a_to = 2 * pair if FORM == "interleaved" else pair
    b_to = 2 * pair + 1 if FORM == "interleaved" else pair + HALF
    tl.store(to + rows.RANK + a_to, a.to(kind), mask=paired)
    tl.store(to + rows.RANK + b_to, b.to(kind), mask=paired)


@triton.jit
def append_latent_rows(latent, keys, tokens, places):
    """Write the rows of the first `tokens` tokens to `places` [BLOCK] of their cache, but for -1.
    All that this program loads behind it sees them."""
    index = tl.arange(0, latent.BLOCK)
    for token in range(tokens):
        place = tl.sum(tl.where(index == token, places, 0), 0)
        if place >= 0:
            row = latent_row(latent.rows, tl.cast(token, tl.int64))
            store_latent_row(latent.rows, keys.data + place * keys.ROW, row, True)
    stored(latent.BY_WAVE)
