"""Batches of tokens over paged caches, as attention kernels meet them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Tokens of slots (-1 is padding) at positions, and pages in any order."""

    slots: torch.Tensor
    positions: torch.Tensor
    page_table: torch.Tensor
    page_size: int

    @property
    def index(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As ops take it: i32 slots [T], positions [T], page table [slots, pages]."""
        return self.slots, self.positions, self.page_table

    @property
    def context(self) -> int:
        return self.page_table.shape[1] * self.page_size

    def cache(self, *row: int, dtype: torch.dtype) -> torch.Tensor:
        """A cache [pages, page_size, *row]: NaN where no token's slot has come to yet."""
        pages = int(self.page_table.max()) + 3
        cache = torch.full((pages * self.page_size, *row), torch.nan)
        for slot in self.slots.unique().tolist():
            if slot < 0:
                continue
            seen = torch.arange(int(self.positions[self.slots == slot].max()) + 1)
            page = self.page_table[slot][seen // self.page_size]
            cache[page * self.page_size + seen % self.page_size] = torch.randn(len(seen), *row)
        return cache.view(pages, self.page_size, *row).to(dtype)

    def beside_nothing(self, token: int) -> Batch:
        """The same batch with all tokens but one made padding."""
        slots = torch.full_like(self.slots, -1)
        slots[token] = self.slots[token]
        return Batch(slots, self.positions, self.page_table, self.page_size)


def batch(
    places: Sequence[tuple[int, int]], page_size: int, pages: int, slots: int | None = None
) -> Batch:
    """Tokens at `places` (slot, position), `pages` pages a slot, shuffled."""
    count = slots or max(slot for slot, _ in places) + 1
    table = torch.randperm(count * pages + 2)[: count * pages].view(count, pages)
    index = torch.tensor(places, dtype=torch.int32)
    return Batch(index[:, 0].contiguous(), index[:, 1].contiguous(), table.int(), page_size)


def chunks(*runs: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Places of runs of tokens: (slot, first position, tokens)."""
    return [(slot, start + i) for slot, start, count in runs for i in range(count)]
