"""Programs that draft themselves: nothing changes but the number of steps.

Sequences get the tokens, log-probabilities, ends and free pages that the same program gives them
without its drafts, with more sequences than slots, preemption, cancellation and all ways to sample.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ingot
import numpy as np
import pytest
from draft_models import write_pair
from drafting_programs import SWEPT
from fake_device import serving_program
from ingot.codegen.lower import Lowered, lower, serving_bindings
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.target import CPU
from ingot.frontends.draft_model import with_draft_model
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.passes.pipelines import causal_lm
from ingot.passes.serving.insert_kv_cache import InsertKvCache
from ingot.passes.serving.sample_on_device import output_names
from ingot.runtime.program import STEP
from ingot.runtime.serving.abi import ServingAbi
from ingot.runtime.serving.batch import Chunk, Row
from ingot.runtime.serving.device_drafts import DeviceDrafter, following, room
from ingot.runtime.serving.kv_cache import KVCache
from ingot.runtime.serving.sampling import Sampling
from ingot.runtime.serving.sequence import Request, Sequence
from ingot.runtime.serving.session import Session
from msgspec.structs import replace as replace_struct
from mtp_checkpoints import write_mtp
from planned import PlannedDriver, ReferenceBackend

VOCAB, SEQUENCES, LENGTH, PAGE = 8, 3, 48, 8
SAMPLINGS = (
    Sampling(seed=1),
    Sampling(temperature=1.0, seed=2),
    Sampling(repetition_penalty=1.5, seed=3),
    Sampling(temperature=0.75, top_k=4, top_p=0.9, min_p=0.02, seed=4),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("drafting")
    write_mtp(made, "deepseek_v3", seed=1, vocab_size=VOCAB)
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model and of one that drafts for it."""
    made = tmp_path_factory.mktemp("pair")
    write_pair(made, "llama", "llama", spread=0.3, vocab_size=VOCAB)
    return made


def with_model(folder: Path) -> HuggingFaceModel:
    model = import_hugging_face(folder / "model", dtype=None, max_tokens=LENGTH)
    options: Any = {"dtype": None, "weightless": False, "allow_unused": False}
    return with_draft_model(model, folder / "draft", None, **options)


@cache
def lowered(directory: Path, tokens: int, layer: bool = True) -> Lowered:
    """One bucket, planned as for a GPU: sums do not depend on the batch. What drafts is a `layer`
    of the model at `directory`, or else a model in that folder."""
    if layer:
        imported = import_hugging_face(
            directory, dtype=None, max_tokens=LENGTH, predict=ingot.MTP()
        )
    else:
        imported = with_model(directory)
    passes = causal_lm(max_sequences=SEQUENCES, max_tokens_per_sequence=LENGTH, draft=tokens)
    small = [replace(p, page_size=PAGE) if isinstance(p, InsertKvCache) else p for p in passes]
    graph = run_pipeline(imported.graph, small)[-1].graph
    meta = {
        "vocab_size": VOCAB,
        "page_size": PAGE,
        "max_sequences": SEQUENCES,
        "max_tokens_per_sequence": LENGTH,
        "pages": SEQUENCES * LENGTH // PAGE,
    }
    bindings = serving_bindings(SEQUENCES, LENGTH, 32, rows=SEQUENCES * (tokens + 1))[-1:]
    outputs = output_names(graph)
    backend = ReferenceBackend()
    return lower(graph, imported.weights, CPU, bindings, outputs, meta, backend=backend)


def asked() -> list[tuple[list[int], Request, int | None]]:
    """Prompts, what is asked of them, and after how many events they are cancelled."""
    lengths = (5, 1, 12, 6, 2, 23, 9, 16)
    return [
        (
            [(3 * n + 5 * i + j) % VOCAB for j in range(n)],
            Request(
                max_new_tokens=(30, 17, 40, 9)[i % 4],
                sampling=SAMPLINGS[i % 4],
                stop_tokens=frozenset({7} if i % 3 == 1 else ()),
                top_logprobs=(0, 3)[i % 2],
            ),
            6 if i in (2, 5) else None,
        )
        for i, n in enumerate(lengths)
    ]


