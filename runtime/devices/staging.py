"""Pinned host memory of launches: how an entry's inputs and outputs lie in it, and their copies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..program import Buffer
from .host_arrays import Bytes, memory_view

# Neighbours in the arena are at most its alignment apart; one copy that includes such a gap is
# cheaper than two. The gap holds no live data: of the arena inputs alone outlive a run, and only
# copies of all of them have gaps.
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


def lay_out(buffers: Iterable[Buffer], gap: int = MAX_GAP) -> Layout:
    """A layout of `buffers` of the arena; neighbours there are neighbours in the staging memory.

    A copy includes gaps of at most `gap` bytes. A field starts at a multiple of 16 bytes when its
    offset in the arena is one.
    """
    fields: list[Field] = []
    copies: list[Copy] = []
    end = 0
    for buffer in sorted(buffers, key=lambda b: (b.offset or 0, b.nbytes)):
        offset = buffer.offset
        assert offset is not None, buffer.name
        last = copies[-1] if copies else None
        if last and offset - (last.offset + last.nbytes) <= gap:
            at = last.at + offset - last.offset
            copies[-1] = Copy(last.offset, last.at, offset + buffer.nbytes - last.offset)
        else:
            at = -(-end // MAX_GAP) * MAX_GAP + offset % MAX_GAP
            copies.append(Copy(offset, at, buffer.nbytes))
        fields.append(Field(buffer, at))
        end = max(end, at + buffer.nbytes)
    return Layout(tuple(fields), tuple(c for c in copies if c.nbytes), end)


def most_bytes(buffers: Iterable[Buffer]) -> int:
    """No layout of some of `buffers` takes more."""
    return sum(b.nbytes + 2 * MAX_GAP for b in buffers)


class Staging:
    """Pinned memory of one launch at a time: its inputs, and then its outputs."""

    def __init__(self, address: int, nbytes: int, event: int) -> None:
        self.address, self.event = address, event
        self.bytes: Bytes = memory_view(address, nbytes)
        self.launches = 0
        self.busy = False  # a launch may still use it
        self.recorded = False  # the event comes behind that launch
