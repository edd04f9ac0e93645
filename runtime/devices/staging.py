"""The layout of an entry's inputs and outputs in pinned host memory, and its copies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..program import Buffer

# Neighbours in the arena are at most its alignment apart; one copy that includes such a gap is
# cheaper than two. The gap holds no live data: nothing in the arena outlives a run.
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
    """The place of each buffer, the copies, and the total size `nbytes` of the staging memory."""

    fields: tuple[Field, ...]
    copies: tuple[Copy, ...]
    nbytes: int


def lay_out(buffers: Iterable[Buffer]) -> Layout:
    """A layout of `buffers` of the arena; neighbours there are neighbours in the staging memory.

    A field starts at a multiple of 16 bytes when its offset in the arena is one.
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
