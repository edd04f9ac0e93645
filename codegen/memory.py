"""The memory plan: which bytes of the arena each buffer has, and what must wait for what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    placed: list[tuple[int, int, Lifetime]] = []
    offsets: dict[str, int] = {}
    for buffer in sorted(buffers, key=lambda b: (-b.nbytes, b.start, b.name)):
        size, at = aligned(max(buffer.nbytes, 1)), 0
        for low, high, other in placed:
            lives_beside = other.start <= buffer.end and buffer.start <= other.end
            if lives_beside and low < at + size and at < high:
                at = high
        offsets[buffer.name] = at
        placed.append((at, at + size, buffer))
        placed.sort(key=lambda p: p[0])
    return offsets, max((high for _, high, _ in placed), default=0)


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
    written: dict[str, list[tuple[int, int, int]]] = {}
    readers: dict[str, list[tuple[int, int, int]]] = {}
    for i, (ins, outs) in enumerate(zip(reads, writes, strict=True)):
        needs: set[int] = set()
        for access in (*ins, *outs):
            needs |= _touching(written, access)
        for access in outs:
            needs |= _touching(readers, access)
        needs.discard(i)
        everything = 0
        for earlier in sorted(needs, reverse=True):
            if not everything >> earlier & 1:
                pairs.append((earlier, i))
                everything |= before[earlier] | 1 << earlier
        before.append(everything)
        for access in outs:
            _forget(written, access)
            _forget(readers, access)
            written.setdefault(access.memory, []).append((access.low, access.high, i))
        for access in ins:
            readers.setdefault(access.memory, []).append((access.low, access.high, i))
    return tuple(pairs)


def _touching(seen: dict[str, list[tuple[int, int, int]]], access: Access) -> set[int]:
    rows = seen.get(access.memory, ())
    return {i for low, high, i in rows if low < access.high and access.low < high}


def _forget(seen: dict[str, list[tuple[int, int, int]]], access: Access) -> None:
    """Drop what `access` overwrites; rows that it covers in part keep their remains."""
    kept: list[tuple[int, int, int]] = []
    for low, high, i in seen.get(access.memory, ()):
        if high <= access.low or access.high <= low:
            kept.append((low, high, i))
            continue
        if low < access.low:
            kept.append((low, access.low, i))
        if access.high < high:
            kept.append((access.high, high, i))
    seen[access.memory] = kept
