"""Sessions: whatever is batched, cut, queued, preempted or cancelled, the tokens stay the same."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_device import (
    FakeDriver,
    FakeExecutable,
    expected_logits,
    expected_tokens,
    serving_program,
    session_of,
)
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ingot.runtime.driver import DeviceFailedError, Ended
from ingot.runtime.program import Program
from ingot.runtime.serving.sampling import Sampling, most_likely
from ingot.runtime.serving.session import (
    Event,
    Sequence,
    Session,
    SessionEndedError,
    StepFailedError,
)
from msgspec import structs
from programs import with_entries, with_step

VOCAB = 50
HOT = Sampling(temperature=1.0, top_k=30, top_p=0.95, repetition_penalty=1.2, seed=11)


def open_session(
    *, pages: int | None = None, driver: FakeDriver | None = None, **shape: Any
) -> tuple[Session, FakeExecutable]:
    driver = driver or FakeDriver()
    session = session_of(serving_program(**shape), driver, pages=pages)
    assert driver.executable is not None
    return session, driver.executable


def run_out(session: Session, limit: int = 3000) -> list[Event]:
    """Step until idle; within `limit` steps, or something is stuck."""
    events: list[Event] = []
    for _ in range(limit):
        if session.idle:
            return events
        events += session.step()
    raise AssertionError(f"not idle after {limit} steps")


def prompts_of(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def check_tokens(sequence: Sequence, count: int | None = None) -> None:
    """The sequence has the tokens and log-probabilities that the bare model gives."""
    sampling = replace(sequence.request.sampling, seed=sequence.seed)
    tokens, logprobs = expected_tokens(sequence.prompt, sequence.generated, sampling, VOCAB)
    assert list(sequence.tokens) == tokens
    assert sequence.logprobs == logprobs
    if count is not None:
        assert sequence.generated == count


def check_events(events: list[Event], sequences: list[Sequence]) -> None:
    """The events say the same as the sequences, and each sequence ends exactly once, last."""
    for sequence in sequences:
        mine = [event for event in events if event.sequence is sequence]
        assert tuple(e.token for e in mine if e.token is not None) == sequence.tokens
        assert [e.logprob for e in mine if e.token is not None] == sequence.logprobs
        assert [e.finish_reason for e in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == sequence.finish_reason is not None
        assert mine[-1].message == sequence.message


def check_all_is_given_back(session: Session) -> None:
    cache = session._scheduler.cache  # pyright: ignore[reportPrivateUsage]
    assert (cache.free_slots, cache.free_pages) == (cache.slots, cache.pages)


@pytest.mark.parametrize("sampling", [Sampling(), HOT], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"pages": 20},
        {"buckets": (5,), "max_sequences": 3},
        {"buckets": (1, 7), "max_sequences": 16, "page_size": 1, "pages": 100},
        {"rows": 3},
        {"rows": 20, "max_sequences": 4},
    ],
    ids=["roomy", "few-pages", "one-bucket", "more-slots-than-tokens", "few-rows", "many-rows"],
)
def test_64_prompts_together_give_what_each_gives_alone(
    sampling: Sampling, shape: dict[str, Any]
) -> None:
    session, _ = open_session(**shape)
    draw = random.Random(1)
    sequences: list[Sequence] = []
    events: list[Event] = []
    for prompt in prompts_of(64, longest=40):
        mine = replace(sampling, seed=draw.randrange(2**64))
        sequences.append(session.submit(prompt, max_new_tokens=draw.randint(1, 24), sampling=mine))
        if draw.random() < 0.5:
            events += session.step()
    events += run_out(session)
    for sequence in sequences:
        assert sequence.finish_reason == "length"
        check_tokens(sequence, min(sequence.request.max_new_tokens, 65 - len(sequence.prompt)))
    check_events(events, sequences)
    if "pages" in shape:
        assert session.stats.preemptions > 0


@pytest.mark.parametrize("largest", [1, 3, 8, 16, 64])
def test_chunked_prefill_equals_unchunked(largest: int) -> None:
    session, device = open_session(buckets=(1, largest))
    [sequence] = session.generate([list(range(50))], max_new_tokens=6)
    check_tokens(sequence, 6)
    assert [count for _, count in device.replays[: -(-50 // largest)]] == (
        [largest] * (50 // largest) + [50 % largest] * (50 % largest > 0)
    )
    assert sequence.stats.steps == len(device.replays) == -(-50 // largest) + 5


def test_decoding_never_waits_for_prefill() -> None:
    session, device = open_session(buckets=(1, 2, 4, 8))
    running = [session.submit([n], max_new_tokens=30) for n in range(3)]
    session.step()
    late = session.submit(range(40), max_new_tokens=1)
    while late.finish_reason is None:
        events = session.step()
        assert {event.sequence for event in events} >= set(running)
        assert device.replays[-1] == ("t8", 8)
    assert len(device.replays) == 1 + 8
    check_tokens(late, 1)


def test_the_smallest_bucket_serves() -> None:
    session, device = open_session()
    session.generate([[1]] * 3, max_new_tokens=2)
    session.generate([[1]] * 5, max_new_tokens=1)
    session.generate([range(17)], max_new_tokens=2)
    assert device.replays == [("t4", 3), ("t4", 3), ("t8", 5), ("t32", 17), ("t1", 1)]


def test_waiting_is_first_in_first_out() -> None:
    session, device = open_session(max_sequences=2)
    sequences = [session.submit([n], max_new_tokens=3) for n in range(7)]
    events = run_out(session)
    ended = [event.sequence for event in events if event.finish_reason]
    assert ended == sequences
    assert max(len(set(slots)) for slots in device.slots_seen) == 2
    check_events(events, sequences)


def test_admission_waits_for_the_pages_of_the_whole_prompt() -> None:
    session, _ = open_session(pages=10)
    first = session.submit(range(24), max_new_tokens=8)
    second = session.submit(range(20), max_new_tokens=1)
    third = session.submit([1], max_new_tokens=2)
    session.step()
    assert (first.slot is None, second.slot is None, third.slot is None) == (False, True, True)
    events = run_out(session)
    assert [e.sequence for e in events if e.finish_reason] == [first, second, third]
    assert session.stats.preemptions == 0
    for sequence in (first, second, third):
        check_tokens(sequence, sequence.request.max_new_tokens)


def test_the_youngest_is_preempted_and_comes_back_the_same() -> None:
    session, _ = open_session(pages=9)
    sequences = [
        session.submit(prompt, max_new_tokens=20, sampling=HOT) for prompt in prompts_of(4, 8)
    ]
    events = run_out(session)
    assert [s.stats.preemptions > 0 for s in sequences] == [False, True, True, True]
    assert sum(s.stats.preemptions for s in sequences) == session.stats.preemptions
    assert [e.sequence for e in events if e.finish_reason] == sequences
    for sequence in sequences:
        check_tokens(sequence, 20)
    check_events(events, sequences)


def test_alone_and_out_of_pages_is_an_error_of_that_sequence() -> None:
    session, _ = open_session(pages=3)
    first = session.submit(range(5), max_new_tokens=50)
    second = session.submit(range(12), max_new_tokens=1)
    events = run_out(session)
    assert first.finish_reason == "error"
    assert (
        first.message == "out of pages: 13 tokens need 4 pages of 4 tokens, the cache has 3 in all"
    )
    check_tokens(first, 8)
    assert second.finish_reason == "length"
    check_tokens(second, 1)
    check_events(events, [first, second])


def test_pages_option_uses_fewer_pages() -> None:
    for pages in (0, 129):
        with pytest.raises(ValueError, match=f"pages: expected 1 to 128, found {pages}"):
            open_session(pages=pages)
    session, _ = open_session(pages=2)
    with pytest.raises(ValueError, match="prompt: expected at most 2 pages of 4 tokens, found 9"):
        session.submit(range(9), max_new_tokens=1)
    [sequence] = session.generate([range(8)], max_new_tokens=1)
    check_tokens(sequence, 1)


def test_capacity_ends_with_length() -> None:
    session, _ = open_session(max_tokens_per_sequence=10)
    near, full = session.generate([range(7), range(10)], max_new_tokens=99)
    assert (near.finish_reason, full.finish_reason) == ("length", "length")
    check_tokens(near, 4)
    check_tokens(full, 1)


def test_stop_tokens_end_and_do_not_appear() -> None:
    tokens, _ = expected_tokens([3, 1, 4], 12, HOT, VOCAB)
    stop = tokens[8]
    first = tokens.index(stop)
    session, _ = open_session()
    other = session.submit([3, 1, 4], max_new_tokens=12, sampling=HOT)
    sequence = session.submit([3, 1, 4], max_new_tokens=12, sampling=HOT, stop_tokens={stop, 77})
    events = run_out(session)
    assert sequence.finish_reason == "stop"
    assert list(sequence.tokens) == tokens[:first]
    assert [e for e in events if e.sequence is sequence][-1].token is None
    check_tokens(other, 12)
    check_events(events, [sequence, other])


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancel_frees_at_once_and_harms_nobody(steps: int) -> None:
    session, _ = open_session(buckets=(1, 4), max_sequences=2, pages=10)
    victim = session.submit(range(12), max_new_tokens=20)
    other = session.submit(range(6), max_new_tokens=10)
    queued = session.submit(range(30), max_new_tokens=3)
    events: list[Event] = []
    for _ in range(steps):
        events += session.step()
    session.cancel(victim)
    session.cancel(victim)
    assert victim.finish_reason == "cancelled"
    assert victim.slot is None
    session.cancel(queued)
    events += run_out(session)
    for sequence in (victim, other, queued):
        check_tokens(sequence)
    assert other.generated == 10
    check_events(events, [victim, other, queued])
    # Every page is free again: one that needs all but one of them runs.
    check_tokens(session.generate([range(36)], max_new_tokens=2)[0], 2)


def test_cancel_of_a_stranger_is_refused() -> None:
    sequence = open_session()[0].submit([1], max_new_tokens=1)
    with pytest.raises(ValueError, match="sequence 1 belongs to another session"):
        open_session()[0].cancel(sequence)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "prompt: expected at least 1 token, found none"),
        ([1, 50], {}, "expected token ids from 0 to 49, found 50 at position 1"),
        ([-1], {}, "expected token ids from 0 to 49, found -1 at position 0"),
        ([0] * 65, {}, "expected at most max_tokens_per_sequence = 64 tokens, found 65"),
        ([0] * 49, {}, "expected at most 12 pages of 4 tokens, found 49 tokens"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
        ([1], {"top_logprobs": 51}, "top_logprobs: expected 0 to 50, found 51"),
        ([1], {"top_logprobs": -1}, "top_logprobs: expected 0 to 50, found -1"),
    ],
)
def test_bad_requests_are_refused_and_harm_nobody(
    tokens: list[int], options: dict[str, Any], message: str
) -> None:
    session, _ = open_session(pages=12)
    running = session.submit([1, 2], max_new_tokens=5)
    session.step()
    options = {"max_new_tokens": 3, **options}
    calls: list[Callable[[], object]] = [
        lambda: session.submit(tokens, **options),
        lambda: session.generate([[1], tokens], **options),
        lambda: session.stream([[1], tokens], **options),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    run_out(session)
    check_tokens(running, 5)
    assert session.stats.sequences == 1


def test_logits_at_every_position_while_others_run() -> None:
    session, device = open_session(pages=12, max_sequences=4)
    sequences = [session.submit(p, max_new_tokens=16, sampling=HOT) for p in prompts_of(6, 8)]
    session.step()
    session.step()
    for tokens in prompts_of(5, 40, seed=5):
        before = len(device.replays)
        logits = session.logits(tokens)
        assert logits.dtype == np.float32
        np.testing.assert_array_equal(logits, expected_logits(tokens, VOCAB))
        assert [count for _, count in device.replays[before:]] == (
            [4] * (len(tokens) // 4) + [len(tokens) % 4] * (len(tokens) % 4 > 0)
        )
        session.step()
    run_out(session)
    for sequence in sequences:
        check_tokens(sequence, 16)
    with pytest.raises(ValueError, match="prompt: expected at least 1 token"):
        session.logits([])
    with pytest.raises(ValueError, match="prompt: expected at most 12 pages"):
        session.logits([0] * 49)


def test_logits_while_the_only_sequence_outgrows_the_cache() -> None:
    session, _ = open_session(pages=3)
    sequence = session.submit(range(11), max_new_tokens=20)
    events = session.step() + session.step()
    session.logits([1])
    events += run_out(session)
    assert sequence.message.startswith("out of pages: 13 tokens need 4 pages")
    check_tokens(sequence, 2)
    check_events(events, [sequence])


def test_top_logprobs_are_reported_with_each_token() -> None:
    session, _ = open_session()
    events = list(session.stream([[5, 6]], max_new_tokens=4, sampling=HOT, top_logprobs=3))
    sequence = events[0].sequence
    logits = expected_logits(sequence.history, VOCAB)
    expected = [most_likely(logits[1 + n], 3) for n in range(4)]
    assert [event.top_logprobs for event in events] == expected == sequence.top_logprobs


def test_without_a_seed_every_sequence_gets_its_own() -> None:
    session, _ = open_session()
    sampling = Sampling(temperature=1.0)
    sequences = session.generate([[1, 2]] * 8, max_new_tokens=12, sampling=sampling)
    assert len({sequence.seed for sequence in sequences}) == 8
    assert len({sequence.tokens for sequence in sequences}) == 8
    for sequence in sequences:
        check_tokens(sequence, 12)


def test_streams_share_a_session() -> None:
    session, _ = open_session(max_sequences=3)
    outside = session.submit([9], max_new_tokens=7)
    first = session.stream([[1], [2, 3]], max_new_tokens=5)
    second = session.stream([[4], [5]], max_new_tokens=9, sampling=HOT)
    kept: tuple[list[Event], list[Event]] = ([next(first)], [next(second)])
    kept[0].extend(first)
    kept[1].extend(second)
    left = run_out(session)
    for events, count in ((kept[0], 5), (kept[1], 9), (left, 7)):
        sequences = list(dict.fromkeys(event.sequence for event in events))
        check_events(events, sequences)
        for sequence in sequences:
            check_tokens(sequence, count)
    assert {event.sequence for event in left} == {outside}


def test_closing_a_stream_cancels_its_sequences() -> None:
    session, _ = open_session()
    stream = session.stream([[1], [2]], max_new_tokens=50)
    sequences = [next(stream).sequence, next(stream).sequence]
    stream.close()
    assert [sequence.finish_reason for sequence in sequences] == ["cancelled"] * 2
    assert session.idle
    session.stream([[1]], max_new_tokens=50)
    assert session.idle


def test_a_stream_keeps_its_events_while_another_steps() -> None:
    session, _ = open_session()
    stream = session.stream([[1]], max_new_tokens=4)
    first = next(stream)
    assert run_out(session) == []
    check_events([first, *stream], [first.sequence])
    check_tokens(first.sequence, 4)


@pytest.mark.parametrize("fail_at", [0, 3])
def test_a_device_error_ends_the_session(fail_at: int) -> None:
    session, device = open_session(driver=FakeDriver(fail_at=fail_at), max_sequences=2)
    sequences = [session.submit([n], max_new_tokens=10) for n in range(3)]
    events: list[Event] = []
    for _ in range(fail_at + 1):
        events += session.step()
    why = "the session ended: DeviceFailedError: it is gone"
    for sequence in sequences:
        assert sequence.finish_reason == "error"
        assert sequence.message == why
        check_tokens(sequence)
    check_events(events, sequences)
    calls: list[Callable[[], object]] = [
        session.step,
        lambda: session.submit([1], max_new_tokens=1),
        lambda: session.generate([[1]], max_new_tokens=1),
        lambda: session.stream([[1]], max_new_tokens=1),
        lambda: session.logits([1]),
    ]
    for call in calls:
        with pytest.raises(SessionEndedError, match=why):
            call()
    session.cancel(sequences[0])
    session.close()
    assert device.closed == 1


def test_a_device_error_in_logits_reaches_the_caller_and_the_sequences() -> None:
    session, _ = open_session(driver=FakeDriver(fail_at=2))
    sequence = session.submit([1], max_new_tokens=10)
    events = session.step()
    with pytest.raises(SessionEndedError, match="it is gone") as caught:
        session.logits(range(20))
    assert isinstance(caught.value.__cause__, DeviceFailedError)
    check_events(events + session.step(), [sequence])
    with pytest.raises(SessionEndedError):
        session.step()


@pytest.mark.parametrize("fail_at", [0, 2])
def test_an_interrupted_step_is_taken_again(fail_at: int) -> None:
    driver = FakeDriver(fail_at=fail_at, failure=KeyboardInterrupt())
    session, _ = open_session(driver=driver, buckets=(1, 4))
    sequences = [session.submit(p, max_new_tokens=6, sampling=HOT) for p in prompts_of(3, 9)]
    with pytest.raises(KeyboardInterrupt):
        run_out(session)
    driver.fail_at = None
    run_out(session)
    for sequence in sequences:
        check_tokens(sequence, 6)


@pytest.mark.parametrize("pages", [20, 128])
def test_a_step_that_fails_ends_those_alone_whose_own_step_fails(pages: int) -> None:
    driver = FakeDriver(poison=7)
    session, _ = open_session(driver=driver, pages=pages)
    sequences = [session.submit(p, max_new_tokens=24) for p in prompts_of(64, longest=40)]
    check_events(run_out(session), sequences)
    for sequence in sequences:
        check_tokens(sequence)
        failed = 7 in (*sequence.prompt, *sequence.tokens[:23])
        assert sequence.finish_reason == ("error" if failed else "length")
        assert sequence.message == ("the step failed: IndexError: token 7" if failed else "")
    assert 10 < sum(sequence.finish_reason == "error" for sequence in sequences) < 54
    check_all_is_given_back(session)
    [again] = session.generate([[3] * 40], max_new_tokens=8)
    assert again.finish_reason == "length"


def test_logits_that_fail_raise_and_the_session_goes_on() -> None:
    session, _ = open_session(driver=FakeDriver(poison=7))
    sequence = session.submit([1, 2], max_new_tokens=9)
    for tokens in ([7], [1] * 40 + [7]):
        with pytest.raises(StepFailedError, match=r"^the step failed: IndexError: token 7$"):
            session.logits(tokens)
    np.testing.assert_array_equal(session.logits([1, 2]), expected_logits([1, 2], VOCAB))
    check_events(run_out(session), [sequence])
    check_tokens(sequence, 9)
    check_all_is_given_back(session)


def test_a_device_that_fails_while_a_step_is_taken_apart_ends_the_session() -> None:
    driver = FakeDriver(poison=7, fail_at=2)
    session, _ = open_session(driver=driver)
    sequences = [session.submit(p, max_new_tokens=9) for p in ([7], [1], [2], [3])]
    check_events(session.step(), sequences)
    messages = [sequence.message for sequence in sequences]
    gone = "the session ended: DeviceFailedError: it is gone"
    assert messages == ["the step failed: IndexError: token 7", *[gone] * 3]


def test_outputs_of_the_wrong_shape_end_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    session, device = open_session()
    given = {"logits": np.zeros((1, 49), np.float32)}
    monkeypatch.setattr(device, "launch", lambda *_: Ended(given))
    [sequence] = session.generate([[1]], max_new_tokens=1)
    assert sequence.message == (
        "the session ended: DeviceFailedError: entry T=1,L=1: expected logits float32[1, 50], "
        "found float32[1, 49]"
    )


def test_broken_logits_end_one_sequence() -> None:
    session, device = open_session()
    sequences = [session.submit([n], max_new_tokens=5) for n in range(3)]
    events = session.step()
    device.broken_row = 1
    events += session.step()
    device.broken_row = None
    events += run_out(session)
    assert [s.finish_reason for s in sequences] == ["length", "error", "length"]
    assert sequences[1].message == "logits: expected a finite maximum and no NaN, found nan"
    for sequence, count in zip(sequences, (5, 1, 5), strict=True):
        check_tokens(sequence, count)
    check_events(events, sequences)


def test_close_cancels_and_is_final() -> None:
    with open_session()[0] as session:
        sequence = session.submit([1], max_new_tokens=10)
        events = session.step()
    session.close()
    assert sequence.finish_reason == "cancelled"
    check_events(events + session.step(), [sequence])
    with pytest.raises(SessionEndedError, match="the session ended: closed"):
        session.step()


def test_statistics_add_up() -> None:
    session, device = open_session(buckets=(1, 2, 4))
    assert session.stats.time_to_first_token is None
    sequences = session.generate([range(10), [1, 2]], max_new_tokens=4)
    total = session.stats
    assert (total.sequences, total.prompt_tokens, total.generated_tokens) == (2, 12, 8)
    assert total.steps == len(device.replays)
    assert [s.stats.prompt_tokens for s in sequences] == [10, 2]
    assert [s.stats.generated_tokens for s in sequences] == [4, 4]
    # 4, 4, 2+2 tokens of prefill for the first and its chunk-mate, then three of decode.
    assert [s.stats.steps for s in sequences] == [6, 4]
    assert total.steps == 6
    firsts = [s.stats.time_to_first_token for s in sequences]
    assert all(first is not None and first > 0 for first in firsts)
    assert total.time_to_first_token == pytest.approx(sum(f for f in firsts if f) / 2)
    assert total.prefill_seconds > 0 < total.decode_seconds
    assert sequences[0].stats.prefill_seconds == pytest.approx(total.prefill_seconds)
    assert sequences[0].stats.decode_seconds == pytest.approx(total.decode_seconds)
    assert sequences[1].stats.prefill_seconds < total.prefill_seconds


def test_a_first_token_is_prefill() -> None:
    session, _ = open_session()
    [sequence] = session.generate([[1]], max_new_tokens=1)
    for stats in (session.stats, sequence.stats):
        assert stats.prefill_seconds > 0
        assert stats.decode_seconds == 0


def without(program: Program, name: str) -> Program:
    step = program.functions["step"]
    kept = [{n: s for n, s in specs.items() if n != name} for specs in (step.inputs, step.outputs)]
    return with_step(program, inputs=kept[0], outputs=kept[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: structs.replace(p, meta={}),
            r"program.meta\['vocab_size'\]: expected an int ≥ 1",
        ),
        (lambda p: structs.replace(p, meta={**p.meta, "pages": 0}), r"meta\['pages'\].*found 0"),
        (lambda p: structs.replace(p, functions={}), r"program: expected a step, found \[\]"),
        (lambda p: with_step(p, entries=()), "step: expected at least one entry"),
        (lambda p: without(p, "slots"), r"step: expected inputs .*slots i32\[T\].* found"),
        (
            lambda p: without(p, "logits"),
            r"step: expected outputs logits f32\[L, 50\], found",
        ),
        (
            lambda p: with_entries(p, [structs.replace(p.entries[3], symbols={"T": 8, "L": 0})]),
            "entry T=8,L=0: expected symbols T ≥ 1 and L ≥ 1, found",
        ),
        (
            lambda p: with_entries(
                p, (serving_program(rows=4).entries[-1], p.entries[3], p.entries[0])
            ),
            r"expected T=32,L=4, .* to have the most rows, found more in \['T=8,L=8'\]",
        ),
    ],
)
def test_programs_that_do_not_serve_are_refused(
    change: Callable[[Program], Program], message: str
) -> None:
    program = serving_program()
    with pytest.raises(ValueError, match=message):
        Session(change(program), FakeDriver().load(program, lambda _name: None))


class SessionMachine(RuleBasedStateMachine):
    """Random submissions, cancellations, steps and logits, with too few of everything."""

    sequences: list[Sequence]
    events: list[Event]

    @initialize(pages=st.integers(3, 14), largest=st.sampled_from([2, 5, 8]))
    def start(self, pages: int, largest: int) -> None:
        self.pages = pages
        self.session, _ = open_session(
            buckets=(1, largest), max_sequences=3, pages=pages, max_tokens_per_sequence=24
        )
        self.sequences = []
        self.events = []

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24),
        count=st.integers(1, 20),
        seed=st.integers(0, 2**64 - 1),
        hot=st.booleans(),
        stops=st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
    )
    def submit(
        self, prompt: list[int], count: int, seed: int, hot: bool, stops: frozenset[int]
    ) -> None:
        sampling = replace(HOT, seed=seed) if hot else Sampling(seed=seed)
        if len(prompt) > 4 * self.pages:
            with pytest.raises(ValueError, match="prompt: expected at most"):
                self.session.submit(prompt, max_new_tokens=count)
            return
        self.sequences.append(
            self.session.submit(prompt, max_new_tokens=count, sampling=sampling, stop_tokens=stops)
        )

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.events += self.session.step()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.session.cancel(data.draw(st.sampled_from(self.sequences)))

    @rule(tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24))
    def logits(self, tokens: list[int]) -> None:
        tokens = tokens[: 4 * self.pages]
        np.testing.assert_array_equal(self.session.logits(tokens), expected_logits(tokens, VOCAB))

    @invariant()
    def running_ones_are_the_oldest_with_slots_of_their_own(self) -> None:
        alive = [s for s in self.sequences if s.finish_reason is None]
        running = [s for s in alive if s.slot is not None]
        assert running == alive[: len(running)]
        slots = Counter(s.slot for s in running)
        assert all(count == 1 for count in slots.values())
        assert all(s.slot is None for s in self.sequences if s.finish_reason)

    def teardown(self) -> None:
        if not hasattr(self, "session"):
            return
        self.events += run_out(self.session)
        check_events(self.events, self.sequences)
        for sequence in self.sequences:
            check_tokens(sequence)
            self.check_end(sequence)
        longest = [0] * min(4 * self.pages, 24)
        np.testing.assert_array_equal(self.session.logits(longest), expected_logits(longest, VOCAB))

    def check_end(self, sequence: Sequence) -> None:
        """The reason is right: recomputed from the bare model's next token and the limits."""
        assert not set(sequence.tokens) & sequence.request.stop_tokens
        if sequence.finish_reason == "length":
            room = 25 - len(sequence.prompt)
            assert sequence.generated == min(sequence.request.max_new_tokens, room)
        elif sequence.finish_reason == "stop":
            tokens, _ = expected_tokens(
                sequence.prompt, sequence.generated + 1, sequence.request.sampling, VOCAB
            )
            assert tokens[-1] in sequence.request.stop_tokens
        elif sequence.finish_reason == "error":
            assert len(sequence.history) == 4 * self.pages + 1
            assert sequence.message.startswith("out of pages")
        else:
            assert sequence.finish_reason == "cancelled"


TestSession = SessionMachine.TestCase
TestSession.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)
