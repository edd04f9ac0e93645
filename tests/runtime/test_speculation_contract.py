"""Speculation changes nothing but the number of steps.

Whatever a drafter proposes, sequences get the tokens, log-probabilities, most likely tokens, ends
and free pages that they get without one: on a device whose logits are exact, and on whole models
through the CPU's executable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, product
from random import Random
from typing import Any

import numpy as np
import pytest
from drafters import KINDS, Coming, OracleDrafter
from fake_device import FakeDriver, expected_tokens, serving_program, session_of
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ingot.codegen.cpu import CpuDriver
from ingot.codegen.lower import Lowered, lower, serving_bindings
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.target import CPU
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.pipelines import causal_lm
from ingot.passes.serving.insert_kv_cache import InsertKvCache
from ingot.passes.serving.sample_on_device import output_names
from ingot.runtime.serving.sampling import Sampling
from ingot.runtime.serving.sequence import Request, SessionStats
from ingot.runtime.serving.sequence import Sequence as ServedSequence
from ingot.runtime.serving.session import Session
from ingot.runtime.serving.speculation import Drafter
from planned import PlannedDriver, ReferenceBackend
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")

VOCAB = 50
# Settings that f32 holds exactly, so that a device that samples chooses from the same numbers.
SAMPLINGS = (
    Sampling(),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=1.0),
    Sampling(temperature=0.75, top_k=9),
    Sampling(temperature=1.5, top_p=0.875, min_p=0.125),
    Sampling(temperature=1.0, repetition_penalty=1.25, top_k=20, top_p=0.5),
)


@dataclass(frozen=True)
class Asked:
    """A prompt with its request; after `cancel` events its caller cancels it."""

    prompt: tuple[int, ...]
    request: Request
    cancel: int | None = None

    @property
    def seed(self) -> int:
        assert self.request.sampling.seed is not None
        return self.request.sampling.seed


@dataclass(frozen=True)
class Served:
    """All that a caller sees of a sequence."""

    tokens: tuple[int, ...]
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]]
    finish_reason: str | None
    message: str
    events: list[tuple[Any, ...]]
    generated_tokens: int


def serve(session: Session, asked: Sequence[Asked]) -> tuple[list[Served], SessionStats]:
    """What becomes of `asked`, all queued at once, and the figures of the session."""
    cached = session._cache
    sequences = [session.requests([a.prompt], a.request)[0] for a in asked]
    events: dict[ServedSequence, list[tuple[Any, ...]]] = {s: [] for s in sequences}
    cancels = {s: a.cancel for s, a in zip(sequences, asked, strict=True)}
    for event in session.events(list(sequences)):
        sequence, mine = event.sequence, events[event.sequence]
        mine.append(
            (event.token, event.logprob, event.top_logprobs, event.finish_reason, event.message)
        )
        if len(mine) == cancels[sequence] and event.finish_reason is None:
            session.cancel(sequence)
        check_pages(session)
    assert session.idle
    assert (cached.free_pages, cached.free_slots) == (cached.pages, cached.slots)
    assert not cached.page_table.any()
    stats = session.stats
    assert stats.generated_tokens == sum(s.generated for s in sequences)
    assert stats.prompt_tokens == sum(len(s.prompt) for s in sequences)
    session.close()
    return [
        Served(
            s.tokens,
            s.logprobs,
            s.top_logprobs,
            s.finish_reason,
            s.message,
            events[s],
            s.stats.generated_tokens,
        )
        for s in sequences
    ], stats


def check_pages(session: Session) -> None:
    """Running sequences hold what they hold without a drafter: nothing for rejected tokens, and a
    position more for each step that was launched ahead."""
    cached, held = session._cache, 0
    ahead = len(session._steps.under_way)
    for sequence in session._scheduler.running:
        assert sequence.slot is not None
        assert 0 <= sequence.cached_length < sequence.length
        pages = len(cached.pages_of(sequence.slot))
        most = cached.pages_for(sequence.length + ahead)
        assert cached.pages_for(sequence.cached_length) <= pages <= most
        held += pages
    assert cached.free_pages == cached.pages - held


# ---- a device whose logits are exact

requests = st.builds(
    Asked,
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24).map(tuple),
    request=st.builds(
        Request,
        max_new_tokens=st.integers(1, 30),
        sampling=st.builds(replace, st.sampled_from(SAMPLINGS), seed=st.integers(0, 2**64 - 1)),
        stop_tokens=st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
        top_logprobs=st.sampled_from([0, 0, 2, 5]),
    ),
    cancel=st.none() | st.integers(1, 20),
)
shapes = st.fixed_dictionaries(
    {
        "buckets": st.sampled_from([(1, 2, 4, 8, 16, 32), (7,), (1, 24)]),
        "rows": st.sampled_from([None, 1, 5, 9, 40]),
        "max_sequences": st.sampled_from([1, 2, 4]),
        "page_size": st.sampled_from([1, 2, 4]),
        "max_tokens_per_sequence": st.sampled_from([24, 40]),
        "candidates": st.sampled_from([None, 3]),
    }
)


def known(asked: Sequence[Asked], count: int) -> Coming:
    """The first `count` tokens of each, as the bare model gives them."""
    return {
        (a.prompt, a.seed): expected_tokens(a.prompt, count, a.request.sampling, VOCAB)[0]
        for a in asked
    }


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    asked=st.lists(requests, min_size=1, max_size=9),
    shape=shapes,
    spare=st.sampled_from([0, 1, 3, 100]),
    kind=st.sampled_from(KINDS),
    adapt=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_nothing_changes_but_the_number_of_steps(
    asked: list[Asked], shape: dict[str, Any], spare: int, kind: str, adapt: bool, seed: int
) -> None:
    """Whatever steps take, by which the drafts that pay are chosen."""
    pages = -(-max(len(a.prompt) for a in asked) // shape["page_size"]) + spare
    program = serving_program(**shape, pages=1000)

    draw = Random(seed)
    times = accumulate(iter(lambda: draw.choice((0.0, 0.1, 1.0, 7.0)), None))

    def opened(drafter: Drafter | None) -> Session:
        return session_of(
            program, pages=pages, drafter=drafter, adapt=adapt, clock=lambda: next(times)
        )

    expected, _ = serve(opened(None), asked)
    found, _ = serve(opened(OracleDrafter(kind, known(asked, 40), VOCAB, seed)), asked)
    assert found == expected


def test_right_drafts_save_steps_and_wrong_ones_cost_none() -> None:
    asked = [Asked((n,), Request(30, replace(SAMPLINGS[n % 6], seed=n))) for n in range(4)]
    program = serving_program(rows=32, buckets=(1, 4, 32))
    steps: dict[str | None, int] = {}
    for kind in (None, *KINDS):
        drafter = OracleDrafter(kind, known(asked, 40), VOCAB) if kind else None
        session = session_of(program, drafter=drafter)
        steps[kind] = serve(session, asked)[1].steps
    assert steps[None] == steps["wrong"] == 30
    assert steps["right"] < steps["mixed"] < 30
    assert steps["right"] <= 12


def test_what_a_step_computed_is_taken_back_by_cancel() -> None:
    """The caller of a stream who cancels after a token has no token behind it, nor its count."""
    asked = Asked((3, 1), Request(20, Sampling(seed=0)))
    program = serving_program(rows=32)
    drafter = OracleDrafter("right", known([asked], 40), VOCAB, seed=1)
    session = session_of(program, drafter=drafter)
    stream = session.stream([asked.prompt], max_new_tokens=20, sampling=asked.request.sampling)
    sequence = next(stream).sequence
    while sequence.generated < 15:
        shown = next(stream).token
    seen = 1 + sequence.history[2:].index(shown)
    assert sequence.generated > seen
    session.cancel(sequence)
    assert list(sequence.tokens) == known([asked], seen)[asked.prompt, 0]
    assert len(sequence.logprobs) == len(sequence.top_logprobs) == seen
    assert sequence.stats.generated_tokens == session.stats.generated_tokens == seen
    assert [event.finish_reason for event in stream] == ["cancelled"]


def test_a_drafter_that_proposes_too_much_is_refused() -> None:
    @dataclass
    class Endless:
        def draft(self, sequence: ServedSequence, most: int) -> list[int]:
            return [0] * (most + 1)

    session = session_of(serving_program(rows=32), drafter=Endless())
    session.submit([1], max_new_tokens=5)
    with pytest.raises(ValueError, match="draft: expected at most 4 tokens, found 5"):
        session.step()


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_step_leaves_nothing_of_its_drafts(kind: str) -> None:
    asked = [Asked((n, 7), Request(12, replace(SAMPLINGS[n % 6], seed=n))) for n in range(5)]
    program = serving_program(rows=32, max_sequences=3, pages=12, page_size=2)
    expected, _ = serve(session_of(program), asked)
    for fail_at in (1, 3, 4):
        driver = FakeDriver(fail_at=fail_at, failure=KeyboardInterrupt())
        drafter = OracleDrafter(kind, known(asked, 40), VOCAB, fail_at)
        session = session_of(program, driver, drafter=drafter)
        sequences = [session.requests([a.prompt], a.request)[0] for a in asked]
        for sequence in sequences:
            session._enqueue([sequence])
        for _ in range(fail_at):
            session.step()
        with pytest.raises(KeyboardInterrupt):
            session.step()
        driver.fail_at = None
        while not session.idle:
            session.step()
            check_pages(session)
        assert [s.tokens for s in sequences] == [s.tokens for s in expected]


# ---- whole models on the CPU

SEQUENCES, LENGTH, PAGE, ROWS = 3, 48, 8, 20
MODELS = ("llama", "gemma2", "gpt_oss", "deepseek_v3")
CPU_SAMPLINGS = (
    Sampling(seed=1),
    Sampling(temperature=1.0, seed=2),
    Sampling(repetition_penalty=1.5, seed=3),
    Sampling(temperature=0.75, top_k=40, top_p=0.9, min_p=0.02, seed=4),
    Sampling(temperature=1.25, repetition_penalty=1.25, top_p=0.8, seed=5),
)


@cache
def lowered(name: str, sample: bool, buckets: str) -> Lowered:
    """A tiny model with entries of more rows than sequences: one of them, or interpreted."""
    imported = import_hugging_face(tiny_model(name), dtype=None, max_tokens=LENGTH)
    passes = causal_lm(max_sequences=SEQUENCES, max_tokens_per_sequence=LENGTH, sample=sample)
    small = [replace(p, page_size=PAGE) if isinstance(p, InsertKvCache) else p for p in passes]
    graph = run_pipeline(imported.graph, small)[-1].graph
    meta = {
        "vocab_size": graph.outputs[0].type.shape[-1],
        "page_size": PAGE,
        "max_sequences": SEQUENCES,
        "max_tokens_per_sequence": LENGTH,
        "pages": SEQUENCES * LENGTH // PAGE,
    }
    bindings = serving_bindings(SEQUENCES, LENGTH, 32, rows=ROWS)
    backend = ReferenceBackend() if buckets == "one bucket" else None
    bindings = bindings[-1:] if backend else bindings
    outputs = output_names(graph)
    return lower(graph, imported.weights, CPU, bindings, outputs, meta, backend=backend)


def asked_of_models() -> list[Asked]:
    """More sequences than slots, with all ways to sample, to end and to be cancelled."""
    lengths = (5, 1, 12, 6, 2, 23, 9, 16)
    prompts = [tuple((7 * n + 11 * i + 3) % 128 for i in range(n)) for n in lengths]
    return [
        Asked(
            prompt,
            Request(
                max_new_tokens=(30, 17, 40, 9)[i % 4],
                sampling=CPU_SAMPLINGS[i % 5],
                stop_tokens=frozenset(range(8 * i, 8 * i + 8)),
                top_logprobs=(0, 3, 25)[i % 3],
            ),
            cancel=6 if i in (2, 5) else None,
        )
        for i, prompt in enumerate(prompts)
    ]


def cases() -> list[Any]:
    """Every model, sampled by the host and by the device; two of them are quick enough."""
    quick = {("llama", "host", "interpreted"), ("deepseek_v3", "device", "one bucket")}
    return [
        pytest.param(*case, marks=() if case in quick else pytest.mark.slow)
        for case in product(MODELS, ("host", "device"), ("one bucket", "interpreted"))
    ]


@pytest.mark.parametrize(("name", "by", "buckets"), cases())
def test_a_model_on_the_cpu(name: str, by: str, buckets: str) -> None:
    """To the bit where one bucket computes everything; else sums round by their batch."""
    made = lowered(name, by == "device", buckets)

    def opened(pages: int, drafter: Drafter | None = None) -> Session:
        driver = PlannedDriver() if buckets == "one bucket" else CpuDriver()
        executable = driver.load(made.program, made.load_weight)
        return Session(made.program, executable, pages=pages, drafter=drafter)

    asked = asked_of_models()
    endless = [
        Asked(a.prompt, replace(a.request, max_new_tokens=LENGTH, stop_tokens=frozenset()))
        for a in asked
    ]
    longest, _ = serve(opened(18), endless)
    coming = {(a.prompt, a.seed): s.tokens for a, s in zip(asked, longest, strict=True)}
    for pages in (18, 6):
        expected, stats = serve(opened(pages), asked)
        assert (stats.preemptions > 0) == (pages == 6)
        assert {s.finish_reason for s in expected} >= {"length", "cancelled"}
        for kind in KINDS:
            drafter = OracleDrafter(kind, coming, 128, seed=pages)
            found, faster = serve(opened(pages, drafter), asked)
            if buckets == "one bucket":
                assert found == expected
            for a, b in zip(expected, found, strict=True):
                assert_close(a, b)
            assert drafter.drafted > 50
            assert faster.steps < stats.steps or kind == "wrong"


def assert_close(expected: Served, found: Served) -> None:
    """The same, but for the rounding of sums that other batches bring."""
    assert found.tokens == expected.tokens
    assert (found.finish_reason, found.message) == (expected.finish_reason, expected.message)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    for ours, theirs in zip(found.top_logprobs, expected.top_logprobs, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        np.testing.assert_allclose([p for _, p in ours], [p for _, p in theirs], atol=1e-5)
    assert [(e[0], e[3], e[4]) for e in found.events] == [
        (e[0], e[3], e[4]) for e in expected.events
    ]
    assert found.generated_tokens == expected.generated_tokens
