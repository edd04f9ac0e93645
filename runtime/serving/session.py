"""Serving a program: continuous batching of many sequences over its static entries."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, groupby
from time import perf_counter
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from ..driver import Array, DeviceFailedError, Executable
from ..program import Program
from .abi import ServingAbi
from .adaptive import Adaptive, StepTimes
from .batch import Batch, Chunk, Row
from .device_drafts import DeviceDrafter
from .draft_figures import DraftFigures
from .kv_cache import KVCache
from .row_sampling import RowSampler
from .scheduler import Scheduler
from .sequence import (
    Event,
    FinishReason,
    Request,
    RequestKeywords,
    Sequence,
    SessionStats,
)
from .speculation import Drafter, Outcome, accept
from .steps import Step, Steps
from .turns import Turns


class SessionEndedError(Exception):
    """The session was closed or its device failed; it serves nothing any more."""


class StepFailedError(Exception):
    """A step failed on a device that is sound: what asked for it gets nothing, others go on."""


class Session:
    """Serves one loaded program to many sequences, of one thread or of several.

    `step` waits for one replay: a token of every decoding sequence and chunks of prompts as far as
    the largest bucket goes, in the smallest bucket that takes them. What is batched together never
    changes which logits a sequence asks for nor the draws it makes from them. Where the program
    samples by itself, logits come to the host only for what it cannot give, and decoding steps are
    launched ahead (see `steps`): a sequence gets what it gets without, token for token.

    A sequence ends with "stop" (a stop token came; it is not part of the tokens), "length"
    (`max_new_tokens` reached, or its next token has no position below `max_tokens_per_sequence`),
    "cancelled", or "error" (`message` says why). Where a step fails, its sequences take it one by
    one, and those end with "error" whose own step fails. A failure of the device ends the session:
    every sequence ends with "error" and later calls raise SessionEndedError. A KeyboardInterrupt
    does neither: the step that it broke off is taken again.

    Any thread may call anything. Sequences of all threads go into the same steps: of those that
    wait for events one takes the step, for all, and `submit` does not wait for it. `cancel`,
    `logits` and `close` wait for the step at hand. An iterator of `stream` is for one thread at a
    time, as any generator (ValueError).
    """

    def __init__(
        self,
        program: Program,
        executable: Executable,
        *,
        pages: int | None = None,
        drafter: Drafter | None = None,
        adapt: bool = False,
        ahead: bool = True,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """`executable` is `program`, loaded; it is closed with the session.

        `pages` uses fewer of the program's KV pages than there are. What `drafter` proposes is
        verified in the rows that a step has left, and changes nothing but how many tokens a step
        gives. All of it is, and no step is launched before the one before has ended; with `adapt`
        only what is expected to pay (see `adaptive`), and steps are launched ahead while nothing
        is. Without `ahead` none ever are. `clock` gives seconds.

        ValueError when the program is no serving program, `pages` is out of range, or the program
        does not draft what a DeviceDrafter is to propose.
        """
        self._abi = ServingAbi(program)
        self.meta = self._abi.meta
        pages = self.meta.pages if pages is None else pages
        if not 1 <= pages <= self.meta.pages:
            raise ValueError(f"pages: expected 1 to {self.meta.pages}, found {pages}")
        if isinstance(drafter, DeviceDrafter) and drafter.k > self._abi.drafts:
            raise ValueError(
                f"drafter: expected a program that drafts {drafter.k} tokens behind each, found "
                f"one that drafts {self._abi.drafts}"
            )
        self._device_drafter = drafter if isinstance(drafter, DeviceDrafter) else None
        self._cache = KVCache(
            pages=pages,
            page_size=self.meta.page_size,
            slots=self.meta.max_sequences,
            tokens_per_slot=self.meta.max_tokens_per_sequence,
        )
        self.drafter = drafter
        times = StepTimes()
        self._figures = None if drafter is None else DraftFigures(times, self._entry)
        self.adaptive = Adaptive(times, self._entry) if adapt and drafter else None
        self._scheduler = Scheduler(
            self._cache,
            tokens=self._abi.tokens,
            rows=self._abi.rows,
            drafter=drafter,
            adaptive=self.adaptive,
            reach=self._abi.reach if self._device_drafter else 0,
            clock=clock,
        )
        self._sampler = RowSampler(self.meta.vocab_size, self._abi.candidates)
        self._turns = Turns(self._cancel_given_up)
        self._ids = count(1)
        self._events: list[Event] = []  # for `step`; those of a stream go to its queue
        self._queues: dict[Sequence, deque[Event]] = {}
        self._given_up: deque[Sequence] = deque()  # of streams that were closed
        self._stats = SessionStats()
        self._first_tokens = 0
        self._ended = ""
        self._closed = False
        self._executable = executable
        self._steps = Steps(self._abi, executable, self._cache, self._sampler, clock)
        self._ahead = ahead
        self._clock = clock
        self._taken = 0.0  # when the last step had ended

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> SessionStats:
        """The figures so far."""
        with self._turns.held():
            stats = self._stats
            lists = {"drafted": [*stats.drafted], "accepted": [*stats.accepted]}
            return replace(stats, preemptions=self._scheduler.preemptions, **lists)

    @property
    def idle(self) -> bool:
        """No sequence waits or runs, and `step` has no event to hand out."""
        with self._turns.held():
            return not (self._scheduler.waiting or self._scheduler.running or self._events)

    def submit(self, tokens: Iterable[int], **request: Unpack[RequestKeywords]) -> Sequence:
        """Queue a prompt; the keywords are the fields of `Request`.

        ValueError for an empty prompt, ids outside the vocabulary, a prompt that the cache could
        never hold, `max_new_tokens` < 1 or `top_logprobs` outside [0, vocab_size]: nothing is
        queued then.
        """
        (sequence,) = self.requests([tokens], Request(**request))
        with self._turns.held():
            self._enqueue([sequence])
        return sequence

    def step(self) -> list[Event]:
        """Run one replay, if there is anything to do, and hand out all events since the last call.

        Those of `submit`: a stream hands out its own. After the end of the session: first the
        events that are left, then SessionEndedError.
        """
        with self._turns.working():
            if not (self._ended and self._events):
                self._advance()
            events, self._events = self._events, []
            return events

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence with "cancelled" and free its slot and pages at once.

        Tokens that came of a step but were not handed out yet are taken back. Its last event comes
        with the next step. Nothing happens when that was handed out already; ValueError when the
        sequence belongs to another session.
        """
        with self._turns.working():
            self._cancel(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        queue = self._queues.get(sequence, self._events)
        unseen = [event for event in queue if event.sequence is sequence]
        if sequence in self._scheduler:
            self._scheduler.remove(sequence)
        elif sequence.finish_reason is None:
            raise ValueError(f"sequence {sequence.id} belongs to another session")
        elif not unseen:
            return
        for event in unseen:
            queue.remove(event)
        if dropped := sum(event.token is not None for event in unseen):
            for reported in (sequence.history, sequence.logprobs, sequence.top_logprobs):
                del reported[-dropped:]
            sequence.stats.generated_tokens -= dropped
            self._stats.generated_tokens -= dropped
        self._finish(sequence, "cancelled")

    def stream(
        self, prompts: Iterable[Iterable[int]], **request: Unpack[RequestKeywords]
    ) -> Iterator[Event]:
        """Submit `prompts` and step until all have ended; yields their events as they come.

        Arguments are checked at once (ValueError as `submit`; then none is queued), the work
        starts with the first `next`. Closing the iterator cancels what is left, at once or after
        the step that another thread takes. Sequences of other callers go on meanwhile; their events
        wait for their own `stream` or for `step`.
        """
        return self.events(self.requests(prompts, Request(**request)))

    def generate(
        self, prompts: Iterable[Iterable[int]], **request: Unpack[RequestKeywords]
    ) -> list[Sequence]:
        """As `stream`, run to the end: the finished sequences in the order of their prompts."""
        sequences = self.requests(prompts, Request(**request))
        for _ in self.events(sequences):
            pass
        return sequences

    def requests(self, prompts: Iterable[Iterable[int]], request: Request) -> list[Sequence]:
        """One checked sequence a prompt, for `events` to queue. ValueError as `submit`."""
        with self._turns.held():
            self._check_open()
        if not 0 <= request.top_logprobs <= self.meta.vocab_size:
            raise ValueError(
                f"top_logprobs: expected 0 to {self.meta.vocab_size}, found {request.top_logprobs}"
            )
        checked = [self._abi.checked_prompt(tokens, self._cache.pages) for tokens in prompts]
        fixed = request.sampling.seed
        return [
            Sequence(
                next(self._ids), tokens, request, secrets.randbits(64) if fixed is None else fixed
            )
            for tokens in checked
        ]

    def events(self, sequences: list[Sequence]) -> Generator[Event]:
        """Queue `sequences` of `requests` and step until all have ended; see `stream`."""
        unfinished = set(sequences)
        queue: deque[Event] = deque()
        try:
            with self._turns.held():
                self._enqueue(sequences, queue)
            while unfinished:
                event = self._next(queue)
                if event.finish_reason is not None:
                    unfinished.remove(event.sequence)
                yield event
        finally:
            # A finalizer may close this in the middle of any call: nothing is waited for.
            self._given_up.extend(sequences)
            self._turns.try_between()

    def _next(self, queue: deque[Event]) -> Event:
        """The first event of `queue`, after the steps that it takes, of this thread or others."""
        with self._turns.held():
            while not queue:
                with self._turns.turn() as mine:
                    if mine:
                        self._advance()
            return queue.popleft()

    def _cancel_given_up(self) -> None:
        """Cancel what is left of streams that were closed, and forget their events."""
        while self._given_up:
            sequence = self._given_up.popleft()
            if sequence in self._queues:
                self._cancel(sequence)
                del self._queues[sequence]

    def logits(self, tokens: Iterable[int]) -> NDArray[np.float32]:
        """The logits f32[T, vocab] of one sequence at every position.

        Runs at once, in replays that return all their rows; when no slot or too few pages are
        free, the youngest running sequences are preempted. ValueError as `submit`; StepFailedError.
        """
        with self._turns.working():
            return self._logits(tokens)

    def _logits(self, tokens: Iterable[int]) -> NDArray[np.float32]:
        self._check_open()
        prompt = self._abi.checked_prompt(tokens, self._cache.pages)
        scored = Sequence(0, prompt, Request(max_new_tokens=1), seed=0)
        while self._steps.under_way:
            self._take()
        self._check_open()
        self._scheduler.borrow(scored)
        most = min(self._abi.tokens, self._abi.rows)
        try:
            parts: list[NDArray[np.float32]] = []
            for start in range(0, scored.length, most):
                chunk = Chunk(scored, start, scored.prompt[start : start + most])
                rows = tuple(Row(chunk, offset) for offset in range(len(chunk.tokens)))
                self._launch(Batch((chunk,), rows), ["logits"])
                parts.append(self._wait()[1]["logits"])
            return np.concatenate(parts)
        finally:
            self._scheduler.release(scored)

    def close(self) -> None:
        """Free the device; unfinished sequences end with "cancelled". Twice is once."""
        with self._turns.working():
            if self._closed:
                return
            self._closed = True
            self._end("closed", "cancelled")
            self._executable.close()

    def _advance(self) -> None:
        """Take the next step, if there is anything to do; launch it and others as needed."""
        self._check_open()
        under_way = self._steps.under_way
        while under_way and not any(map(self._scheduler.expects, under_way[0].batch.chunks)):
            under_way.popleft()  # nobody is there any more for what it gives
        if not under_way:
            batch = self._scheduler.plan()
            if not batch.chunks:
                return
            self._begin(batch)
        self._run_ahead()
        self._take()
        self._run_ahead()

    def _begin(self, batch: Batch) -> None:
        """Launch one batch; where that fails, what came of it is put into queues."""
        try:
            drafts = ["draft"] if self._device_drafter and batch.rows else []
            self._launch(batch, [*self._sampler.outputs(batch.rows), *drafts])
        except SessionEndedError:
            return
        except StepFailedError as error:
            self._take_apart(batch, str(error))

    def _run_ahead(self) -> None:
        """Launch the steps that are sure to come behind those under way."""
        try:
            while self._ahead and (last := self._steps.room) is not None:
                if (batch := self._scheduler.ahead(last)) is None:
                    return
                with self._errors(), self._turns.aside():
                    self._steps.feed(batch)
        except (SessionEndedError, StepFailedError):
            return  # a failed step is planned, and fails, again when its turn comes

    def _take(self) -> None:
        """Wait for the first step under way and commit it; what came of it is put into queues."""
        if not self._steps.under_way:
            return
        step = self._steps.under_way[0]
        try:
            step, found = self._wait()
        except SessionEndedError:
            return
        except StepFailedError as error:
            self._steps.drop()
            if not step.fed:  # else it is planned again, its tokens known
                self._take_apart(step.batch, str(error))
            return
        by_chunk = {
            chunk: list(rows)
            for chunk, rows in groupby(enumerate(step.batch.rows), lambda row: row[1].chunk)
        }
        chunks = tuple(filter(self._scheduler.expects, step.batch.chunks))
        sequences = [chunk.sequence for chunk in chunks]
        decoding = [s.pending == 1 and s.generated > 0 for s in sequences]
        outcomes = [self._accept(by_chunk.get(chunk, []), found) for chunk in chunks]
        batch = replace(step.batch, chunks=chunks)
        self._scheduler.commit(batch, [[c.token for c in o.choices] for o in outcomes])
        if self._device_drafter and "draft" in found:
            for chunk, outcome in zip(chunks, outcomes, strict=True):
                if outcome.choices:
                    at, _ = by_chunk[chunk][len(outcome.choices) - 1]
                    self._device_drafter.note(chunk.sequence, found["draft"][at].tolist())
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            if chunk in by_chunk:
                self._report(chunk.sequence, outcome)
        ended = self._clock()
        seconds, self._taken = ended - max(step.launched, self._taken), ended
        for sequence, decode in zip(sequences, decoding, strict=True):
            sequence.stats.count_step(decode, seconds)
        self._stats.count_step(all(decoding), seconds)
        if self._figures is not None:
            given = [
                (chunk, max(len(by_chunk.get(chunk, ())) - 1, 0), [c.token for c in o.choices])
                for chunk, o in zip(chunks, outcomes, strict=True)
            ]
            drafting = self._scheduler.draft_seconds
            self._figures.count(self._stats, step, seconds, drafting, given, decoding)

    def _entry(self, tokens: int, rows: int) -> int:
        """The tokens of the entry that takes so many tokens and rows."""
        return self._abi.smallest(tokens, rows)["T"]

    def _take_apart(self, batch: Batch, why: str) -> None:
        """Take a step that failed sequence by sequence: none ends for what another asked."""
        chunks = [chunk for chunk in batch.chunks if self._scheduler.expects(chunk)]
        if len(batch.chunks) == 1:
            for chunk in chunks:
                self._scheduler.remove(chunk.sequence)
                self._finish(chunk.sequence, "error", why)
            return
        for part in batch.parts():
            if part.chunks[0] in chunks and not self._ended:
                self._begin(part)
                self._take()

    def _accept(self, rows: list[tuple[int, Row]], found: Mapping[str, Array]) -> Outcome:
        choices = (self._sampler.choose(row, found, at) for at, row in rows)
        return accept((row for _, row in rows), choices, self._cache)

    def _report(self, sequence: Sequence, outcome: Outcome) -> None:
        """Hand out what a step gave to a sequence."""
        choices = outcome.choices
        stats, total = sequence.stats, self._stats
        if sequence.generated == len(choices):
            total.prompt_tokens += len(sequence.prompt)
            if choices:
                stats.time_to_first_token = self._clock() - sequence.submitted
                self._first_tokens += 1
                mean = total.time_to_first_token or 0.0
                mean += (stats.time_to_first_token - mean) / self._first_tokens
                total.time_to_first_token = mean
        stats.generated_tokens += len(choices)
        total.generated_tokens += len(choices)
        events = self._queues.get(sequence, self._events)
        for choice in choices:
            sequence.logprobs.append(choice.logprob)
            sequence.top_logprobs.append(choice.top)
            events.append(Event(sequence, choice.token, choice.logprob, choice.top))
        if outcome.end is None:
            return
        self._scheduler.remove(sequence)
        if outcome.end == "length":
            sequence.finish_reason = outcome.end
            events[-1] = replace(events[-1], finish_reason=outcome.end)
        else:
            self._finish(sequence, outcome.end, outcome.message)

    def _launch(self, batch: Batch, outputs: list[str]) -> None:
        """Launch `batch`; errors as `_errors`."""
        with self._errors(), self._turns.aside():
            self._steps.launch(batch, outputs)

    def _wait(self) -> tuple[Step, dict[str, Array]]:
        """The first step under way and its outputs; errors as `_errors`."""
        with self._errors(), self._turns.aside():
            return self._steps.wait()

    @contextmanager
    def _errors(self) -> Generator[None]:
        """A failure of the device ends the session and is raised as SessionEndedError, any other as
        StepFailedError. That leaves the state sound: it was written, if at all, where the next try
        writes before it reads.
        """
        try:
            yield
        except DeviceFailedError as error:
            self._end(_told(error), "error")
            raise SessionEndedError(f"the session ended: {self._ended}") from error
        except Exception as error:
            raise StepFailedError(f"the step failed: {_told(error)}") from error

    def _enqueue(self, sequences: list[Sequence], queue: deque[Event] | None = None) -> None:
        """Submit to the scheduler; the events go to `queue`, or are for `step`."""
        self._check_open()
        for sequence in sequences:
            sequence.submitted = self._clock()
            self._stats.sequences += 1
            if queue is not None:
                self._queues[sequence] = queue
            self._scheduler.submit(sequence)

    def _check_open(self) -> None:
        if self._ended:
            raise SessionEndedError(f"the session ended: {self._ended}")

    def _end(self, why: str, reason: FinishReason) -> None:
        if self._ended:
            return
        self._ended = why
        self._steps.drop()
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            self._scheduler.remove(sequence)
            self._finish(sequence, reason, f"the session ended: {why}")

    def _finish(self, sequence: Sequence, reason: FinishReason, message: str = "") -> None:
        """Record the end of a sequence that the scheduler has let go already."""
        sequence.finish_reason = reason
        sequence.message = message
        events = self._queues.get(sequence, self._events)
        events.append(Event(sequence, finish_reason=reason, message=message))


def _told(error: Exception) -> str:
    """An error in one line."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first:.500}"
