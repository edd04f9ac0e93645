"""Who owns which page of the paged KV cache: slots, pages and the host's page table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class CacheFullError(Exception):
    """No slot or not enough pages are free now; the request took nothing."""


class KVCache:
    """Page allocator for `slots` sequences over `pages` physical pages of `page_size` tokens.

    A slot is one row of `page_table` i32[slots, pages_per_slot]: entry (slot, i) is the physical
    page that holds positions [i·page_size, (i+1)·page_size). Entries without a page are 0.
    Only ownership is kept here; the keys and values live on the device. `changes` counts how often
    the table has changed.
    """

    def __init__(self, *, pages: int, page_size: int, slots: int, tokens_per_slot: int) -> None:
        """All counts are at least 1; `tokens_per_slot` bounds one sequence."""
        self.changes = 0
        self.pages = pages
        self.page_size = page_size
        self.slots = slots
        self.tokens_per_slot = tokens_per_slot
        self.page_table: NDArray[np.int32] = np.zeros(
            (slots, self.pages_for(tokens_per_slot)), np.int32
        )
        self._free_pages = list(reversed(range(pages)))
        self._free_slots = list(reversed(range(slots)))
        self._held: dict[int, int] = {}

    @property
    def free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` positions of one sequence."""
        return -(-tokens // self.page_size)

    def pages_of(self, slot: int) -> tuple[int, ...]:
        """The physical pages of an open slot, in the order of the positions they hold."""
        return tuple(self.page_table[slot, : self._pages_held(slot)].tolist())

    def held(self, slot: int) -> int:
        """How many positions from 0 on an open slot may use, by the pages that it holds."""
        return min(self._pages_held(slot) * self.page_size, self.tokens_per_slot)

    def open(self) -> int:
        """Take a slot that holds no page yet; CacheFullError when all are taken."""
        if not self._free_slots:
            raise CacheFullError(f"all {self.slots} slots are taken")
        slot = self._free_slots.pop()
        self._held[slot] = 0
        return slot

    def room(self, slot: int) -> int:
        """The most tokens that `resize` could make room for now; ValueError as there."""
        pages = self._pages_held(slot) + self.free_pages
        return min(pages * self.page_size, self.tokens_per_slot)

    def resize(self, slot: int, tokens: int) -> None:
        """Hold the pages of positions 0 … tokens-1 of `slot`: take missing ones, free the rest.

        CacheFullError when too few pages are free: then none was taken. ValueError when the slot
        is not open or `tokens` exceeds `tokens_per_slot`.
        """
        held = self._pages_held(slot)
        if tokens > self.tokens_per_slot:
            raise ValueError(
                f"slot {slot}: expected at most {self.tokens_per_slot} tokens, found {tokens}"
            )
        needed = self.pages_for(tokens)
        if needed - held > self.free_pages:
            raise CacheFullError(
                f"slot {slot}: {tokens} tokens need {needed - held} more pages of "
                f"{self.page_size} tokens, {self.free_pages} of {self.pages} are free"
            )
        self.changes += needed != held
        row = self.page_table[slot]
        for place in range(held, needed):
            row[place] = self._free_pages.pop()
        self._free_pages.extend(reversed(row[needed:held].tolist()))
        row[needed:held] = 0
        self._held[slot] = needed

    def close(self, slot: int) -> None:
        """Give back the slot and its pages; ValueError when it is not open."""
        self.resize(slot, 0)
        del self._held[slot]
        self._free_slots.append(slot)

    def _pages_held(self, slot: int) -> int:
        if slot not in self._held:
            raise ValueError(f"expected an open slot, one of {sorted(self._held)}, found {slot}")
        return self._held[slot]
