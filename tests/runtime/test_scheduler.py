"""The scheduler: lengths and pages after any plan, commit, loss of a batch, removal or loan."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ingot.runtime.serving.batch import Batch, Chunk, Row
from ingot.runtime.serving.kv_cache import KVCache
from ingot.runtime.serving.row_sampling import Choice
from ingot.runtime.serving.scheduler import Scheduler
from ingot.runtime.serving.sequence import Request, Sequence
from ingot.runtime.serving.speculation import Drafter, accept

LONGEST = 20


class RandomDrafter:
    """0 to 8 tokens, numbered on so that no two are the same."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        first = 1000 + sequence.length
        return list(range(first, first + self.random.randint(0, min(most, 8))))


def sequence_of(tokens: Iterable[int], number: int = 0, max_new_tokens: int = 30) -> Sequence:
    return Sequence(number, tuple(tokens), Request(max_new_tokens), seed=0)


def scheduler_of(
    *,
    pages: int = 20,
    slots: int = 3,
    tokens: int = 8,
    rows: int = 8,
    drafter: Drafter | None = None,
) -> Scheduler:
    cache = KVCache(pages=pages, page_size=4, slots=slots, tokens_per_slot=LONGEST)
    return Scheduler(cache, tokens=tokens, rows=rows, drafter=drafter)


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, accepted prefixes and ends, with too few pages."""

    @initialize(
        pages=st.integers(5, 12),
        tokens=st.integers(1, 16),
        rows=st.integers(1, 12),
        drafting=st.booleans(),
    )
    def start(self, pages: int, tokens: int, rows: int, drafting: bool) -> None:
        self.tokens, self.rows = tokens, rows
        self.drafter = RandomDrafter() if drafting else None
        self.scheduler = scheduler_of(pages=pages, tokens=tokens, rows=rows, drafter=self.drafter)
        self.cache = self.scheduler.cache
        self.sequences: list[Sequence] = []
        self.lent: Sequence | None = None

    @property
    def alive(self) -> list[Sequence]:
        return [s for s in self.sequences if s in self.scheduler]

    @rule(length=st.integers(1, LONGEST), most=st.integers(1, 12))
    def submit(self, length: int, most: int) -> None:
        sequence = sequence_of(range(length), len(self.sequences), most)
        self.sequences.append(sequence)
        self.scheduler.submit(sequence)

    @rule()
    def plan_and_lose(self) -> None:
        """A batch that was planned but broken off, as by a KeyboardInterrupt."""
        self.check_batch(self.scheduler.plan())

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        batch = self.scheduler.plan()
        self.check_batch(batch)
        before = {c.sequence: (c.sequence.length, c.sequence.pending) for c in batch.chunks}
        accepted: list[list[int]] = []
        for chunk in batch.chunks:
            rows = [row for row in batch.rows if row.chunk is chunk]
            count = data.draw(st.integers(1, len(rows))) if rows else 0
            drafted = [row.drafted for row in rows[: count - 1]] if rows else []
            accepted.append([*(t for t in drafted if t is not None), *([7] if rows else [])])
        self.scheduler.commit(batch, accepted)
        for chunk, tokens in zip(batch.chunks, accepted, strict=True):
            sequence = chunk.sequence
            length, pending = before[sequence]
            assert sequence.length == length + len(tokens)
            assert sequence.pending == (1 if tokens else pending - len(chunk.tokens))
            assert sequence.slot is not None
            held = len(self.cache.pages_of(sequence.slot))
            kept = sequence.cached_length if tokens else sequence.length
            assert held == self.cache.pages_for(kept), "pages of rejected tokens"
            ended = sequence.generated >= sequence.request.max_new_tokens
            too_long = self.cache.pages_for(sequence.length) > self.cache.pages
            if ended or too_long or sequence.length > LONGEST:
                self.scheduler.remove(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.alive))
        self.scheduler.remove(sequence)
        assert sequence.slot is None
        with pytest.raises(ValueError, match="not in deque"):
            self.scheduler.remove(sequence)

    @precondition(lambda self: not self.lent)
    @rule(length=st.integers(1, LONGEST))
    def borrow_and_release(self, length: int) -> None:
        scored = sequence_of(range(length))
        self.scheduler.borrow(scored)
        assert scored.slot is not None and scored not in self.scheduler
        assert len(self.cache.pages_of(scored.slot)) == self.cache.pages_for(length)
        self.scheduler.release(scored)

    def check_batch(self, batch: Batch) -> None:
        assert batch.tokens <= self.tokens
        assert len(batch.rows) <= self.rows
        assert bool(batch.chunks) == bool(self.alive)
        place = {chunk: i for i, chunk in enumerate(batch.chunks)}
        assert len({c.sequence for c in batch.chunks}) == len(batch.chunks)
        order = [(place[row.chunk], row.offset) for row in batch.rows]
        assert order == sorted(set(order))
        for chunk in batch.chunks:
            sequence = chunk.sequence
            assert sequence in self.scheduler.running and chunk.tokens
            assert chunk.start == sequence.cached_length
            own = chunk.tokens[: sequence.pending]
            drafted = chunk.tokens[sequence.pending :]
            assert list(own) == sequence.history[chunk.start : chunk.start + len(own)]
            assert list(drafted) == [1000 + sequence.length + i for i in range(len(drafted))]
            wanted = [row.offset for row in batch.rows if row.chunk is chunk]
            assert len(wanted) == (len(drafted) + 1 if chunk.end >= sequence.length else 0)
            assert wanted == list(range(len(chunk.tokens)))[len(chunk.tokens) - len(wanted) :]
            assert sequence.generated + len(wanted) <= sequence.request.max_new_tokens
            assert sequence.slot is not None
            held = len(self.cache.pages_of(sequence.slot))
            assert held == self.cache.pages_for(max(chunk.end, sequence.length))
        decoding = [c.sequence.pending == 1 for c in batch.chunks]
        assert decoding == sorted(decoding, reverse=True), "decoding comes first"

    @invariant()
    def no_page_is_lost_or_shared(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        running = self.scheduler.running
        slots = [s.slot for s in running if s.slot is not None]
        assert len(set(slots)) == len(running)
        owned = [page for slot in slots for page in self.cache.pages_of(slot)]
        assert len(set(owned)) == len(owned)
        assert self.cache.free_pages == self.cache.pages - len(owned)
        assert self.cache.free_slots == self.cache.slots - len(slots)
        for s in self.sequences:
            assert s.slot is not None or s.cached_length == 0
        assert self.alive == [*running, *self.scheduler.waiting]

    def teardown(self) -> None:
        """The oldest always advances: everything comes to its end."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            batch = self.scheduler.plan()
            if not batch.chunks:
                break
            self.check_batch(batch)
            given = {row.chunk for row in batch.rows}
            self.scheduler.commit(batch, [[7] if c in given else [] for c in batch.chunks])
            for chunk in batch.chunks:
                s = chunk.sequence
                if s.generated == s.request.max_new_tokens or s.length > LONGEST:
                    self.scheduler.remove(s)
        assert not self.alive
        assert self.cache.free_pages == self.cache.pages
        assert not self.cache.page_table.any()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = hypothesis_settings(
    max_examples=150, stateful_step_count=30, deadline=None
)


