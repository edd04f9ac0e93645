"""Prompt lookup: the tokens that followed when a sequence last read as it reads now.

Saxena, "Prompt Lookup Decoding" (2023). Nothing but the sequence's own history is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from .sequence import Sequence

# How many places that end alike are compared, the latest first, and over how many tokens.
_PLACES, _LONGEST = 64, 32


@dataclass
class _Index:
    """Where the runs of `size` tokens of one history end: the last place of each, and for each
    place the one before that ends alike (-1: none)."""

    size: int
    _last: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])
    _before: list[int] = field(default_factory=list[int])

    def longest_match(self, history: list[int]) -> int | None:
        """The place before the last one of `history` that ends as it does; None: there is none.

        `history` is that of the last call, with more tokens.
        """
        known, size = len(self._before), self.size
        last, before = self._last, self._before
        for place in range(known, len(history)):
            run = tuple(history[max(place + 1 - size, 0) : place + 1])
            before.append(last.get(run, -1))
            last[run] = place
        end = len(history) - 1
        place = before[end]
        if place < 0 or end + 1 < size:
            return None
        best, longest = place, 0
        for _ in range(_PLACES):
            if history[place - longest] == history[end - longest] or not longest:
                length = _common(history, place, end)
                if length > longest:
                    best, longest = place, length
                if longest == _LONGEST:
                    break
            place = before[place]
            if place < 0:
                break
        return best


@dataclass
class NGramDrafter:
    """Drafts up to `k` tokens a step by the longest match with what came before.

    The last `min_match` tokens must have occurred earlier. Of the latest _PLACES such places that
    one counts where most tokens before agree too (up to _LONGEST), of equals the latest; what
    followed there is drafted. A match that runs into the end goes on as it began: a period repeats.
    """

    k: int
    min_match: int
    _indices: WeakKeyDictionary[Sequence, _Index] = field(
        default_factory=WeakKeyDictionary[Sequence, _Index]
    )

    def __str__(self) -> str:
        return f"ngram:{self.k}:{self.min_match}"

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        """See Drafter."""
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = _Index(self.min_match)
        history = sequence.history
        place = index.longest_match(history)
        if place is None:
            return []
        period = len(history) - 1 - place
        count = min(most, self.k)
        return [history[place + 1 + i % period] for i in range(count)]


def _common(history: list[int], place: int, end: int) -> int:
    """How many tokens up to `place` are those up to `end`, _LONGEST at most."""
    most = min(_LONGEST, place + 1)
    for length in range(most):
        if history[place - length] != history[end - length]:
            return length
    return most
