"""MXFP4 weights in the order in which tensor cores take them: what packs them, what reads them.

NVIDIA's mma.m16n8k16 wants of its left operand, in lane 4·r + q, rows r and r + 8 and of every 16
columns 2q, 2q + 1, 2q + 8, 2q + 9. The weight is cut into tiles of 16 rows by 128 columns; in a
tile a lane's part is 2 × 16 bytes, four 32-bit words of eight codes each: word g (of columns 32g +
8q … 32g + 8q + 7) lies at [rh, r, q, g] for row r + 8·rh. So a lane loads 16 bytes at once.

In a word the codes lie so that nine operations make four pairs of bf16 of them: sign at bit 15, the
three bits of exponent and mantissa at 8 … 6, which is the number times 2^-126. The low half is of
the even columns, the high half of the odd ones; in a half, for columns 0, 2, 4, 6:

    sign  15, 5 of the other half, 9, 11      exponent and mantissa  8-6, 14-12, 2-0, and 4, 3, 10

So the word itself, rotated right by 6, and shifted left by 6 has columns 0, 2 and 4 in place.

Scales lie [tile, r, g / 2, rh, g % 2], one byte each: a lane loads its eight at once, or a word of
four for two groups.
"""

from __future__ import annotations

import torch

from ..dtypes import FLOATS
from ..ir import Op, Sample, free
from ..microscaling import decode
from ..torch_types import torch_dtype
from ..types import Dim, TensorType, Types, VerifyError
from .mxfp4 import mxfp4

ROWS, COLUMNS, GROUP = 16, 128, 32


