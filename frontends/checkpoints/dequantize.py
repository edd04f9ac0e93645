"""Dequantization on reading: FP8 blocks, NVFP4 and INT4 groups to dense floats.

The product of codes and scales is exact in f64 (a quotient has 53 bits) and rounded once to the
requested dtype, some rows at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from ...compiler.microscaling import element_values, scale_values, unpack
from ...compiler.types import TensorType
from ...compiler.weights import Bounds, within
from ..importers.source_error import SourceError
from .safetensors_files import File, Stored

_CHUNK = 1 << 18  # elements dequantized at once
# Maps a range of rows to those rows of a matrix [N, K], exact in f64.
Rows = Callable[[slice], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Dequantized(ABC):
    """A weight that is stored in a quantized format, read as floats. `name` is for errors."""

    name: str
    file: File
    shape: tuple[int, ...]

    dtype: ClassVar[str] = "f32"  # cast to the requested dtype by read_as

    @property
    def type(self) -> TensorType:
        return TensorType(self.dtype, self.shape)

    def read_as(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight; SourceError for scales that are not finite."""
        out = torch.empty(self.shape, dtype=dtype)
        self._fill(out)
        return out

    def read_into(self, out: torch.Tensor, bounds: Bounds) -> None:
        """Read what is within `bounds` into `out`, of a float dtype."""
        if tuple(out.shape) == self.shape:
            self._fill(out)
        else:
            out.copy_(within(self.read_as(out.dtype), bounds))

    def _fill(self, out: torch.Tensor) -> None:
        width = self.shape[-1]
        step = max(1, _CHUNK // max(1, width))
        for matrix, exact_rows in self.matrices(out):
            for start in range(0, len(matrix), step):
                rows = slice(start, min(start + step, len(matrix)))
                matrix[rows] = rounded(exact_rows(rows), matrix.dtype)

    @abstractmethod
    def matrices(self, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, Rows]]:
        """Each matrix [N, K] of `out` (a view) and the function that computes its rows."""

    def finite(self, scales: torch.Tensor) -> torch.Tensor:
        """`scales` as f64; SourceError unless all are finite."""
        values = scale_values(scales) if scales.dtype == torch.uint8 else scales.double()
        if not bool(values.isfinite().all()):
            raise SourceError(f"{self.name}: {self.file.path.name} holds a NaN or infinite scale")
        return values


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """f64 to `dtype`, rounded once, to nearest and ties to even.

    torch goes from f64 to bf16 and f16 by way of f32, which rounds twice. Here f32 takes the odd
    one of the two neighbours of what it cannot hold (S. Boldo and G. Melquiond, "Emulation of FMA
    and correctly rounded sums", 2008): the second rounding then sees on which side of a tie it was.
    """
    if dtype in (torch.float64, torch.float32):
        return exact.to(dtype)
    near = exact.float()
    wide = near.double()
    bits = near.view(torch.int32)
    infinite = bits & 0x7FFFFFFF == 0x7F800000
    to_odd = (wide != exact) & (bits & 1 == 0) & ~infinite
    away = torch.where(wide.abs() < exact.abs(), 1, -1).to(torch.int32)
    return torch.where(to_odd, bits + away, bits).view(torch.float32).to(dtype)


# ---- FP8 E4M3 with one scale per block of rows and columns: w = weight · scale


@dataclass(frozen=True, eq=False)
class BlockFp8(Dequantized):
    """weight f8e4m3 [..., N, K], scale [..., ⌈N/b⌉, ⌈K/c⌉]: floats, or E8M0 as u8."""

    weight: Stored
    scale: Stored
    block: tuple[int, int]

    def matrices(self, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, Rows]]:
        weights, scales = self.weight.read(), self.finite(self.scale.read())
        flat = (t.view(-1, *t.shape[-2:]) for t in (out, weights, scales))
        for matrix, weight, scale in zip(*flat, strict=True):
            yield matrix, partial(_block_rows, weight, scale, self.block)


def _block_rows(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], rows: slice
) -> torch.Tensor:
    of_rows = scale[torch.arange(rows.start, rows.stop) // block[0]]
    scales = of_rows.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    # By way of f32: twice as fast in torch as from FP8 to f64 at once.
    return weight[rows].float().double() * scales


# ---- NVFP4: E2M1 codes, an FP8 scale per group of 16, an f32 scale per tensor


@dataclass(frozen=True, eq=False)
class Nvfp4(Dequantized):
    """codes u8 [N, K/2], scales f8e4m3 [N, K/16], whole f32 of one element.

    w = code · scale · whole, or / whole if `divide`.
    """

    codes: Stored
    scales: Stored
    whole: Stored
    divide: bool

    def matrices(self, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, Rows]]:
        whole = self.finite(self.whole.read().reshape(()))
        if self.divide and not whole:
            raise SourceError(f"{self.name}: {self.file.path.name} divides by a scale of 0")
        scales = self.finite(self.scales.read())
        yield out, partial(_nvfp4_rows, self.codes.read(), scales, whole, self.divide)


def _nvfp4_rows(
    codes: torch.Tensor, scales: torch.Tensor, whole: torch.Tensor, divide: bool, rows: slice
) -> torch.Tensor:
    scaled = _grouped(element_values(unpack(codes[rows])), scales[rows])
    return scaled / whole if divide else scaled * whole


# ---- INT4 with one scale per group


@dataclass(frozen=True, eq=False)
class Int4(Dequantized):
    """packed i32 [N, K/8], scales [N, K/g]: element k of a word is its bits 4k to 4k+3, minus 8."""

    packed: Stored
    scales: Stored
    stored_shape: Stored

    def matrices(self, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, Rows]]:
        if (declared := self.stored_shape.read().tolist()) != [*self.shape]:
            raise SourceError(
                f"{self.name}: its weight_shape says {declared}, the packed numbers are "
                f"{[*self.shape]}"
            )
        yield out, partial(_int4_rows, self.packed.read(), self.finite(self.scales.read()))


def _int4_rows(packed: torch.Tensor, scales: torch.Tensor, rows: slice) -> torch.Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    numbers = (packed[rows, :, None] >> shifts & 15) - 8
    return _grouped(numbers.flatten(1), scales[rows])


def _grouped(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """values [r, K] · scales [r, K/g], each scale repeated g times."""
    rows, groups = scales.shape
    return (values.double().view(rows, groups, -1) * scales[..., None]).view(rows, -1)
