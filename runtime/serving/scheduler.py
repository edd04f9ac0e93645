"""Which sequences run, and which of their tokens go into the next step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from .abi import Chunk
from .kv_cache import CacheFullError, KVCache
from .sequence import Sequence


@dataclass(frozen=True)
class Step:
    """The chunks of one replay with their sequences, and the sequences that cannot go on."""

    chunks: tuple[tuple[Sequence, Chunk], ...]
    failures: tuple[tuple[Sequence, str], ...]


class Scheduler:
    """Continuous batching in order of submission over one `KVCache`.

    Sequences wait first in, first out for a slot and for the pages of their whole history.
    A running sequence always holds the pages of its history; when none is free for its next token,
    the youngest running sequence loses its own and waits again, before all others, to be
    recomputed; one that the whole cache could not hold fails instead. Hence every running sequence
    is older than every waiting one, and the oldest always advances.
    """

    def __init__(self, cache: KVCache, *, tokens: int, sequences: int) -> None:
        """A step takes at most `tokens` tokens of at most `sequences` sequences."""
        self.cache = cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._tokens = tokens
        # With no more sequences than tokens, decoding leaves a token for whoever is in prefill.
        self._sequences = min(sequences, tokens, cache.slots)

    def submit(self, sequence: Sequence) -> None:
        """Queue a new sequence; its prompt must fit into an empty cache."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its slot and pages; ValueError when it is not here."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._release(sequence)

    def plan(self) -> Step:
        """The next step: one token of every decoding sequence, then prefill as far as it fits.

        Admits and preempts as needed. Sequences in `failures` were removed already; `chunks` is
        empty only when nothing is left to do.
        """
        self._reserve()
        failures = self._admit()
        budget = self._tokens
        chunks: list[tuple[Sequence, Chunk]] = []
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            if sequence.slot is None or not budget:
                continue
            count = min(sequence.pending, budget)
            tokens = sequence.history[sequence.cached : sequence.cached + count]
            chunks.append((sequence, Chunk(sequence.slot, sequence.cached, tokens)))
            budget -= count
        return Step(tuple(chunks), tuple(failures))

    def borrow(self, tokens: int) -> int:
        """A slot of its own with room for `tokens`, preempting the youngest as far as needed.

        To be given back with `cache.close`. CacheFullError when an empty cache has no such room.
        """
        while True:
            if self.cache.free_slots and self.cache.free_pages >= self.cache.pages_for(tokens):
                slot = self.cache.open()
                self.cache.grow(slot, tokens)
                return slot
            if not self.running:
                raise CacheFullError(
                    f"{tokens} tokens need {self.cache.pages_for(tokens)} pages, "
                    f"the cache has {self.cache.pages}"
                )
            self._preempt_youngest()

    def _reserve(self) -> None:
        """Pages for the next token of every running sequence, oldest first."""
        for sequence in tuple(self.running):
            while sequence.slot is not None:
                try:
                    self.cache.grow(sequence.slot, len(sequence.history))
                    break
                except CacheFullError:
                    self._preempt_youngest()

    def _admit(self) -> list[tuple[Sequence, str]]:
        """Slots and pages for those who wait, until there are none for the first of them.

        Returns those whom the whole cache could not hold: they ran alone until their pages ran out.
        """
        failures: list[tuple[Sequence, str]] = []
        while self.waiting and len(self.running) < self._sequences:
            sequence = self.waiting[0]
            pages = self.cache.pages_for(len(sequence.history))
            if pages > self.cache.pages:
                self.remove(sequence)
                failures.append((sequence, self._too_long(sequence)))
                continue
            if pages > self.cache.free_pages:
                break
            sequence.slot = self.cache.open()
            self.cache.grow(sequence.slot, len(sequence.history))
            self.running.append(self.waiting.popleft())
        return failures

    def _preempt_youngest(self) -> None:
        sequence = self.running.pop()
        self._release(sequence)
        sequence.cached = 0
        self.preemptions += 1
        sequence.stats = replace(sequence.stats, preemptions=sequence.stats.preemptions + 1)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.cache.close(sequence.slot)
            sequence.slot = None

    def _too_long(self, sequence: Sequence) -> str:
        return (
            f"out of pages: {len(sequence.history)} tokens need "
            f"{self.cache.pages_for(len(sequence.history))} pages of {self.cache.page_size} "
            f"tokens, the cache has {self.cache.pages} in all"
        )


__all__ = ["Scheduler", "Step"]
