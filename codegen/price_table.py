"""Measured prices: microseconds of GEMM kernels on a device, by kernel, tokens and bytes.

A table of points stands in `measured/` for each target that was measured; `ingot tune` adds those
of a model to the user's cache, which come first. Between two sizes a price is interpolated, beyond
them it goes on with their slope. A target without points is modelled (`prices`), and said to be.
"""

from __future__ import annotations

import os
from bisect import bisect
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import msgspec

_HERE = Path(__file__).with_name("measured")


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """One launch of `kernel` for `tokens`, which reads a weight of `bytes`, in a chain of them."""

    kernel: str
    tokens: int
    bytes: int
    microseconds: float


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Points of one target, and of which device they are."""

    target: str
    device: str
    points: tuple[Point, ...]

    def seconds(self, kernel: str, tokens: int, nbytes: int) -> float | None:
        """What a launch takes, by the points for the least tokens that are enough; None where there
        are not two of different sizes."""
        mine = [p for p in self.points if p.kernel == kernel and p.tokens >= tokens]
        least = min((p.tokens for p in mine), default=0)
        by_size = {p.bytes: p.microseconds for p in sorted(mine) if p.tokens == least}
        if len(by_size) < 2:
            return None
        sizes = sorted(by_size)
        high = min(max(bisect(sizes, nbytes), 1), len(sizes) - 1)
        a, b = sizes[high - 1], sizes[high]
        slope = max((by_size[b] - by_size[a]) / (b - a), 0.0)
        found = by_size[a] + slope * (nbytes - a)
        return 1e-6 * max(found, min(by_size.values()) * nbytes / sizes[-1])

    def with_points(self, points: Iterable[Point]) -> Table:
        """The table with `points` beside its own, in place of those of the same launches."""
        held = {(p.kernel, p.tokens, p.bytes): p for p in (*self.points, *points)}
        return msgspec.structs.replace(self, points=tuple(sorted(held.values())))
