"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its tables."""

from __future__ import annotations

import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Op, Sample, Tolerance, per_element
from ..torch_types import torch_dtype, wide
from ..types import TensorType, Types, VerifyError

# How the two members of rotated pair i of R are placed: (where read, where written).
#   half:           (i, i + R/2)       -> the same places    (Llama, GPT-NeoX)
#   interleaved:    (2i, 2i + 1)       -> the same places    (GPT-J, Ernie)
#   deinterleaved:  (2i, 2i + 1)       -> (i, i + R/2)       (DeepSeek-V3)
FORMS = ("half", "interleaved", "deinterleaved")


# ---- rope_tables: cos and sin of positions · inv_freq


def _tables_infer(
    positions: TensorType, inv_freq: TensorType, *, scale: float, dtype: str
) -> Types:
    integers = positions.dtype in ("i32", "i64")
    if not integers or positions.rank != 1 or inv_freq.rank != 1 or inv_freq.dtype not in FLOATS:
        raise VerifyError(
            f"rope_tables: expected integer positions [T] and frequencies [R/2], "
            f"found {positions} and {inv_freq}"
        )
    table = TensorType(dtype, (*positions.shape, *inv_freq.shape))
    return (table, table)


def _tables_reference(
    positions: torch.Tensor, inv_freq: torch.Tensor, *, scale: float, dtype: str
) -> tuple[torch.Tensor, ...]:
    frequencies = wide(inv_freq)
    angles = positions.to(frequencies.dtype)[:, None] * frequencies
    return tuple((f(angles) * scale).to(torch_dtype(dtype)) for f in (torch.cos, torch.sin))


rope_tables = Op(
    "rope_tables",
    _tables_infer,
    _tables_reference,
    samples=(
        Sample(
            (TensorType("i32", (5,)), TensorType("f32", (4,))),
            {"scale": 1.25, "dtype": "f32"},
            high=9,
        ),
    ),
    tolerance=Tolerance(f32=1e-4),
    axes=rule("positions[t] inv_freq[f] -> [t,f], [t,f]"),
)


# ---- rope: the dims [start, start + R) of each head rotated, the others kept


def _rope_infer(
    x: TensorType, cos: TensorType, sin: TensorType, *, form: str, start: int = 0
) -> Types:
    if form not in FORMS:
        raise VerifyError(f"rope: form is one of {', '.join(FORMS)}, found {form!r}")
    if x.rank < 2 or cos != sin or cos.rank != 2 or not {x.dtype, cos.dtype} <= {*FLOATS}:
        raise VerifyError(
            f"rope: expected x [T, ..., D], cos and sin [T, R/2], found {x}, {cos}, {sin}"
        )
    half, size = cos.shape[1], x.shape[-1]
    fits = isinstance(half, int) and isinstance(size, int) and 0 <= start <= size - 2 * half
    if cos.shape[0] != x.shape[0] or not fits:
        raise VerifyError(f"rope: tables {cos} at dim {start} do not fit x {x}")
    return (x,)


def _rope_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, form: str, start: int = 0
) -> torch.Tensor:
    half = cos.shape[1]
    end = start + 2 * half
    turn = wide(x[..., start:end])
    a, b = (
        (turn[..., :half], turn[..., half:])
        if form == "half"
        else (turn[..., ::2], turn[..., 1::2])
    )
    shape = (cos.shape[0], *(1,) * (x.ndim - 2), half)
    c, s = wide(cos).view(shape), wide(sin).view(shape)
    pair = (a * c - b * s, b * c + a * s)
    turned = torch.stack(pair, -1).flatten(-2) if form == "interleaved" else torch.cat(pair, -1)
    return torch.cat((x[..., :start], turned.to(x.dtype), x[..., end:]), -1)


_TABLE = TensorType("f32", (5, 4))
rope = Op(
    "rope",
    _rope_infer,
    _rope_reference,
    per_element(3),
    (
        Sample((TensorType("f32", (5, 2, 8)), _TABLE, _TABLE), {"form": "half"}),
        Sample(
            (TensorType("f32", (5, 2, 12)), _TABLE, _TABLE), {"form": "interleaved", "start": 2}
        ),
        Sample((TensorType("f32", (5, 8)), _TABLE, _TABLE), {"form": "deinterleaved"}),
    ),
    axes=rule("x[t,*,d] cos[t,r] sin[t,r] -> [t,*,d]; d r whole"),
)
