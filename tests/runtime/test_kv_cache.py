"""The page allocator: exclusive ownership, nothing lost, clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ingot.runtime.serving.kv_cache import CacheFullError, KVCache


class KVCacheMachine(RuleBasedStateMachine):
    """Random opens, growths, shrinkings and closes against a model that only knows token counts."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(pages=7, page_size=4, slots=3, tokens_per_slot=18)
        self.tokens: dict[int, int] = {}
        self.pages: dict[int, tuple[int, ...]] = {}

    def needed(self) -> int:
        return sum(-(-count // 4) for count in self.tokens.values())

    @rule()
    def open(self) -> None:
        if len(self.tokens) == 3:
            with pytest.raises(CacheFullError, match="all 3 slots are taken"):
                self.cache.open()
            return
        slot = self.cache.open()
        assert slot not in self.tokens
        assert 0 <= slot < 3
        self.tokens[slot] = 0
        self.pages[slot] = ()

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), tokens=st.integers(0, 18))
    def resize(self, data: st.DataObject, tokens: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.tokens)))
        before = dict(self.tokens)
        room = self.cache.room(slot)
        self.tokens[slot] = tokens
        if self.needed() > 7:
            assert tokens > room
            self.tokens = before
            with pytest.raises(CacheFullError, match="of 7 are free"):
                self.cache.resize(slot, tokens)
            return
        assert tokens <= room
        self.cache.resize(slot, tokens)
        held = self.cache.pages_of(slot)
        both = min(len(held), len(self.pages[slot]))
        assert held[:both] == self.pages[slot][:both]
        self.pages[slot] = held

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.tokens)))
        self.cache.close(slot)
        del self.tokens[slot], self.pages[slot]
        with pytest.raises(ValueError, match=f"expected an open slot.*found {slot}"):
            self.cache.close(slot)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        owned = [page for slot in self.tokens for page in self.cache.pages_of(slot)]
        assert len(owned) == len(set(owned)) == self.needed()
        assert set(owned) <= set(range(7))
        assert self.cache.free_pages == 7 - len(owned)
        assert self.cache.free_slots == 3 - len(self.tokens)

    @invariant()
    def the_table_shows_what_is_held(self) -> None:
        expected = np.zeros((3, 5), np.int32)
        for slot, pages in self.pages.items():
            expected[slot, : len(pages)] = pages
        np.testing.assert_array_equal(self.cache.page_table, expected)
        assert self.cache.page_table.dtype == np.int32


TestKVCache = KVCacheMachine.TestCase


def test_freed_pages_serve_again() -> None:
    cache = KVCache(pages=5, page_size=64, slots=2, tokens_per_slot=320)
    for _ in range(20):
        slot = cache.open()
        cache.resize(slot, 320)
        assert sorted(cache.pages_of(slot)) == [0, 1, 2, 3, 4]
        cache.close(slot)
    assert cache.free_pages == 5


def test_a_refused_growth_takes_nothing() -> None:
    cache = KVCache(pages=4, page_size=64, slots=2, tokens_per_slot=320)
    first, second = cache.open(), cache.open()
    cache.resize(first, 129)
    with pytest.raises(CacheFullError, match=r"65 tokens need 2 more pages.*1 of 4 are free"):
        cache.resize(second, 65)
    cache.resize(second, 64)
    assert len(cache.pages_of(second)) == 1


def test_growth_beyond_the_slot_is_refused() -> None:
    cache = KVCache(pages=4, page_size=64, slots=1, tokens_per_slot=100)
    slot = cache.open()
    with pytest.raises(ValueError, match="expected at most 100 tokens, found 101"):
        cache.resize(slot, 101)
