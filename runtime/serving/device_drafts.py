"""Drafts that the steps of a program make themselves, by a layer or a model within them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from .batch import Chunk, Row
from .kv_cache import KVCache
from .sequence import Sequence


@dataclass
class DeviceDrafter:
    """Proposes what the last step drafted behind the last token of a sequence, up to `k` tokens.

    `name` says what drafts.
    """

    k: int = 1
    name: str = "mtp"
    _drafts: WeakKeyDictionary[Sequence, tuple[int, list[int]]] = field(
        default_factory=WeakKeyDictionary[Sequence, tuple[int, list[int]]]
    )

    def __str__(self) -> str:
        return f"{self.name}:{self.k}"

    def note(self, sequence: Sequence, drafted: Iterable[int]) -> None:
        """A step gave `sequence` the last of its tokens, and drafted these behind it."""
        self._drafts[sequence] = sequence.length, list(drafted)

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        """See Drafter."""
        length, drafted = self._drafts.get(sequence, (0, []))
        return drafted[: min(most, self.k)] if length == sequence.length else []


def following(chunks: Iterable[Chunk], tokens: int) -> NDArray[np.int32]:
    """The input `following` i32[tokens]: for each token of `chunks` the one that its sequence has
    behind it, -1 where the step samples that."""
    made = np.full(tokens, -1, np.int32)
    at = 0
    for chunk in chunks:
        behind = chunk.sequence.history[chunk.start + 1 : chunk.end + 1]
        made[at : at + len(behind)] = behind
        at += len(chunk.tokens)
    return made


def room(rows: Iterable[Row], count: int, cache: KVCache) -> NDArray[np.int32]:
    """The input `room` i32[count]: for each of `rows` how many positions behind its own its slot
    has pages for, 0 for padding."""
    made = np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        slot, chunk = row.sequence.slot, row.chunk
        if slot is not None:
            made[i] = max(cache.held(slot) - (chunk.start + row.offset + 1), 0)
    return made