class Fixed:
    """Always the same draft."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens
        self.asked: list[int] = []

    def draft(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        self.asked.append(most)
        return self.tokens[:most]


def test_a_batch_with_drafts() -> None:
    """Prefill that does not end has no row; drafts take what is left of tokens and rows."""
    drafter = Fixed(41, 42, 43, 44, 45)
    scheduler = scheduler_of(tokens=8, rows=5, drafter=drafter)
    first, second = sequence_of([1, 2]), sequence_of(range(10, 15))
    scheduler.submit(first)
    scheduler.submit(second)
    batch = scheduler.plan()
    assert [(c.sequence, c.start, c.tokens) for c in batch.chunks] == [
        (first, 0, (1, 2, 41)),
        (second, 0, (10, 11, 12, 13, 14)),
    ]
    assert [(r.sequence, r.offset, r.step, r.drafted) for r in batch.rows] == [
        (first, 1, 0, 41),
        (first, 2, 1, None),
        (second, 4, 0, None),
    ]
    assert batch.rows[1].history == [1, 2, 41]
    assert drafter.asked == [1, 1]
    scheduler.commit(batch, [[41, 5], [6]])
    assert (first.history, first.cached_length) == ([1, 2, 41, 5], 3)
    assert (second.history[-1], second.cached_length) == (6, 5)
    # The second has no row left for drafts: five are taken.
    batch = scheduler.plan()
    assert [c.tokens for c in batch.chunks] == [(5, 41, 42, 43), (6,)]


def test_drafts_end_where_the_sequence_must() -> None:
    drafter = Fixed(*range(40, 60))
    scheduler = scheduler_of(pages=3, tokens=64, rows=64, drafter=drafter)
    few = sequence_of([1], max_new_tokens=3)
    scheduler.submit(few)
    assert scheduler.plan().chunks[0].tokens == (1, 40, 41)
    scheduler.remove(few)
    # Two pages are free for the drafts of the first; the next one has to wait for none of them.
    long = sequence_of([1, 2], max_new_tokens=30)
    scheduler.submit(long)
    assert scheduler.plan().chunks[0].end == 12
    scheduler.submit(sequence_of(range(8)))
    batch = scheduler.plan()
    assert [c.end for c in batch.chunks] == [4, 8]
    assert scheduler.preemptions == 0


def test_preemption_never_comes_of_drafts() -> None:
    scheduler = scheduler_of(pages=2, tokens=64, rows=64, drafter=Fixed(*range(40, 50)))
    one, two = sequence_of([1, 2, 3]), sequence_of([4, 5, 6])
    scheduler.submit(one)
    scheduler.submit(two)
    for _ in range(2):
        batch = scheduler.plan()
        assert [len(c.tokens) for c in batch.chunks] == [4, 4] if one.generated == 0 else [1, 1]
        scheduler.commit(batch, [[8], [9]])
    assert scheduler.preemptions == 0


def choices(*tokens: int) -> Iterable[Choice]:
    for token in tokens:
        assert token >= 0, "asked for behind the first mismatch"
        yield Choice(token, 0.0, ())


@pytest.mark.parametrize(
    ("chosen", "accepted", "end"),
    [
        ((5, 6, 7, 8), [5, 6, 7, 8], None),
        ((5, 6, 9, -1), [5, 6, 9], None),
        ((9, -1, -1, -1), [9], None),
        ((6, -1, -1, -1), [6], None),
        ((5, 99, -1, -1), [5], "stop"),
        ((99, -1, -1, -1), [], "stop"),
    ],
)
def test_the_longest_matching_prefix_and_one_more(
    chosen: tuple[int, ...], accepted: list[int], end: str | None
) -> None:
    sequence = Sequence(0, (1, 2), Request(30, stop_tokens={99}), seed=0)
    chunk = Chunk(sequence, 1, (2, 5, 6, 7))
    rows = [Row(chunk, offset) for offset in range(4)]
    outcome = accept(rows, choices(*chosen), scheduler_of().cache)
    assert [choice.token for choice in outcome.choices] == accepted
    assert (outcome.end, outcome.message) == (end, "")


@pytest.mark.parametrize(
    ("most", "pages", "prompt", "count", "end"),
    [
        (3, 20, 2, 3, "length"),
        (30, 20, LONGEST - 1, 2, "length"),
        (30, 1, 3, 2, "error"),
        (2, 1, 3, 2, "length"),
    ],
)
def test_ends_in_the_middle_of_a_draft(
    most: int, pages: int, prompt: int, count: int, end: str
) -> None:
    sequence = sequence_of(range(prompt), max_new_tokens=most)
    chunk = Chunk(sequence, prompt - 1, (0, 41, 42, 43, 44))
    rows = [Row(chunk, offset) for offset in range(5)]
    outcome = accept(rows, choices(41, 42, 43, 44, 45), scheduler_of(pages=pages).cache)
    assert [choice.token for choice in outcome.choices] == [41, 42, 43][:count]
    assert outcome.end == end
    assert bool(outcome.message) == (end == "error")
