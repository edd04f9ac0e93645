"""Steps that are launched ahead: sequences get what a loop that waits for each step gives them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake_device import (
    FakeDriver,
    FakeExecutable,
    FakeRun,
    expected_logits,
    serving_program,
    session_of,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ingot.runtime.driver import LAUNCHES, Array, DeviceFailedError, WeightLoader
from ingot.runtime.program import Program
from ingot.runtime.serving.sampling import Sampling
from ingot.runtime.serving.sequence import Sequence as Served
from ingot.runtime.serving.session import Session, SessionEndedError

VOCAB, POISON_TOKEN = 50, 13
# Settings that f32 holds exactly.
SETTINGS = (
    Sampling(seed=1),
    Sampling(temperature=1.0, seed=2),
    Sampling(temperature=0.75, top_k=9, seed=2**64 - 1),
    Sampling(temperature=1.5, top_p=0.875, min_p=0.125, seed=4),
    Sampling(repetition_penalty=1.5, seed=5),
    Sampling(temperature=1.0, repetition_penalty=1.25, top_k=20, top_p=0.5, seed=6),
)


class Device(FakeExecutable):
    """Records the names of inputs, and fails once at each launch of `failing`."""

    def __init__(self, program: Program, driver: FakeDriver) -> None:
        super().__init__(program, driver)
        self.given: list[set[str]] = []
        self.failing: dict[int, BaseException] = {}

    def launch(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> FakeRun:
        self.given.append({*inputs})
        if (error := self.failing.pop(len(self.given), None)) is not None:
            self.left = (None, {})
            raise error
        return super().launch(function, symbols, inputs, outputs)


class Driver(FakeDriver):
    def load(self, program: Program, weights: WeightLoader) -> Device:
        self.executable = Device(program, self)
        return self.executable


def opened(
    *, ahead: bool = True, poison: int | None = None, candidates: int | None = 3, **shape: Any
) -> tuple[Session, Device]:
    driver = Driver(poison=poison)
    session = session_of(serving_program(candidates=candidates, **shape), driver, ahead=ahead)
    assert isinstance(driver.executable, Device)
    return session, driver.executable


def finish(session: Session) -> None:
    while not session.idle:
        session.step()


# ---- the order of launches


def test_the_host_waits_for_a_step_when_the_next_is_launched() -> None:
    session, device = opened()
    session.generate([[1, 2, 3]], max_new_tokens=9)
    # The prompt is read in a larger entry. The last step is not followed: it is known to be that.
    expected = [("launch", 1), ("wait", 1), ("launch", 2)]
    for n in range(2, 9):
        expected += [("feed", n + 1), ("wait", n)]
    assert device.calls == [*expected, ("wait", 9)]
    assert len(device.replays) == 9


def test_so_many_are_under_way_while_the_caller_is_busy() -> None:
    session, _ = opened()
    for i, event in enumerate(session.stream([[1], [2]], max_new_tokens=9)):
        if event.finish_reason is None and i < 12:
            assert len(session._steps.under_way) == LAUNCHES, i


def test_nothing_is_copied_but_pages_that_were_taken() -> None:
    session, device = opened(page_size=4)
    session.generate([[1], [2]], max_new_tokens=12, sampling=SETTINGS[5])
    first, *rest = device.given
    assert len(first) > 10
    pages = ({"page_table"} if position % 4 == 0 else set[str]() for position in range(1, 12))
    assert rest == [*pages]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"candidates": None}, {}),
        ({}, {"top_logprobs": 4}),
        ({"ahead": False}, {}),
    ],
    ids=["the host samples", "the host samples for one", "not ahead"],
)
def test_what_is_not_launched_ahead(shape: dict[str, Any], options: dict[str, Any]) -> None:
    session, device = opened(**shape)
    session.submit([5], max_new_tokens=6)
    session.submit([1], max_new_tokens=6, **options)
    finish(session)
    assert {kind for kind, _ in device.calls} == {"launch", "wait"}
    assert [kind for kind, _ in device.calls] == ["launch", "wait"] * 6


def test_who_joins_waits_for_what_is_under_way() -> None:
    session, device = opened()
    first = session.submit([1], max_new_tokens=20)
    for _ in range(3):
        session.step()
    assert [kind for kind, _ in device.calls[-2:]] == ["wait", "feed"]
    second = session.submit([2], max_new_tokens=20)
    before = len(device.calls)
    while second.generated == 0:
        session.step()
    assert [kind for kind, _ in device.calls[before:]] == [
        *("wait", "wait"),  # what was under way
        *("launch", "feed", "wait", "feed"),
    ]
    finish(session)
    assert (first.generated, second.generated) == (20, 20)


def test_nothing_is_launched_behind_a_stop() -> None:
    session, _ = opened()
    stop = session.generate([[3]], max_new_tokens=8)[0].tokens[4]
    session, device = opened()
    (sequence,) = session.generate([[3]], max_new_tokens=8, stop_tokens=[stop])
    assert sequence.finish_reason == "stop"
    # Step 5 gave the stop token when step 6 was under way, which nobody waits for.
    assert device.calls[-2:] == [("feed", 6), ("wait", 5)]
    assert session.idle
    session.generate([[4]], max_new_tokens=1)
    assert device.calls[-2:] == [("launch", 7), ("wait", 7)]


# ---- the same tokens


@dataclass
class Script:
    """What happens: requests, steps between them, cancellations and logits."""

    ops: list[tuple[Any, ...]]
    shape: dict[str, Any]
    poison: int | None
    stopped: set[int] = field(default_factory=set[int])  # launches that are interrupted once


requests = st.tuples(
    st.just("submit"),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14),
    st.fixed_dictionaries(
        {
            "max_new_tokens": st.integers(1, 24),
            "sampling": st.sampled_from(SETTINGS),
            "stop_tokens": st.sampled_from([(), (7,), tuple(range(0, 50, 9))]),
            "top_logprobs": st.sampled_from([0, 0, 0, 2, 3, 5]),
        }
    ),
)
scripts = st.builds(
    Script,
    st.lists(
        st.one_of(
            requests,
            requests,
            st.tuples(st.just("steps"), st.integers(1, 9)),
            st.tuples(st.just("cancel"), st.integers(0, 9)),
            st.tuples(st.just("logits"), st.lists(st.integers(0, VOCAB - 1), min_size=1)),
        ),
        min_size=1,
        max_size=14,
    ),
    st.sampled_from(
        [
            {},
            {"max_sequences": 3},
            {"pages": 9, "page_size": 4, "max_tokens_per_sequence": 28, "max_sequences": 4},
            {"pages": 14, "page_size": 2, "max_tokens_per_sequence": 24},
            {"buckets": (5,), "max_sequences": 3},
        ]
    ),
    st.sampled_from([None, None, POISON_TOKEN]),
    st.sets(st.integers(1, 40), max_size=3),
)


def play(script: Script, ahead: bool) -> tuple[list[Served], Device]:
    """What becomes of every request, and the device. Where steps fail, they are taken again."""
    session, device = opened(ahead=ahead, poison=script.poison, **script.shape)
    found: list[Served] = []
    if ahead:
        device.failing = {n: KeyboardInterrupt() for n in script.stopped}

    def again(what: Callable[[], Any]) -> Any:
        while True:
            try:
                return what()
            except KeyboardInterrupt:
                continue

    for kind, *given_ in script.ops:
        if kind == "submit":
            prompt, options = given_
            longest = session.meta.max_tokens_per_sequence
            found.append(session.submit(prompt[:longest], **options))
        elif kind == "steps":
            for _ in range(given_[0]):
                again(session.step)
        elif kind == "cancel" and found:
            session.cancel(found[given_[0] % len(found)])
        elif kind == "logits" and script.poison is None:
            prompt = given_[0][: min(session.meta.max_tokens_per_sequence, 16)]
            logits = again(lambda: session.logits(prompt))  # noqa: B023
            np.testing.assert_array_equal(logits, expected_logits(prompt, VOCAB))
    while not session.idle:
        again(session.step)
    cache = session._cache
    assert (cache.free_pages, cache.free_slots) == (cache.pages, cache.slots)
    assert not cache.page_table.any()
    return found, device


def assert_same(found: Sequence[Served], expected: Sequence[Served]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        if "cancelled" in (mine.finish_reason, theirs.finish_reason):
            count = min(mine.generated, theirs.generated)  # it may come a step or two later
        else:
            assert (mine.finish_reason, mine.message) == (theirs.finish_reason, theirs.message)
            count = max(mine.generated, theirs.generated)
        for name in ("tokens", "logprobs", "top_logprobs"):
            assert getattr(mine, name)[:count] == getattr(theirs, name)[:count]
        assert len(mine.logprobs) == len(mine.top_logprobs) == mine.generated
        assert mine.stats.generated_tokens == mine.generated


@hypothesis_settings(max_examples=150)
@given(scripts)
def test_random_traffic(script: Script) -> None:
    expected, _ = play(script, ahead=False)
    found, _ = play(script, ahead=True)
    assert_same(found, expected)


@pytest.mark.parametrize("pages", [16, 40])
def test_much_is_fed_and_dropped(pages: int) -> None:
    """The traffic of the test above, at length: with stops and pages that change hands."""
    rng = np.random.default_rng(pages)
    ops: list[tuple[Any, ...]] = []
    for _ in range(60):
        prompt = rng.integers(0, VOCAB, rng.integers(1, 9)).tolist()
        options = {
            "max_new_tokens": int(rng.integers(1, 30)),
            "sampling": SETTINGS[rng.integers(6)],
            "stop_tokens": (7, 21),
        }
        ops += [("submit", prompt, options), ("steps", int(rng.integers(1, 12)))]
    shape = {"pages": pages, "page_size": 2, "max_sequences": 4, "max_tokens_per_sequence": 32}
    script = Script(ops, shape, None)
    expected, plain = play(script, ahead=False)
    found, device = play(script, ahead=True)
    assert_same(found, expected)
    kinds = [kind for kind, _ in device.calls]
    assert kinds.count("feed") > 100
    assert kinds.count("wait") < kinds.count("feed") + kinds.count("launch")  # some are dropped
    assert "feed" not in {kind for kind, _ in plain.calls}


# ---- failures


@pytest.mark.parametrize("nth", range(1, 9))
@pytest.mark.parametrize("error", [IndexError("once"), KeyboardInterrupt()], ids=["fails", "stops"])
def test_a_step_that_fails_once_is_taken_again(nth: int, error: BaseException) -> None:
    session, _ = opened(ahead=False)
    prompts, sampling = [[1], [2, 3], [4]], SETTINGS[5]
    expected = session.generate(prompts, max_new_tokens=9, sampling=sampling)
    session, device = opened()
    sequences = [session.submit(p, max_new_tokens=9, sampling=sampling) for p in prompts]
    device.failing = {nth: error}
    while not session.idle:
        try:
            session.step()
        except KeyboardInterrupt:
            continue
    assert not device.failing
    assert_same(sequences, expected)


@pytest.mark.parametrize("nth", range(1, 9))
def test_a_wait_that_is_interrupted_is_taken_again(
    nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, _ = opened(ahead=False)
    expected = session.generate([[1], [2, 3]], max_new_tokens=9, sampling=SETTINGS[5])
    session, _ = opened()
    sequences = [session.submit(p, max_new_tokens=9, sampling=SETTINGS[5]) for p in ([1], [2, 3])]
    waits, wait = iter(range(1, 99)), FakeRun.wait

    def interrupted(run: FakeRun) -> dict[str, Array]:
        if next(waits) == nth:
            raise KeyboardInterrupt
        return wait(run)

    monkeypatch.setattr(FakeRun, "wait", interrupted)
    stops = 0
    while not session.idle:
        try:
            session.step()
        except KeyboardInterrupt:
            stops += 1
    assert stops == 1
    assert_same(sequences, expected)


def test_results_that_fail_are_dropped_with_what_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose results cannot be had: its rows are computed again, alone if need be."""
    session, _ = opened(ahead=False)
    expected = session.generate([[1], [2, 3]], max_new_tokens=9, sampling=SETTINGS[5])
    for nth in range(2, 9):  # of the first step, which the host launched, the rows end
        session, _ = opened()
        sequences = [
            session.submit(p, max_new_tokens=9, sampling=SETTINGS[5]) for p in ([1], [2, 3])
        ]
        waits, wait = iter(range(1, 99)), FakeRun.wait

        def failing(run: FakeRun, waits: Any = waits, wait: Any = wait, nth: int = nth) -> Any:
            if next(waits) == nth:
                raise IndexError("once")
            return wait(run)

        with monkeypatch.context() as patch:
            patch.setattr(FakeRun, "wait", failing)
            finish(session)
        assert_same(sequences, expected)


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_device_that_fails_ends_everything(nth: int) -> None:
    session, device = opened()
    sequences = [session.submit([n], max_new_tokens=9) for n in range(3)]
    device.failing = {nth: DeviceFailedError("it is gone")}
    finish(session)
    for sequence in sequences:
        assert sequence.finish_reason == "error"
        assert sequence.message == "the session ended: DeviceFailedError: it is gone"
    with pytest.raises(SessionEndedError):
        session.step()


def test_closing_leaves_nothing_under_way() -> None:
    session, device = opened()
    sequence = session.submit([1], max_new_tokens=30)
    session.step()
    session.close()
    assert sequence.finish_reason == "cancelled"
    assert not session._steps.under_way
    assert device.closed == 1