def _tiled(rows: int, columns: int, *experts: Dim) -> Types:
    """Codes and scales of a weight in tiles; the last tiles may be filled up with zeros."""
    tiles = *experts, -(-rows // ROWS), -(-columns // COLUMNS)
    sizes = ROWS * COLUMNS // 2, ROWS * COLUMNS // GROUP
    return tuple(TensorType("u8", (*tiles, size)) for size in sizes)


# ---- mxfp4_fragments: codes u8 [N, K/2] and scales u8 [N, K/32] -> both in tiles; with experts,
# [E, N, …], each by itself: [E, tiles down, tiles across, bytes of a tile]


def _infer(codes: TensorType, scales: TensorType, *, gated: bool = False) -> Types:
    name = "mxfp4_fragments"
    sizes = (*codes.shape, *scales.shape)
    if not 2 <= codes.rank == scales.rank <= 3 or not all(isinstance(d, int) for d in sizes):
        raise VerifyError(
            f"{name}: expected codes and scales of two dims, or three, found {codes}, {scales}"
        )
    (*experts, n, half), (*others, rows, blocks) = codes.shape, scales.shape
    same = experts == others and n == rows and 2 * half == GROUP * blocks
    if (codes.dtype, scales.dtype) != ("u8", "u8") or not same:
        raise VerifyError(
            f"{name}: expected codes u8 [N, K/2] and scales u8 [N, K/{GROUP}], "
            f"found {codes} and {scales}"
        )
    if gated and int(n) % ROWS:
        raise VerifyError(f"{name}: expected gate and up rows in eights, found {n} rows")
    return _tiled(int(n), 2 * int(half), *experts)


def _ordered(x: torch.Tensor, gated: bool) -> torch.Tensor:
    """Rows in the order of tiles: as they are, or eight gate rows and their up rows by turns."""
    if not gated:
        return x
    return x.view(2, -1, ROWS // 2, x.shape[1]).transpose(0, 1).reshape(x.shape)


def _half_words(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes u8 [..., 4, 2] (of columns in order) in two halves of 16 bits, i16 [..., 2]."""
    a, b, c, d = codes.to(torch.int16).unbind(-2)
    own = (a & 8) << 12 | (a & 7) << 6 | (b & 7) << 12 | (c & 8) << 6 | (c & 7)
    own |= (d & 8) << 8 | (d & 6) << 2 | (d & 1) << 10
    return own | ((b & 8) << 2).flip(-1)


def _reference(
    codes: torch.Tensor, scales: torch.Tensor, *, gated: bool = False
) -> tuple[torch.Tensor, ...]:
    if codes.ndim == 3:
        each = [_reference(*expert, gated=gated) for expert in zip(codes, scales, strict=True)]
        return tuple(map(torch.stack, zip(*each, strict=True)))
    down, across = -(-codes.shape[0] // ROWS), -(-2 * codes.shape[1] // COLUMNS)
    codes, scales = _ordered(codes, gated), _ordered(scales, gated)
    rows = down * ROWS - codes.shape[0]
    codes = torch.nn.functional.pad(codes, (0, across * COLUMNS // 2 - codes.shape[1], 0, rows))
    scales = torch.nn.functional.pad(scales, (0, across * 4 - scales.shape[1], 0, rows), value=127)
    both = torch.stack((codes & 15, codes >> 4), -1)  # even columns, odd columns
    # [down, rh, r, across, g, q, four bytes, even or odd]
    both = both.view(down, 2, 8, across, 4, 4, 4, 2)
    parts = _half_words(both).permute(0, 3, 1, 2, 5, 4, 6).contiguous()  # down across rh r q g half
    blocks = scales.view(down, 2, 8, across, 2, 2).permute(0, 3, 2, 4, 1, 5)
    parts = parts.view(torch.uint8).view(down, across, -1)
    return parts, blocks.reshape(down, across, -1).contiguous()


def _type(*shape: int) -> TensorType:
    return TensorType("u8", shape)


mxfp4_fragments = Op(
    "mxfp4_fragments",
    _infer,
    _reference,
    samples=(
        Sample((_type(32, 128), _type(32, 8)), {"gated": True}, high=256),
        Sample((_type(19, 48), _type(19, 3)), high=256),
        Sample((_type(3, 32, 80), _type(3, 32, 5)), {"gated": True}, high=256),
    ),
)


def unpacked(
    codes: torch.Tensor, scales: torch.Tensor, n: int, k: int, gated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `mxfp4_fragments` was given, codes u8 [..., n, k/2] and scales u8 [..., n, k/32]."""
    if codes.ndim == 4:
        each = [unpacked(*expert, n, k, gated) for expert in zip(codes, scales, strict=True)]
        both = zip(*each, strict=True)
        return torch.stack(next(both)), torch.stack(next(both))
    down, across = codes.shape[:2]
    parts = codes.view(down, across, 2, 8, 4, 4, 4).to(torch.int64)
    halves = parts[..., 0::2] | parts[..., 1::2] << 8  # low, high
    a, c = ((h >> 12 & 8) | (h >> 6 & 7) for h in (halves, halves << 6))
    b = (halves.flip(-1) >> 2 & 8) | (halves >> 12 & 7)
    d = (halves >> 8 & 8) | (halves >> 2 & 6) | (halves >> 10 & 1)
    low, high = torch.stack((a, b, c, d), -1).unbind(-2)
    # [down, across, rh, r, q, g, four bytes] of low and high nibbles -> rows, columns
    both = (low | high << 4).to(torch.uint8).permute(0, 2, 3, 1, 5, 4, 6)
    blocks = scales.view(down, across, 8, 2, 2, 2).permute(0, 4, 2, 1, 3, 5)
    found: list[torch.Tensor] = []
    for x, width in ((both, k // 2), (blocks, k // GROUP)):
        rows = x.reshape(down * ROWS, -1)
        if gated:
            rows = rows.view(-1, 2, ROWS // 2, rows.shape[1]).transpose(0, 1).reshape(rows.shape)
        found.append(rows[:n, :width])
    return found[0], found[1]


# ---- mxfp4_tiled: codes and scales in tiles -> numbers [rows, columns], or [E, rows, columns], as
# `mxfp4` of what `mxfp4_fragments` was given


def _tiled_infer(
    codes: TensorType,
    scales: TensorType,
    *,
    rows: int,
    columns: int,
    dtype: str,
    gated: bool = False,
) -> Types:
    if dtype not in FLOATS or columns % GROUP or (gated and rows % ROWS):
        raise VerifyError(
            f"mxfp4_tiled: expected a float dtype, columns in groups of {GROUP}, and gate and up "
            f"rows in eights, found {dtype!r}, {columns} columns and {rows} rows"
        )
    experts = codes.shape[:-3]
    expected = _tiled(rows, columns, *experts[:1])
    if (codes, scales) != expected:
        shown = " and ".join(map(str, expected))
        raise VerifyError(f"mxfp4_tiled: expected {shown}, found {codes} and {scales}")
    return (TensorType(dtype, (*experts, rows, columns)),)


def _tiled_reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    rows: int,
    columns: int,
    dtype: str,
    gated: bool = False,
) -> torch.Tensor:
    return decode(*unpacked(codes, scales, rows, columns, gated), torch_dtype(dtype))


mxfp4_tiled = Op(
    "mxfp4_tiled",
    _tiled_infer,
    _tiled_reference,
    free,
    tuple(
        Sample(_tiled(*sizes), {"rows": sizes[0], "columns": sizes[1], **more}, high=251)
        for sizes, more in (
            ((32, 256), {"dtype": "bf16", "gated": True}),
            ((19, 96), {"dtype": "f32"}),
            ((32, 160, 3), {"dtype": "bf16", "gated": True}),
        )
    ),
    stored=lambda node: node.types[0].with_dtype(f"mxfp4g{GROUP}"),
    domain=mxfp4.domain,
)
