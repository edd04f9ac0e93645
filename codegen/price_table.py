"""Measured prices: microseconds of GEMM kernels on a device, by kernel, tokens and shape.

A table of points stands in `measured/` for each target that was measured; `ingot tune` adds those
of a model to the user's cache, which come first. A shape that was not measured is read at the rate
of those that are nearest to it. A kernel without points is modelled (`prices`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from functools import cache
from math import hypot, log2
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, structs

_HERE = Path(__file__).with_name("measured")
# No launch takes less: the gap between two. Of two that would the faster one stays so.
_LEAST_MICROSECONDS = 1.0


_Size = Annotated[int, Meta(ge=1)]


class Launched(NamedTuple):
    """What the price of a GEMM launch depends on: its kernel, tokens, and the weight's shape.

    The kernel's name says in what the weight is held, and what else the kernel does.
    """

    kernel: str
    tokens: int
    rows: int
    columns: int


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """A launch, timed in a chain of its kind over weights that were not in the cache."""

    kernel: str
    tokens: _Size
    rows: _Size
    columns: _Size
    microseconds: Annotated[float, Meta(gt=0)]

    @property
    def of(self) -> Launched:
        return Launched(self.kernel, self.tokens, self.rows, self.columns)


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Points of one target, and of which device they are."""

    target: str
    device: str
    points: tuple[Point, ...] = ()

    def seconds(self, of: Launched) -> float | None:
        """What a launch takes, by the points of its kernel for the least tokens that are enough.

        None where there are none. Elements a second are the mean over all shapes, in logarithms,
        weighted by 1 / d^2, d the distance in the plane of log rows and log columns.
        """
        mine = [p for p in self.points if p.kernel == of.kernel and p.tokens >= of.tokens]
        least = min((p.tokens for p in mine), default=0)
        weights = total = 0.0
        for p in (p for p in mine if p.tokens == least):
            squared = log2(p.rows / of.rows) ** 2 + log2(p.columns / of.columns) ** 2
            if not squared:
                return 1e-6 * p.microseconds
            weights += 1 / squared
            total += log2(p.rows * p.columns / p.microseconds) / squared
        if not weights:
            return None
        return 1e-6 * hypot(of.rows * of.columns / 2 ** (total / weights), _LEAST_MICROSECONDS)

    def with_points(self, points: Iterable[Point]) -> Table:
        """The table with `points` beside its own, in place of those of the same launches."""
        held = {p.of: p for p in (*self.points, *points)}
        return structs.replace(self, points=tuple(sorted(held.values())))


@cache
def table_of(target: str) -> Table:
    """All points for a target: those of this version, then those of the user's cache.

    ValueError names a file of the cache that holds no table.
    """
    found = Table(target, "")
    for path in (_HERE / _file_of(target), user_table(target)):
        if path.is_file():
            held = _read(path)
            found = structs.replace(found.with_points(held.points), device=held.device)
    return found


def user_table(target: str) -> Path:
    """Where the user's own points are kept: below XDG_CACHE_HOME, by default ~/.cache."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "ingot" / "prices" / _file_of(target)


def add_points(target: str, device: str, points: Iterable[Point]) -> Path:
    """Add to the user's table, which is replaced as a whole; gives its path. Points of another
    device of the target are dropped."""
    path = user_table(target)
    held = _read(path) if path.is_file() else Table(target, device)
    table = (held if held.device == device else Table(target, device)).with_points(points)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(msgspec.json.format(msgspec.json.encode(table), indent=1))
    Path(file.name).replace(path)
    table_of.cache_clear()
    return path


def known_points(target: str, device: str) -> set[Launched]:
    """What was measured on `device`, of this version's points and the user's."""
    paths = [p for p in (_HERE / _file_of(target), user_table(target)) if p.is_file()]
    tables = [table for table in map(_read, paths) if table.device == device]
    return {point.of for table in tables for point in table.points}


def _file_of(target: str) -> str:
    return f"{target.replace(':', '-')}.json"


def _read(path: Path) -> Table:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Table)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: expected a table of prices: {error}; delete it") from error
