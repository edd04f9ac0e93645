"""Tokens that the device chose: sessions give what they give when the host chooses."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_device import FakeDriver, FakeExecutable, expected_logits, serving_program, session_of
from hypothesis import given
from hypothesis import strategies as st
from ingot.runtime.serving.abi import ServingAbi
from ingot.runtime.serving.batch import Chunk, Row
from ingot.runtime.serving.row_sampling import RowSampler
from ingot.runtime.serving.sampling import Sampling, uniform
from ingot.runtime.serving.sequence import Sequence
from ingot.runtime.serving.session import Session
from programs import with_step
from sampling_checks import request, row_of

HOT = Sampling(temperature=0.7, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.25)
# Settings that f32 holds exactly: the two sides then choose from the same numbers.
SETTINGS = (
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.75, top_k=9),
    Sampling(temperature=1.5, top_p=0.875, min_p=0.125),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=1.0, repetition_penalty=1.25, top_k=20, top_p=0.5),
)


def open_session(candidates: int | None, **shape: Any) -> tuple[Session, FakeExecutable]:
    driver = FakeDriver()
    session = session_of(serving_program(candidates=candidates, **shape), driver)
    assert driver.executable is not None
    return session, driver.executable


def served(candidates: int | None, tops: tuple[int, ...], **shape: Any) -> list[Sequence]:
    """24 requests with all kinds of settings, submitted while others run."""
    session, _ = open_session(candidates, **shape)
    draw = random.Random(5)
    sequences: list[Sequence] = []
    for i in range(24):
        sampling = replace(SETTINGS[i % len(SETTINGS)], seed=draw.randrange(2**64))
        prompt = [draw.randrange(50) for _ in range(draw.randint(1, 20))]
        top = tops[i % len(tops)]
        sequences.append(
            session.submit(
                prompt,
                max_new_tokens=draw.randint(1, 12),
                sampling=sampling,
                stop_tokens=[7],
                top_logprobs=top,
            )
        )
        if draw.random() < 0.5:
            session.step()
    while not session.idle:
        session.step()
    return sequences


@pytest.mark.parametrize("tops", [(0,), (0, 3, 1, 3, 2), (4, 0, 9)], ids=["none", "few", "more"])
@pytest.mark.parametrize("shape", [{}, {"pages": 20}, {"buckets": (5,), "max_sequences": 3}])
def test_the_device_gives_what_the_host_gives(shape: dict[str, Any], tops: tuple[int, ...]) -> None:
    expected, found = served(None, tops, **shape), served(3, tops, **shape)
    for a, b in zip(expected, found, strict=True):
        assert a.tokens == b.tokens
        assert a.finish_reason == b.finish_reason
        np.testing.assert_allclose(b.logprobs, a.logprobs, atol=1e-5)
        for one, other in zip(a.top_logprobs, b.top_logprobs, strict=True):
            assert [t for t, _ in one] == [t for t, _ in other]
            np.testing.assert_allclose([p for _, p in other], [p for _, p in one], atol=1e-5)


def test_only_what_is_needed_is_fetched() -> None:
    session, device = open_session(3)
    session.generate([[1], [2]], max_new_tokens=2)
    session.generate([[1]], max_new_tokens=1, sampling=HOT, top_logprobs=3)
    session.generate([[1]], max_new_tokens=1, top_logprobs=4)
    tops = ["logprob", "token", "top_logprobs", "top_tokens"]
    assert device.fetched == [["logprob", "token"]] * 2 + [tops, ["logits"]]
    session.generate([range(40)], max_new_tokens=1)
    assert device.fetched[-2:] == [[], ["logprob", "token"]]
    found = session.logits([1, 2, 3])
    assert device.fetched[-1] == ["logits"]
    np.testing.assert_array_equal(found, expected_logits([1, 2, 3], 50))


def test_a_broken_row_ends_its_sequence_with_the_host_s_words() -> None:
    messages: list[str] = []
    for candidates in (None, 0):
        session, device = open_session(candidates)
        device.broken_row = 1
        good, bad = session.generate([[1], [2]], max_new_tokens=3)
        assert (good.finish_reason, bad.finish_reason) == ("length", "error")
        messages.append(bad.message)
    assert messages == ["logits: expected a finite maximum and no NaN, found nan"] * 2


@pytest.mark.parametrize("missing", ["seen", "draw", "token", "top_logprobs"])
def test_sampling_is_all_or_nothing(missing: str) -> None:
    program = serving_program(candidates=3)
    step = program.functions["step"]
    kept = [
        {n: s for n, s in specs.items() if n != missing} for specs in (step.inputs, step.outputs)
    ]
    with pytest.raises(ValueError, match="step: expected"):
        ServingAbi(with_step(program, inputs=kept[0], outputs=kept[1]))


# ---- the inputs


def bits_of(words: Any) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def test_rows_have_their_settings_and_padding_is_greedy() -> None:
    device = RowSampler(vocab=100, candidates=4)
    cold = request(Sampling(seed=3), [1])
    hot = request(replace(HOT, seed=2**64 - 2), [1, 99, 32], top=2)
    made = device.inputs(3, [row_of(cold), row_of(hot)])
    assert made["temperature"].tolist() == [0, np.float32(0.7), 0]
    assert made["top_k"].tolist() == [0, 30, 0]
    assert made["top_p"].tolist() == [1, np.float32(0.9), 1]
    assert made["penalty"].tolist() == [1, 1.25, 1]
    assert made["top"].tolist() == [0, 2, 0]
    assert made["seed"].tolist() == [3, -2, 0]
    assert made["prompt"].tolist() == [1, 3, 0]
    assert [bits_of(words) for words in made["seen"]] == [[], [1, 32, 99], []]
    hot.history.append(64)
    later = device.inputs(2, [row_of(hot), row_of(cold)])
    assert bits_of(later["seen"][0]) == [1, 32, 64, 99]
    assert later["draw"][0] != made["draw"][1] > 0
    assert later["draw"][1] == 0


def test_drafted_tokens_are_seen_by_the_rows_behind_them_alone() -> None:
    device = RowSampler(vocab=100, candidates=0)
    hot = request(replace(HOT, seed=9), [1, 99])
    chunk = Chunk(hot, 1, (99, 5, 64))
    rows = [Row(chunk, offset) for offset in range(3)]
    made = device.inputs(4, rows)
    assert [bits_of(words) for words in made["seen"]] == [[1, 99], [1, 5, 99], [1, 5, 64, 99], []]
    np.testing.assert_allclose(made["draw"], [*(uniform(9, step) for step in range(3)), 0])
    # Nothing stays of what was not accepted.
    hot.history.append(7)
    assert bits_of(device.inputs(1, [row_of(hot)])["seen"][0]) == [1, 7, 99]


@given(st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_draws_are_rounded_down(seed: int, step: int) -> None:
    device = RowSampler(vocab=8, candidates=0)
    sequence = request(Sampling(temperature=1.0, seed=seed), [1])
    sequence.history += [0] * step
    (draw,) = device.inputs(1, [row_of(sequence)])["draw"]
    exact = uniform(seed, step)
    assert draw.dtype == np.float32
    # In f64: numpy compares with a Python float in f32.
    assert float(draw) <= exact < float(np.nextafter(draw, np.float32(2)))


def test_numbers_beyond_f32_stay_what_they_mean() -> None:
    device = RowSampler(vocab=8, candidates=2)
    extreme = (
        Sampling(temperature=5e-324, top_k=2**40),
        Sampling(temperature=1e300, repetition_penalty=1e-300),
    )
    made = device.inputs(2, [row_of(request(s, [1], top=9)) for s in extreme])
    assert (made["temperature"] > 0).all() and np.isfinite(made["temperature"]).all()
    assert made["top_k"].tolist() == [8, 0]
    assert (made["penalty"] > 0).all() and np.isfinite(made["penalty"]).all()
    assert made["top"].tolist() == [0, 0]  # the host's