def serve(session: Session) -> tuple[list[Any], Any]:
    """All that callers see of what is asked, and the figures of the session."""
    given = asked()
    sequences = [session.requests([prompt], request)[0] for prompt, request, _ in given]
    seen = dict.fromkeys(sequences, 0)
    for event in session.events(list(sequences)):
        seen[event.sequence] += 1
        cancel = given[sequences.index(event.sequence)][2]
        if seen[event.sequence] == cancel and event.finish_reason is None:
            session.cancel(event.sequence)
        for running in session._scheduler.running:
            assert running.slot is not None
            pages = len(session._cache.pages_of(running.slot))
            ahead = len(session._steps.under_way)
            assert pages <= session._cache.pages_for(running.length + ahead)
    cached = session._cache
    assert (cached.free_pages, cached.free_slots) == (cached.pages, cached.slots)
    assert not session._scheduler._reached
    stats = session.stats
    session.close()
    return [
        (s.tokens, s.logprobs, s.top_logprobs, s.finish_reason, s.message) for s in sequences
    ], stats


# Pages for all that is asked at once, and so few that sequences are preempted.
CASES = [
    pytest.param(
        tokens,
        pages,
        marks=() if (tokens, pages) == (2, 6) else SWEPT,
    )
    for tokens in (1, 2, 4)
    for pages in (18, 6)
]


@pytest.mark.parametrize("layer", [True, False], ids=["layer", "model"])
@pytest.mark.parametrize(("tokens", "pages"), CASES)
def test_nothing_changes(directory: Path, pair: Path, tokens: int, pages: int, layer: bool) -> None:
    made = lowered(directory if layer else pair, tokens, layer)

    def opened(**options: Any) -> Session:
        executable = PlannedDriver().load(made.program, made.load_weight)
        return Session(made.program, executable, pages=pages, **options)

    expected, plain = serve(opened())
    assert (plain.preemptions > 0) == (pages == 6)
    assert {s[3] for s in expected} >= {"length", "cancelled"}
    for adapt in (False, True):
        found, stats = serve(opened(drafter=DeviceDrafter(tokens), adapt=adapt))
        assert found == expected
        assert adapt or (stats.steps < plain.steps and sum(stats.accepted) > 2)


def test_what_the_host_says_of_a_step() -> None:
    cache = KVCache(pages=4, page_size=4, slots=2, tokens_per_slot=10)
    sequence = Sequence(1, (5, 6, 7, 8), Request(max_new_tokens=9), 0)
    sequence.slot = cache.open()
    cache.resize(sequence.slot, 7)
    part, whole = Chunk(sequence, 0, (5, 6)), Chunk(sequence, 2, (7, 8, 3))
    assert following([part, whole], 7).tolist() == [6, 7, 8, -1, -1, -1, -1]
    rows = [Row(whole, 1), Row(whole, 2)]
    assert room(rows, 3, cache).tolist() == [4, 3, 0]
    cache.resize(sequence.slot, 10)  # three pages, of which two positions are beyond the limit
    assert room(rows, 2, cache).tolist() == [6, 5]


def test_a_draft_is_of_one_length() -> None:
    sequence = Sequence(1, (5, 6), Request(max_new_tokens=9), 0)
    drafter = DeviceDrafter(2)
    assert drafter.draft(sequence, 4) == []
    drafter.note(sequence, np.array([3, 4, 5]).tolist())
    assert drafter.draft(sequence, 4) == [3, 4]
    assert drafter.draft(sequence, 1) == [3]
    sequence.history.append(3)
    assert drafter.draft(sequence, 4) == []


def test_refuses_a_program_that_does_not_draft_so_many(directory: Path) -> None:
    made = lowered(directory, 1)
    abi = ServingAbi(made.program)
    assert (abi.drafts, abi.follows, abi.reach) == (1, True, 0)
    executable = PlannedDriver().load(made.program, made.load_weight)
    with pytest.raises(ValueError, match="expected a program that drafts 2 tokens .* drafts 1"):
        Session(made.program, executable, drafter=DeviceDrafter(2))
    abi = ServingAbi(serving_program())
    assert (abi.drafts, abi.follows, abi.reach) == (0, False, 0)


def test_what_a_program_with_a_model_takes(pair: Path) -> None:
    """Room behind every row, for as many tokens as it drafts; none that follow."""
    program = lowered(pair, 2, False).program
    abi = ServingAbi(program)
    assert (abi.drafts, abi.follows, abi.reach) == (2, False, 2)
    step = program.functions[STEP]
    assert "following" not in step.inputs
    inputs = {name: spec for name, spec in step.inputs.items() if name != "room"}
    functions = {STEP: replace_struct(step, inputs=inputs)}
    with pytest.raises(ValueError, match="expected inputs .*room i32.*, found"):
        ServingAbi(replace_struct(program, functions=functions))
