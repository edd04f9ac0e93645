"""The memory plan: which bytes of the arena each buffer has, and what must wait for what."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Offsets are multiples of this many bytes: what vector loads and TMA descriptors ask for.
ALIGNMENT = 256


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `nbytes` that is written first by launch `start` and read last by `end`."""

    name: str
    nbytes: int
    start: int
    end: int


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Block:
    """Buffers, one at least, that lie side by side in their order as long as any lives."""

    buffers: tuple[Lifetime, ...]

    def places(self, at: int) -> list[tuple[str, int]]:
        """Names and offsets of the buffers, when the block begins at `at`."""
        found: list[tuple[str, int]] = []
        for buffer in self.buffers:
            found.append((buffer.name, at))
            at += aligned(max(buffer.nbytes, 1))
        return found

    def whole(self) -> Lifetime:
        """The block as one buffer, by the name of its first."""
        _, last = self.places(0)[-1]
        return Lifetime(
            self.buffers[0].name,
            last + max(self.buffers[-1].nbytes, 1),
            min(b.start for b in self.buffers),
            max(b.end for b in self.buffers),
        )


def plan_blocks(blocks: Sequence[Block]) -> tuple[dict[str, int], int]:
    """As `plan_arena`, for blocks of buffers: the offset of every buffer by name."""
    starts, size = plan_arena([block.whole() for block in blocks])
    places = (block.places(starts[block.buffers[0].name]) for block in blocks)
    return dict(place for found in places for place in found), size


def plan_arena(buffers: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """Offsets in bytes by name, and the size of the arena.

    Greedy by size (Pisarchyk & Lee 2020, arXiv:2001.03288): the largest buffer first, each at the
    lowest offset where it meets no buffer that lives at the same time.
    """
    order = sorted(buffers, key=lambda b: (-b.nbytes, b.start, b.name))
    # What is placed already, by offset: first byte, byte behind the last, first and last launch.
    placed = np.empty((4, 0), np.int64)
    offsets: dict[str, int] = {}
    for buffer in order:
        size = aligned(max(buffer.nbytes, 1))
        low, _, start, end = placed
        lows, highs, *_ = placed[:, (start <= buffer.end) & (buffer.start <= end)]
        # Before each of those, and behind the last, memory is free from the highest end so far.
        free = np.maximum.accumulate(np.concatenate(([0], highs)))
        fits = lows - free[:-1] >= size
        at = int(free[fits.argmax() if fits.any() else -1])
        offsets[buffer.name] = at
        row = (at, at + size, buffer.start, buffer.end)
        placed = np.insert(placed, int(np.searchsorted(low, at, "right")), row, axis=1)
    return offsets, int(placed[1].max(initial=0))


@dataclass(frozen=True)
class Access:
    """Bytes [low, high) of one memory ("arena", or a buffer with memory of its own)."""

    memory: str
    low: int
    high: int


def dependencies(
    reads: Sequence[Sequence[Access]], writes: Sequence[Sequence[Access]]
) -> tuple[tuple[int, int], ...]:
    """Pairs (earlier, later) of launches that must run in that order, transitively reduced.

    Launch i reads `reads[i]` and then writes `writes[i]`; order matters wherever one of two
    accesses to the same bytes is a write.
    """
    before: list[int] = []  # of each launch, the set of all that come before it, as bits
    pairs: list[tuple[int, int]] = []
    memories: dict[str, _Memory] = {}
    for i, (ins, outs) in enumerate(zip(reads, writes, strict=True)):
        needs: set[int] = set()
        for access in (*ins, *outs):
            memory = memories.setdefault(access.memory, _Memory())
            needs.update(part.writer for part in memory.between(access))
        for access in outs:
            for part in memories[access.memory].between(access):
                needs.update(part.readers)
        needs.discard(_NOBODY)
        everything = 0
        for earlier in sorted(needs, reverse=True):
            if not everything >> earlier & 1:
                pairs.append((earlier, i))
                everything |= before[earlier] | 1 << earlier
        before.append(everything)
        for access in outs:
            memories[access.memory].write(access, i)
        for access in ins:
            memories[access.memory].read(access, i)
    return tuple(pairs)


_NOBODY = -1


@dataclass
class _Part:
    """Bytes up to `high`: the launch that wrote them last, and those that have read them since."""

    high: int
    writer: int
    readers: list[int]


class _Memory:
    """The accesses to one memory so far, as parts in order that do not overlap."""

    def __init__(self) -> None:
        self._lows: list[int] = []
        self._parts: list[_Part] = []

    def between(self, access: Access) -> list[_Part]:
        """The parts within `access`; one that lies within in part is two from now on."""
        return self._parts[self._cut(access)]

    def write(self, access: Access, launch: int) -> None:
        inside = self._cut(access)
        self._lows[inside] = [access.low]
        self._parts[inside] = [_Part(access.high, launch, [])]

    def read(self, access: Access, launch: int) -> None:
        inside = self._cut(access)
        lows, parts, at = list[int](), list[_Part](), access.low
        for low, part in zip(self._lows[inside], self._parts[inside], strict=True):
            if at < low:
                lows.append(at)
                parts.append(_Part(low, _NOBODY, [launch]))
            part.readers.append(launch)
            lows.append(low)
            parts.append(part)
            at = part.high
        if at < access.high:
            lows.append(at)
            parts.append(_Part(access.high, _NOBODY, [launch]))
        self._lows[inside], self._parts[inside] = lows, parts

    def _cut(self, access: Access) -> slice:
        """Where the parts within `access` are, after cutting those that reach beyond it."""
        for at in (access.low, access.high):
            i = bisect_left(self._lows, at)
            if i and self._parts[i - 1].high > at:
                part = self._parts[i - 1]
                self._lows.insert(i, at)
                self._parts.insert(i, _Part(part.high, part.writer, [*part.readers]))
                part.high = at
        return slice(bisect_left(self._lows, access.low), bisect_left(self._lows, access.high))
