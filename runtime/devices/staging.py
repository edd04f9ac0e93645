"""How the inputs and outputs of an entry lie in pinned host memory, and the copies they take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..program import Buffer

# Neighbours in the arena are apart by its alignment at most; one copy that takes such a gap along
# is cheaper than two. Nothing lives in the gap: a plan holds no data from one run to the next.
MAX_GAP = 256


@dataclass(frozen=True)
class Field:
    """One input or output at byte `at` of the staging memory."""

    buffer: Buffer
    at: int


@dataclass(frozen=True)
class Copy:
    """`nbytes` between byte `offset` of the arena and byte `at` of the staging memory."""

    offset: int
    at: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Where each buffer lies, and as few copies as that takes; `nbytes` of staging in all."""

    fields: tuple[Field, ...]
    copies: tuple[Copy, ...]
    nbytes: int


def lay_out(buffers: Iterable[Buffer]) -> Layout:
    """A layout of `buffers`, which lie in the arena: what is near there is near in staging.

    Each field starts at a multiple of 16 bytes when its place in the arena does.
    """
    fields: list[Field] = []
    copies: list[Copy] = []
    end = 0
    for buffer in sorted(buffers, key=lambda b: (b.offset or 0, b.nbytes)):
        offset = buffer.offset
        assert offset is not None, buffer.name
        last = copies[-1] if copies else None
        if last and offset - (last.offset + last.nbytes) <= MAX_GAP:
            at = last.at + offset - last.offset
            copies[-1] = Copy(last.offset, last.at, offset + buffer.nbytes - last.offset)
        else:
            at = -(-end // MAX_GAP) * MAX_GAP + offset % MAX_GAP
            copies.append(Copy(offset, at, buffer.nbytes))
        fields.append(Field(buffer, at))
        end = max(end, at + buffer.nbytes)
    return Layout(tuple(fields), tuple(c for c in copies if c.nbytes), end)
