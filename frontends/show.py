"""Numbers for people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def show_numbers(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: `2`, `2 to 5`, `2, 4 … 10`, `1, 5, 6`."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 2 and steps == {1}:
        return f"{numbers[0]} to {numbers[-1]}"
    if len(numbers) > 3 and len(steps) == 1:
        return f"{numbers[0]}, {numbers[1]} … {numbers[-1]}"
    return ", ".join(map(str, numbers))


def show_bytes(nbytes: int) -> str:
    """Bytes in the unit that gives one to four digits."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
