"""A session that threads share: each gets what it would get alone, in steps that serve all."""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_device import (
    FakeDriver,
    FakeExecutable,
    FakeRun,
    expected_logits,
    expected_tokens,
    serving_program,
)
from ingot.runtime.driver import Array, WeightLoader
from ingot.runtime.program import Program
from ingot.runtime.serving.sampling import Sampling
from ingot.runtime.serving.session import Event, Sequence, Session, SessionEndedError

VOCAB = 50
THREADS = 8
HOT = Sampling(temperature=1.0, top_k=30, top_p=0.95, repetition_penalty=1.2, seed=11)


class Device(FakeExecutable):
    """Lets other threads run in the middle of a step, and refuses two at once.

    `during` is called in every step, on the thread that takes it.
    """

    during: Callable[[], object] = staticmethod(lambda: None)
    busy = False

    def launch(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> FakeRun:
        assert not self.busy, "two steps at once"
        self.busy = True
        try:
            time.sleep(0.0002)
            self.during()
            return super().launch(function, symbols, inputs, outputs)
        finally:
            self.busy = False


class Driver(FakeDriver):
    def load(self, program: Program, weights: WeightLoader) -> Device:
        self.executable = Device(program, self)
        return self.executable


def open_session(
    *, fail_at: int | None = None, drafter: Any = None, **shape: Any
) -> tuple[Session, Device]:
    program, driver = serving_program(**shape), Driver(fail_at=fail_at)
    device = driver.load(program, lambda _: None)
    return Session(program, device, drafter=drafter), device


@pytest.fixture(autouse=True)
def _switching() -> Iterator[None]:
    """Threads switch as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """What `work` gives in so many threads at once; within a minute, or something is stuck."""
    ready = threading.Barrier(count)

    def one(index: int) -> Any:
        ready.wait()
        return work(index)

    pool = ThreadPoolExecutor(count)
    try:
        jobs = [pool.submit(one, i) for i in range(count)]
        return [job.result(timeout=60) for job in jobs]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def asked(index: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Prompts and options of one thread."""
    draw = random.Random(index)
    prompts = [
        [draw.randrange(VOCAB) for _ in range(draw.randint(1, 20))]
        for _ in range(draw.randint(1, 3))
    ]
    sampling = replace(HOT, seed=index) if index % 2 else Sampling(seed=index)
    return prompts, {"max_new_tokens": draw.randint(1, 20), "sampling": sampling}


def check(sequence: Sequence) -> None:
    """Its tokens are those that the bare model gives, as far as they go."""
    sampling = replace(sequence.request.sampling, seed=sequence.seed)
    tokens, logprobs = expected_tokens(sequence.prompt, sequence.generated, sampling, VOCAB)
    assert list(sequence.tokens) == tokens and sequence.logprobs == logprobs
    if sequence.finish_reason == "length":
        assert sequence.generated == sequence.request.max_new_tokens


@pytest.mark.parametrize("shape", [{}, {"pages": 14}, {"max_sequences": 2}], ids=str)
def test_each_thread_gets_what_it_gets_alone(shape: dict[str, Any]) -> None:
    session, device = open_session(**shape)

    def work(index: int) -> list[Sequence]:
        prompts, options = asked(index)
        return [s for _ in range(3) for s in session.generate(prompts, **options)]

    for sequences in in_threads(work):
        for sequence in sequences:
            assert sequence.finish_reason == "length"
            check(sequence)
    assert session.idle and session.stats.sequences == sum(3 * len(asked(i)[0]) for i in range(8))
    assert max(len(set(slots)) for slots in device.slots_seen) > 1, "batched together"


def test_steps_serve_all_threads() -> None:
    """Four threads with one sequence each take as many steps as one with four."""
    session, device = open_session()
    session.generate([[i] for i in range(4)], max_new_tokens=40)
    together = len(device.replays)
    in_threads(lambda i: session.generate([[i]], max_new_tokens=40), 4)
    assert len(device.replays) - together < 2 * together


def test_threads_that_do_all_there_is() -> None:
    """Generate, stream to the end or not, submit and step, cancel, score."""
    session, _ = open_session(pages=20, max_sequences=4)
    stepping = threading.Event()

    def work(index: int) -> list[Sequence]:
        draw, found = random.Random(index), list[Sequence]()
        for turn in range(12):
            prompts, options = asked(100 * index + turn)
            kind = (index + turn) % 4
            if kind == 0:
                found += session.generate(prompts, **options)
            elif kind == 1:
                stream = session.stream(prompts, **options)
                events = [e for _, e in zip(range(draw.randint(0, 8)), stream, strict=False)]
                stream.close()
                found += dict.fromkeys(event.sequence for event in events)
            elif kind == 2:
                sequence = session.submit(prompts[0], **options)
                stepping.wait(0.001)
                session.cancel(sequence)
                found.append(sequence)
            else:
                logits = session.logits(prompts[0])
                np.testing.assert_array_equal(logits, expected_logits(prompts[0], VOCAB))
        return found

    for sequences in in_threads(work):
        for sequence in sequences:
            assert sequence.finish_reason in ("length", "cancelled")
            check(sequence)
    while session._events:
        session.step()
    assert session.idle and not session._queues and not session._given_up
    assert session._cache.free_pages == 20


def test_one_thread_may_step_for_sequences_that_others_submit() -> None:
    session, _ = open_session()
    done = threading.Event()
    events: list[Event] = []

    def work(index: int) -> list[Sequence]:
        if index:
            prompts, options = asked(index)
            return [session.submit(prompt, **options) for prompt in prompts]
        while not (done.is_set() and session.idle):
            events.extend(session.step())
        return []

    with ThreadPoolExecutor(1) as pool:
        stepper = pool.submit(work, 0)
        submitted = [s for found in in_threads(lambda i: work(i + 1)) for s in found]
        done.set()
        stepper.result(timeout=60)
    for sequence in submitted:
        check(sequence)
        mine = [event for event in events if event.sequence is sequence]
        assert tuple(event.token for event in mine) == sequence.tokens
        assert mine[-1].finish_reason == sequence.finish_reason == "length"


def test_streams_hand_each_thread_its_own_events_in_order() -> None:
    session, _ = open_session(max_sequences=3)

    def work(index: int) -> tuple[list[Event], int]:
        prompts, options = asked(index)
        return list(session.stream(prompts, **options)), len(prompts)

    for events, count in in_threads(work):
        sequences = list(dict.fromkeys(event.sequence for event in events))
        assert len(sequences) == count
        for sequence in sequences:
            check(sequence)
            mine = [event for event in events if event.sequence is sequence]
            assert tuple(e.token for e in mine) == sequence.tokens
            assert [e.finish_reason for e in mine] == [None] * (len(mine) - 1) + ["length"]


def test_close_ends_what_others_generate() -> None:
    session, device = open_session()
    closed: list[Any] = []

    def work(index: int) -> list[Sequence]:
        if index:
            return session.generate([[index]] * 2, max_new_tokens=60)
        while len(device.replays) < 5:
            time.sleep(0.001)
        session.close()
        closed.append(len(device.replays))
        return []

    for sequences in in_threads(work):
        for sequence in sequences:
            assert sequence.finish_reason == "cancelled"
            assert sequence.message == "the session ended: closed"
            check(sequence)
    assert closed == [len(device.replays)] and device.closed == 1
    with pytest.raises(SessionEndedError, match="closed"):
        session.generate([[1]], max_new_tokens=1)


def test_a_device_that_fails_ends_the_sequences_of_all() -> None:
    session, _ = open_session(fail_at=12)
    for sequences in in_threads(lambda i: session.generate([[i]], max_new_tokens=60)):
        for sequence in sequences:
            assert sequence.finish_reason == "error"
            assert sequence.message == "the session ended: DeviceFailedError: it is gone"
            check(sequence)


def test_an_interrupted_thread_leaves_the_others_alone() -> None:
    """The step that it took for all is taken again by another."""
    session, device = open_session()
    interrupted: list[int] = []

    def interrupt() -> None:
        if len(device.replays) == 6 and not interrupted:
            interrupted.append(threading.get_ident())
            raise KeyboardInterrupt

    device.during = interrupt

    def work(index: int) -> list[Sequence]:
        try:
            return session.generate([[index]], max_new_tokens=30)
        except KeyboardInterrupt:
            assert interrupted == [threading.get_ident()]
            return []

    found = [s for sequences in in_threads(work) for s in sequences]
    assert len(found) == THREADS - 1
    for sequence in found:
        assert sequence.finish_reason == "length"
        check(sequence)
    assert session.idle and not session._queues


def test_what_one_thread_asks_wrongly_harms_nobody() -> None:
    session, _ = open_session()

    def work(index: int) -> list[Sequence]:
        if index % 2:
            with pytest.raises(ValueError, match="expected token ids from 0 to 49, found 50"):
                session.generate([[1], [50]], max_new_tokens=1)
            return []
        return session.generate([[index]], max_new_tokens=20)

    for sequences in in_threads(work):
        for sequence in sequences:
            assert sequence.finish_reason == "length"
            check(sequence)


# ---- streams that are given up where nothing may be waited for


def begun(session: Session) -> Iterator[Event]:
    stream = session.stream([[7]], max_new_tokens=60)
    next(stream)
    return stream


def test_a_stream_is_given_up_by_another_thread_while_steps_go_on() -> None:
    session, _ = open_session()
    streams = [begun(session) for _ in range(THREADS - 1)]

    def work(index: int) -> list[Sequence]:
        if index == 0:
            return session.generate([[1, 2]], max_new_tokens=50)
        streams[index - 1].close()  # pyright: ignore[reportAttributeAccessIssue] a generator
        return []

    (sequence,) = in_threads(work)[0]
    assert sequence.finish_reason == "length"
    check(sequence)
    assert session.idle and not session._queues and session._cache.free_pages == 128


def test_a_stream_is_dropped_in_the_middle_of_a_step() -> None:
    """By the garbage collector, on the thread that takes the step."""
    session, device = open_session()
    stream = [begun(session)]
    stream.append(stream)  # type: ignore[arg-type] a cycle, for the collector alone
    dropped: list[int] = []

    def collect() -> None:
        if not dropped:
            dropped.append(gc.collect())

    del stream
    device.during = collect
    (sequence,) = session.generate([[1, 2]], max_new_tokens=9)
    assert dropped and session.idle and not session._queues
    check(sequence)


def test_a_stream_is_dropped_while_a_step_is_planned() -> None:
    """The lock is held then, by the thread on which the collector runs."""
    held: list[Any] = []

    class Drafter:
        def draft(self, sequence: Sequence, most: int) -> list[int]:
            del sequence, most
            held.clear()
            return []

    session, _ = open_session(drafter=Drafter())
    held.append(begun(session))
    (sequence,) = session.generate([[1, 2]], max_new_tokens=9)
    assert not held and session.idle and not session._queues
    check(sequence)


def test_a_call_in_the_middle_of_a_call_is_refused() -> None:
    """Of a signal handler, say; it would wait for itself."""
    session, device = open_session()
    said: list[str] = []

    def call() -> None:
        for again in (session.close, session.step, lambda: session.logits([1])):
            with pytest.raises(RuntimeError, match="in the middle of one of its calls") as raised:
                again()
            said.append(str(raised.value))

    device.during = call
    (sequence,) = session.generate([[1, 2]], max_new_tokens=2)
    check(sequence)
    assert len(said) == 6


def test_a_stream_is_of_one_thread_at_a_time() -> None:
    session, device = open_session()
    stream = session.stream([[1]], max_new_tokens=30)
    inside, go = threading.Event(), threading.Event()

    def pause() -> None:
        inside.set()
        go.wait(60)

    device.during = pause
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, stream)
        assert inside.wait(60)
        with pytest.raises(ValueError, match="generator already executing"):
            next(stream)
        go.set()
        events = [first.result(timeout=60), *stream]
    check(events[0].sequence)
    assert len(events) == 30
