"""Serving a program: continuous batching of many sequences over its static entries."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate, count
from operator import index
from time import perf_counter
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..driver import Array, Driver, WeightLoader
from ..program import Program
from .abi import Chunk, ServingAbi, replay_inputs, serving_outputs
from .kv_cache import KVCache
from .row_sampling import Choice, DeviceSampling, choose, chosen
from .sampling import GREEDY, Sampling
from .scheduler import Scheduler
from .sequence import Event, FinishReason, Sequence, SequenceStats, SessionStats

Stats = TypeVar("Stats", SequenceStats, SessionStats)


class SessionEndedError(Exception):
    """The session was closed or its device failed; it serves nothing any more."""


class Session:
    """Serves one loaded program to many sequences; for one thread at a time.

    `step` runs one replay: a token of every decoding sequence and chunks of prompts as far as the
    largest bucket goes, in the smallest bucket that takes them. What is batched together never
    changes which logits a sequence asks for nor the draws it makes from them. Where the program
    chooses tokens itself, logits come to the host only for what it cannot give.

    A sequence ends with "stop" (a stop token came; it is not part of the tokens), "length"
    (`max_new_tokens` reached, or its next token has no position below `max_tokens_per_sequence`),
    "cancelled", or "error" (`message` says why). An exception out of the device ends the session:
    every sequence ends with "error" and later calls raise SessionEndedError. A KeyboardInterrupt
    does not: the step that it broke off is taken again.
    """

    def __init__(
        self,
        program: Program,
        driver: Driver,
        weights: WeightLoader,
        *,
        pages: int | None = None,
        draw_seed: Callable[[], int] | None = None,
    ) -> None:
        """Load `program`. `pages` uses fewer of the program's KV pages than there are.

        `draw_seed` gives a number in [0, 2^64) for sampling that fixes none, by default from the
        operating system; processes that serve the same sequences together must draw the same.

        ValueError when the program is no serving program or `pages` is out of range.
        """
        self._abi = ServingAbi(program)
        self.meta = self._abi.meta
        pages = self.meta.pages if pages is None else pages
        if not 1 <= pages <= self.meta.pages:
            raise ValueError(f"pages: expected 1 to {self.meta.pages}, found {pages}")
        self._cache = KVCache(
            pages=pages,
            page_size=self.meta.page_size,
            slots=self.meta.max_sequences,
            tokens_per_slot=self.meta.max_tokens_per_sequence,
        )
        self._scheduler = Scheduler(self._cache, tokens=self._abi.tokens, sequences=self._abi.rows)
        candidates = self._abi.candidates
        self._device = (
            None if candidates is None else DeviceSampling(self.meta.vocab_size, candidates)
        )
        self._draw_seed = draw_seed or partial(secrets.randbits, 64)
        self._ids = count(1)
        self._events: list[Event] = []
        self._stats = SessionStats()
        self._first_tokens = 0
        self._ended = ""
        self._closed = False
        self._executable = driver.load(program, weights)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def stats(self) -> SessionStats:
        """The figures so far."""
        return replace(self._stats, preemptions=self._scheduler.preemptions)

    @property
    def idle(self) -> bool:
        """No sequence waits or runs, and every event was handed out."""
        return not (self._scheduler.waiting or self._scheduler.running or self._events)

    def submit(
        self,
        tokens: Iterable[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Iterable[int] = (),
        top_logprobs: int = 0,
    ) -> Sequence:
        """Queue a prompt; `top_logprobs` most likely tokens are reported with each token.

        ValueError for an empty prompt, ids outside the vocabulary, a prompt that the cache could
        never hold, `max_new_tokens` < 1 or `top_logprobs` outside [0, vocab_size]: nothing is
        queued then.
        """
        self._check_open()
        sequence = self._sequence(tokens, max_new_tokens, sampling, stop_tokens, top_logprobs)
        self._enqueue(sequence)
        return sequence

    def step(self) -> list[Event]:
        """Run one replay, if there is anything to do, and hand out all events since the last call.

        After the end of the session: first the events that are left, then SessionEndedError.
        """
        if not (self._ended and self._events):
            self._advance()
        events, self._events = self._events, []
        return events

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence with "cancelled" and free its slot and pages at once.

        Its last event comes with the next step. Nothing happens when it has ended already;
        ValueError when it belongs to another session.
        """
        if sequence.finish_reason is not None:
            return
        if sequence not in self._scheduler.running and sequence not in self._scheduler.waiting:
            raise ValueError(f"sequence {sequence.id} belongs to another session")
        self._scheduler.remove(sequence)
        self._finish(sequence, "cancelled")

    def stream(
        self,
        prompts: Iterable[Iterable[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Iterable[int] = (),
        top_logprobs: int = 0,
    ) -> Iterator[Event]:
        """Submit `prompts` and step until all have ended; yields their events as they come.

        Arguments are checked at once (ValueError as `submit`; then none is queued), the work
        starts with the first `next`. Closing the iterator cancels what is left. Sequences of other
        callers go on meanwhile; their events wait for their own `stream` or for `step`.
        """
        return self.events(
            self.requests(
                prompts,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop_tokens=stop_tokens,
                top_logprobs=top_logprobs,
            )
        )

    def generate(
        self,
        prompts: Iterable[Iterable[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Iterable[int] = (),
        top_logprobs: int = 0,
    ) -> list[Sequence]:
        """As `stream`, run to the end: the finished sequences in the order of their prompts."""
        sequences = self.requests(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=stop_tokens,
            top_logprobs=top_logprobs,
        )
        for _ in self.events(sequences):
            pass
        return sequences

    def requests(
        self,
        prompts: Iterable[Iterable[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Iterable[int] = (),
        top_logprobs: int = 0,
    ) -> list[Sequence]:
        """One checked sequence a prompt, for `events` to queue. ValueError as `submit`."""
        self._check_open()
        stops = frozenset(stop_tokens)
        return [self._sequence(p, max_new_tokens, sampling, stops, top_logprobs) for p in prompts]

    def logits(self, tokens: Iterable[int]) -> NDArray[np.float32]:
        """The logits f32[T, vocab] of one sequence at every position.

        Runs at once, in replays that return all their rows; when no slot or too few pages are
        free, the youngest running sequences are preempted. ValueError as `submit`.
        """
        self._check_open()
        ids = self._check_tokens(tokens)
        slot = self._scheduler.borrow(len(ids))
        try:
            parts: list[NDArray[np.float32]] = []
            most = min(self._abi.tokens, self._abi.rows)
            for start in range(0, len(ids), most):
                chunk = Chunk(slot, start, ids[start : start + most])
                rows = list(range(len(chunk.tokens)))
                parts.append(self._replay([chunk], rows, [None] * len(rows), ["logits"])["logits"])
            return np.concatenate(parts)
        finally:
            self._cache.close(slot)

    def close(self) -> None:
        """Free the device; unfinished sequences end with "cancelled". Twice is once."""
        if self._closed:
            return
        self._closed = True
        self._end("closed", "cancelled")
        self._executable.close()

    def events(self, sequences: list[Sequence]) -> Generator[Event]:
        unfinished = set(sequences)
        try:
            self._check_open()
            for sequence in sequences:
                self._enqueue(sequence)
            while unfinished:
                mine = [event for event in self._events if event.sequence in unfinished]
                if not mine:
                    if all(sequence.finish_reason for sequence in unfinished):
                        return  # `step` handed out the rest
                    self._advance()
                    continue
                self._events = [event for event in self._events if event.sequence not in unfinished]
                for event in mine:
                    if event.finish_reason is not None:
                        unfinished.remove(event.sequence)
                    yield event
        finally:
            for sequence in unfinished:
                if sequence in self._scheduler.running or sequence in self._scheduler.waiting:
                    self.cancel(sequence)
            self._events = [event for event in self._events if event.sequence not in unfinished]

    def _advance(self) -> None:
        """One replay; what came of it is appended to `_events`."""
        self._check_open()
        started = perf_counter()
        step = self._scheduler.plan()
        for sequence, message in step.failures:
            self._finish(sequence, "error", message)
        if not step.chunks:
            return
        ends = accumulate(len(chunk.tokens) for _, chunk in step.chunks)
        rows = [end - 1 for end in ends]
        # A prompt that is not at its end yet has no next token.
        takers = [s if chunk.end == len(s.history) else None for s, chunk in step.chunks]
        device = self._device
        on_device = {s for s in takers if s and device and device.takes(s)}
        outputs = device.outputs(on_device) if device else []
        if any(s and s not in on_device for s in takers) or not outputs:
            outputs.append("logits")
        try:
            found = self._replay([chunk for _, chunk in step.chunks], rows, takers, outputs)
        except SessionEndedError:
            return

        decoding = {s for s, _ in step.chunks if s.pending == 1 and s.generated}
        for row, (sequence, chunk) in enumerate(step.chunks):
            sequence.cached = chunk.end
            if sequence in on_device:
                self._take(sequence, partial(chosen, sequence, found, row))
            elif not sequence.pending:
                self._take(sequence, partial(choose, sequence, found["logits"][row]))
        self._count_step([s for s, _ in step.chunks], decoding, perf_counter() - started)

    def _take(self, sequence: Sequence, choice: Callable[[], Choice]) -> None:
        """Give `sequence` its next token; ends it where due."""
        if not sequence.generated:
            prompt_tokens = self._stats.prompt_tokens + len(sequence.prompt)
            self._stats = replace(self._stats, prompt_tokens=prompt_tokens)
        try:
            made = choice()
        except ValueError as error:
            self._scheduler.remove(sequence)
            self._finish(sequence, "error", str(error))
            return
        token, logprob, top = made.token, made.logprob, made.top
        if token in sequence.stop_tokens:
            self._scheduler.remove(sequence)
            self._finish(sequence, "stop")
            return

        sequence.history.append(token)
        sequence.logprobs.append(logprob)
        sequence.top_logprobs.append(top)
        self._count_token(sequence)
        if (
            sequence.generated == sequence.max_new_tokens
            or len(sequence.history) > self.meta.max_tokens_per_sequence
        ):
            self._scheduler.remove(sequence)
            sequence.finish_reason = "length"
        self._events.append(Event(sequence, token, logprob, top, sequence.finish_reason))

    def _count_step(
        self, sequences: list[Sequence], decoding: set[Sequence], seconds: float
    ) -> None:
        for sequence in sequences:
            sequence.stats = _with_step(sequence.stats, sequence in decoding, seconds)
        self._stats = _with_step(self._stats, len(decoding) == len(sequences), seconds)

    def _count_token(self, sequence: Sequence) -> None:
        stats = replace(sequence.stats, generated_tokens=sequence.generated)
        total = replace(self._stats, generated_tokens=self._stats.generated_tokens + 1)
        if sequence.generated == 1:
            first = perf_counter() - sequence.submitted
            stats = replace(stats, time_to_first_token=first)
            summed = (total.time_to_first_token or 0.0) * self._first_tokens + first
            self._first_tokens += 1
            total = replace(total, time_to_first_token=summed / self._first_tokens)
        sequence.stats, self._stats = stats, total

    def _replay(
        self,
        chunks: list[Chunk],
        rows: list[int],
        takers: list[Sequence | None],
        outputs: list[str],
    ) -> dict[str, Array]:
        """Run `chunks` in the smallest entry; `outputs` by name, a row for each token of `rows`.

        A row's next token is that of its sequence in `takers`, where the device chooses it. Any
        failure of the device ends the session and is raised as SessionEndedError.
        """
        entry = self._abi.smallest(sum(len(chunk.tokens) for chunk in chunks), len(rows))
        inputs: dict[str, Array] = {
            **replay_inputs(entry, chunks, rows, self._cache.page_table),
            **(self._device.inputs(entry.symbols["L"], takers) if self._device else {}),
        }
        expected = serving_outputs(entry, self.meta)
        # A device may fail in any way, and after none is the state of the cache known.
        try:
            found = self._executable.run(entry.name, inputs, outputs)
            for name in outputs:
                dtype, shape = expected[name]
                array = found[name]
                if array.shape != shape or array.dtype != dtype:
                    raise ValueError(
                        f"entry {entry.name}: expected {name} {dtype}{list(shape)}, "
                        f"found {array.dtype}{list(array.shape)}"
                    )
        except Exception as error:
            self._end(f"{type(error).__name__}: {error}", "error")
            raise SessionEndedError(f"the session ended: {self._ended}") from error
        return {name: found[name][: len(rows)] for name in outputs}

    def _sequence(
        self,
        tokens: Iterable[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_tokens: Iterable[int],
        top_logprobs: int,
    ) -> Sequence:
        prompt = self._check_tokens(tokens)
        if index(max_new_tokens) < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
        if not 0 <= top_logprobs <= self.meta.vocab_size:
            raise ValueError(
                f"top_logprobs: expected 0 to {self.meta.vocab_size}, found {top_logprobs}"
            )
        return Sequence(
            id=next(self._ids),
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=self._draw_seed() if sampling.seed is None else sampling.seed,
            stop_tokens=frozenset(stop_tokens),
            top_count=top_logprobs,
            stats=SequenceStats(prompt_tokens=len(prompt)),
            history=list(prompt),
        )

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.submitted = perf_counter()
        self._stats = replace(self._stats, sequences=self._stats.sequences + 1)
        self._scheduler.submit(sequence)

    def _check_tokens(self, tokens: Iterable[int]) -> tuple[int, ...]:
        ids = tuple(index(token) for token in tokens)
        if not ids:
            raise ValueError("prompt: expected at least 1 token, found none")
        for place, token in enumerate(ids):
            if not 0 <= token < self.meta.vocab_size:
                raise ValueError(
                    f"prompt: expected token ids from 0 to {self.meta.vocab_size - 1}, "
                    f"found {token} at position {place}"
                )
        if len(ids) > self.meta.max_tokens_per_sequence:
            raise ValueError(
                f"prompt: expected at most max_tokens_per_sequence = "
                f"{self.meta.max_tokens_per_sequence} tokens, found {len(ids)}"
            )
        if self._cache.pages_for(len(ids)) > self._cache.pages:
            raise ValueError(
                f"prompt: expected at most {self._cache.pages} pages of {self.meta.page_size} "
                f"tokens, found {len(ids)} tokens"
            )
        return ids

    def _check_open(self) -> None:
        if self._ended:
            raise SessionEndedError(f"the session ended: {self._ended}")

    def _end(self, why: str, reason: FinishReason) -> None:
        if self._ended:
            return
        self._ended = why
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            self._scheduler.remove(sequence)
            self._finish(sequence, reason, f"the session ended: {why}")

    def _finish(self, sequence: Sequence, reason: FinishReason, message: str = "") -> None:
        """Record the end of a sequence that the scheduler has let go already."""
        sequence.finish_reason = reason
        sequence.message = message
        self._events.append(Event(sequence, finish_reason=reason, message=message))


def _with_step(stats: Stats, decode: bool, seconds: float) -> Stats:
    """`stats` after one more step that counts as decode or as prefill."""
    if decode:
        return replace(stats, steps=stats.steps + 1, decode_seconds=stats.decode_seconds + seconds)
    return replace(stats, steps=stats.steps + 1, prefill_seconds=stats.prefill_seconds + seconds)


__all__ = ["Event", "Sequence", "SequenceStats", "Session", "SessionEndedError", "SessionStats"]
