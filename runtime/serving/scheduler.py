"""Which sequences run, which of their tokens go into the next step, and what came of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from time import perf_counter

from .adaptive import Adaptive
from .batch import Batch, Chunk, Row
from .kv_cache import CacheFullError, KVCache
from .sequence import Sequence
from .speculation import Drafter


class Scheduler:
    """Continuous batching in order of submission over one `KVCache`.

    Sequences wait first in, first out for a slot and for the pages of their whole history.
    A running sequence always holds the pages of its history; when none is free for its next token,
    the youngest running sequence loses its own and waits again, before all others, to be
    recomputed. Hence every running sequence is older than every waiting one, and the oldest always
    advances. What a drafter proposes takes only tokens, rows and pages that nobody else wants.
    `draft_seconds` counts the time of drafting, by `clock`.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        tokens: int,
        rows: int,
        drafter: Drafter | None = None,
        adaptive: Adaptive | None = None,
        reach: int = 0,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """A step takes at most `tokens` tokens and gives at most `rows` rows.

        `adaptive` chooses what is verified of the drafts; without it all of them are. A step itself
        drafts over `reach` positions behind its own, where there are pages for them.
        """
        self.cache = cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._tokens = tokens
        self._rows = rows
        self.draft_seconds = 0.0
        self._drafter = drafter
        self._adaptive = adaptive
        self._clock = clock
        self._reach = reach
        self._reached: set[Sequence] = set()  # who holds pages for that, to be given back
        # With no more sequences than tokens, decoding leaves a token for whoever is in prefill.
        self._sequences = min(rows, tokens, cache.slots)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self.running or sequence in self.waiting

    def submit(self, sequence: Sequence) -> None:
        """Queue a new sequence; its prompt must fit into an empty cache."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its slot and pages; ValueError when it is not here."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self.release(sequence)

    def plan(self) -> Batch:
        """The next step: one token of every decoding sequence, then prefill, then drafted tokens.

        Admits and preempts as needed; empty only when nothing is left to do. A chunk that reaches
        the end of its history has a row for it and for every drafted token.
        """
        self._reserve()
        self._admit()
        tokens = self._tokens
        counts: dict[Sequence, int] = {}
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            counts[sequence] = min(sequence.pending, tokens)
            tokens -= counts[sequence]
        ending = [sequence for sequence, count in counts.items() if count == sequence.pending]
        drafts = self._drafts(ending, sum(counts.values()), min(tokens, self._rows - len(ending)))
        chunks: list[Chunk] = []
        wanted: list[Row] = []
        for sequence, count in counts.items():
            end = sequence.cached_length + count
            drafted = drafts.get(sequence, [])
            made = (*sequence.history[sequence.cached_length : end], *drafted)
            if not made:
                continue
            chunks.append(Chunk(sequence, sequence.cached_length, made))
            if end == sequence.length:
                wanted += (Row(chunks[-1], i) for i in range(count - 1, len(made)))
        for row in wanted if self._reach else ():
            slot, end = row.sequence.slot, row.chunk.end + self._reach
            assert slot is not None, row.sequence.id
            self.cache.resize(slot, min(end, self.cache.room(slot)))
            self._reached.add(row.sequence)
        return Batch(tuple(chunks), tuple(wanted))

    def ahead(self, batch: Batch) -> Batch | None:
        """The step behind one that is under way, before its results are known.

        None unless it is the same sequences, one token each: all of them decode and none is known
        to end, nobody joins them, and there are pages for their tokens, which it takes. With a
        drafter, too, unless it has something now that is worth a step that the host waits for.
        """
        cache = self.cache
        sequences = [chunk.sequence for chunk in batch.chunks]
        decode = len(sequences) == batch.tokens == len(batch.rows)
        if not decode or sequences != self.running:
            return None
        for row in batch.rows:
            if row.step + 1 >= row.sequence.request.max_new_tokens:
                return None
        ends = [chunk.end + 1 for chunk in batch.chunks]
        more = sum(cache.pages_for(end) - cache.pages_for(end - 1) for end in ends)
        if max(ends) > cache.tokens_per_slot or more > cache.free_pages:
            return None
        if self._admits(cache.free_pages - more):
            return None
        if self._drafter is not None and (
            self._adaptive is None or self._chosen(sequences, len(sequences), self._left(sequences))
        ):
            return None
        for sequence, end in zip(sequences, ends, strict=True):
            assert sequence.slot is not None, sequence.id
            cache.resize(sequence.slot, end)
            self._reached.discard(sequence)
        return batch.next()

    def expects(self, chunk: Chunk) -> bool:
        """Whether the results of `chunk` are the next of its sequence, which is running."""
        sequence = chunk.sequence
        return sequence.slot is not None and chunk.start == sequence.cached_length

    def commit(self, batch: Batch, accepted: Iterable[list[int]]) -> None:
        """Move the sequences of `batch` forward, each by the tokens that its rows gave it.

        All but the last of them were drafted and lie in the cache. Nothing is left of what was
        drafted beyond them: neither its length nor its pages.
        """
        for chunk, tokens in zip(batch.chunks, accepted, strict=True):
            sequence = chunk.sequence
            kept = sequence.length + max(len(tokens) - 1, 0)
            sequence.cached_length = min(chunk.end, kept)
            sequence.history += tokens
            if sequence.slot is not None and (chunk.end > kept or sequence in self._reached):
                self.cache.resize(sequence.slot, kept)
            self._reached.discard(sequence)

    def borrow(self, sequence: Sequence) -> None:
        """Give a sequence that is not queued a slot and pages, preempting the youngest as needed.

        To be given back with `release`. Its history must fit into an empty cache.
        """
        while not self._open(sequence):
            self._preempt_youngest()

    def release(self, sequence: Sequence) -> None:
        """Free the slot and the pages of a sequence, if it has any."""
        if sequence.slot is not None:
            self.cache.close(sequence.slot)
            sequence.slot = None
        self._reached.discard(sequence)
        sequence.cached_length = 0

    def _reserve(self) -> None:
        """Pages for the next token of every running sequence, oldest first."""
        for sequence in tuple(self.running):
            while sequence.slot is not None:
                try:
                    self.cache.resize(sequence.slot, sequence.length)
                    break
                except CacheFullError:
                    self._preempt_youngest()

    def _admit(self) -> None:
        """Slots and pages for those who wait, until there are none for the first of them."""
        while self._admits(self.cache.free_pages):
            self._open(self.waiting[0])
            self.running.append(self.waiting.popleft())

    def _admits(self, pages: int) -> bool:
        """Whether the first of those who wait may run, with so many free pages."""
        room = len(self.running) < self._sequences
        return bool(self.waiting) and room and self._fits(self.waiting[0], pages)

    def _fits(self, sequence: Sequence, pages: int) -> bool:
        return self.cache.free_slots > 0 and self.cache.pages_for(sequence.length) <= pages

    def _open(self, sequence: Sequence) -> bool:
        """A slot with pages for the history of `sequence`, if they are free."""
        cache = self.cache
        if not self._fits(sequence, cache.free_pages):
            return False
        sequence.slot = cache.open()
        cache.resize(sequence.slot, sequence.length)
        return True

    def _left(self, ending: list[Sequence]) -> int:
        """How many drafted tokens a step takes beside one token of each of `ending`."""
        return min(self._tokens, self._rows) - len(ending)

    def _drafts(self, ending: list[Sequence], tokens: int, most: int) -> dict[Sequence, list[int]]:
        """Drafted tokens behind the histories of `ending`, `most` in all, with pages for them."""
        if self._drafter is None:
            return {}
        begin = self._clock()
        drafts: dict[Sequence, list[int]] = {}
        for sequence, drafted in self._chosen(ending, tokens, most).items():
            assert sequence.slot is not None, sequence.id
            room = self.cache.room(sequence.slot) - sequence.length
            drafts[sequence] = drafted[:room]
            self.cache.resize(sequence.slot, sequence.length + len(drafts[sequence]))
        if self._adaptive is not None and any(drafts.values()):
            self._adaptive.planned()
        self.draft_seconds += self._clock() - begin
        return drafts

    def _chosen(self, ending: list[Sequence], tokens: int, most: int) -> dict[Sequence, list[int]]:
        """What is drafted for a step of `tokens` tokens that has a result for each of `ending`;
        `most` tokens in all."""
        drafts = {sequence: self._draft(sequence, most) for sequence in ending}
        if self._adaptive is not None:
            counts = self._adaptive.choose(drafts, tokens, most)
        else:
            counts = {sequence: len(drafted) for sequence, drafted in drafts.items()}
        chosen: dict[Sequence, list[int]] = {}
        for sequence, count in counts.items():
            if count := min(count, most):
                chosen[sequence] = drafts[sequence][:count]
                most -= count
        return chosen

    def _draft(self, sequence: Sequence, most: int) -> list[int]:
        """Up to `most` drafted tokens behind the history of `sequence`, as far as it may go."""
        assert self._drafter is not None and sequence.slot is not None, sequence.id
        room = self.cache.room(sequence.slot) - sequence.length
        # The row behind the last drafted token gives one more.
        most = min(most, room, sequence.request.max_new_tokens - sequence.generated - 1)
        drafted = list(self._drafter.draft(sequence, most)) if most > 0 else []
        if len(drafted) > max(most, 0):
            raise ValueError(f"draft: expected at most {most} tokens, found {len(drafted)}")
        return drafted

    def _preempt_youngest(self) -> None:
        sequence = self.running.pop()
        self.release(sequence)
        self.preemptions += 1
        sequence.stats.preemptions += 1
        self.waiting.appendleft(sequence)
