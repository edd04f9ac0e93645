"""A smaller model that drafts, from two checkpoints to tokens.

The reference for what is drafted is transformers: the smaller model's own greedy continuation,
computed anew at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ingot
import pytest
import torch
from draft_models import write_pair
from drafting_programs import (
    LENGTH,
    NEW,
    PROMPTS,
    SWEPT,
    VOCAB,
    Recorded,
    drafting_program,
    opened,
)
from ingot.codegen.lower import Lowered
from ingot.frontends.draft_model import with_draft_model
from ingot.frontends.importers.huggingface import HuggingFaceModel, import_hugging_face
from ingot.frontends.loading import LoadedModel
from ingot.runtime.artifact.reader import open_ingot
from ingot.runtime.serving.adaptive import Adaptive
from ingot.runtime.serving.device_drafts import DeviceDrafter
from ingot.runtime.serving.sampling import Sampling
from ingot.runtime.serving.sequence import Sequence
from ingot.runtime.serving.session import Session
from ingot.runtime.serving.steps import Steps
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("shared_traces")

# Of two kinds, or of one, where the second has weights like the first's.
PAIRS = {
    "llama": ("llama", "llama", 0.3),
    "qwen3_moe": ("qwen3_moe", "qwen3", 0.0),
    "deepseek_v3": ("deepseek_v3", "llama", 0.0),
    "gemma3": ("gemma3_text", "gemma3_text", 0.3),
}
QUANTIZED = Path(__file__).parents[1] / "fixtures" / "quantized"
every_pair = pytest.mark.parametrize(
    "pair",
    [p if p == "llama" else pytest.param(p, marks=SWEPT) for p in PAIRS],
    indirect=True,
)


@dataclass(frozen=True)
class Pair:
    """Where the model and the one that drafts are."""

    model: Path
    draft: Path


@cache
def written(folder: Path, name: str) -> Pair:
    model, draft, spread = PAIRS[name]
    return Pair(*write_pair(folder / name, model, draft, spread=spread, vocab_size=VOCAB))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture
def pair(folder: Path, request: pytest.FixtureRequest) -> Pair:
    return written(folder, getattr(request, "param", "llama"))


@cache
def imported(directory: Path) -> HuggingFaceModel:
    return import_hugging_face(directory, dtype=None, max_tokens=LENGTH)


def merged(pair: Pair) -> HuggingFaceModel:
    return with_draft_model(
        imported(pair.model), pair.draft, None, dtype=None, weightless=False, allow_unused=False
    )


@cache
def built(pair: Pair, tokens: int, group: int = 0) -> tuple[Lowered, set[str]]:
    """With `group` the weights are in MXFP4; see drafting_program."""
    return drafting_program(merged(pair) if tokens else imported(pair.model), tokens, group)


def program(pair: Pair, tokens: int, group: int = 0) -> Lowered:
    return built(pair, tokens, group)[0]


def tokens_of(session: Session, **asked: Any) -> list[Any]:
    with session:
        found = session.generate(PROMPTS, max_new_tokens=NEW, **asked)
        return [(s.tokens, s.finish_reason) for s in found]


@torch.no_grad()
def greedy(model: Any, history: list[int], count: int) -> list[int]:
    """`count` tokens behind `history`, each by the whole of it anew."""
    made = list(history)
    for _ in range(count):
        made.append(int(model(torch.tensor([made])).logits[0, -1].argmax()))
    return made[len(history) :]


@every_pair
@pytest.mark.parametrize("tokens", [pytest.param(1, marks=SWEPT), 4])
def test_drafts_are_the_smaller_model_s_own(pair: Pair, tokens: int) -> None:
    """Every draft, right or wrong before it, is what the model alone goes on with."""
    model = AutoModelForCausalLM.from_pretrained(pair.draft, attn_implementation="eager").eval()
    drafter = Recorded(tokens)
    with opened(program(pair, tokens), drafter) as session:
        session.generate(PROMPTS, max_new_tokens=NEW)
        stats = session.stats
    assert len(drafter.drafted) > 20
    for sequence, length, drafted in drafter.drafted:
        assert drafted == greedy(model, sequence.history[:length], len(drafted))
    # Drafts were right and wrong, so that the cache was filled after both.
    assert 0 < sum(stats.accepted) < sum(stats.drafted)


@every_pair
@pytest.mark.parametrize(
    "tokens", [pytest.param(k, marks=() if k == 3 else SWEPT) for k in (1, 2, 3, 4)]
)
def test_tokens_are_those_without_it(pair: Pair, tokens: int) -> None:
    sampled = {"sampling": Sampling(temperature=0.8, top_k=5, repetition_penalty=1.1, seed=4)}
    for asked in ({}, sampled, {"stop_tokens": frozenset({3})}):
        assert tokens_of(opened(program(pair, tokens)), **asked) == tokens_of(
            opened(program(pair, 0)), **asked
        )


@every_pair
@pytest.mark.parametrize("tokens", [pytest.param(1, marks=SWEPT), 4])
def test_a_model_that_drafts_for_itself_is_always_right(pair: Pair, tokens: int) -> None:
    own = Pair(pair.model, pair.model)
    with opened(program(own, tokens)) as session:
        (found,) = session.generate(PROMPTS[:1], max_new_tokens=NEW)
        stats = session.stats
    assert stats.accepted == stats.drafted
    # The first step gives a token, each other one more than is drafted.
    assert found.stats.steps == 1 + -(-(NEW - 1) // (tokens + 1))


@pytest.mark.parametrize("stored", ["ct_mxfp4", "ct_int4"])
def test_a_checkpoint_that_is_quantized_drafts(stored: str) -> None:
    """As it is stored, kept packed or dequantized: what it says of itself is always right."""
    own = Pair(QUANTIZED / stored, QUANTIZED / stored)
    expected = tokens_of(opened(program(own, 0)))
    with opened(program(own, 3)) as session:
        found = session.generate(PROMPTS, max_new_tokens=NEW)
        stats = session.stats
    assert [(s.tokens, s.finish_reason) for s in found] == expected
    assert stats.accepted == stats.drafted and stats.drafted[2] > 5
    held = merged(own).weights
    codes = [name for name in held if name.startswith("draft.") and name.endswith(".codes")]
    assert bool(codes) == (stored == "ct_mxfp4")


def test_steps_that_feed_themselves_fill_its_cache(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After many of them a model still drafts for itself without an error."""

    class Late(DeviceDrafter):
        def draft(self, sequence: Sequence, most: int) -> list[int]:
            return super().draft(sequence, most) if sequence.generated >= 15 else []

    class All(Adaptive):
        def __init__(self) -> None: ...

        def choose(
            self, drafts: Mapping[Sequence, list[int]], tokens: int, most: int
        ) -> dict[Sequence, int]:
            return {sequence: len(drafted) for sequence, drafted in drafts.items()}

        def planned(self) -> None: ...

    fed = 0
    feed = Steps.feed

    def counted(self: Steps, *given: Any) -> None:
        nonlocal fed
        fed += 1
        feed(self, *given)

    monkeypatch.setattr(Steps, "feed", counted)
    lowered = program(Pair(pair.model, pair.model), 4)
    with opened(lowered, Late(4), adapt=True) as session:
        session._scheduler._adaptive = All()
        session.generate(PROMPTS[:1], max_new_tokens=NEW)
        stats = session.stats
    assert fed >= 10
    assert stats.accepted == stats.drafted and sum(stats.drafted) > 15


def test_quantized_like_the_model(pair: Pair) -> None:
    """Its weights are packed, and the tokens are those of the quantized model without it."""
    expected = tokens_of(opened(program(pair, 0, 16)))
    lowered, packed = built(pair, 2, 16)
    mine = {n for n in packed if not n.startswith("draft.")}
    assert len(mine) > 10
    assert {n.removeprefix("draft.") for n in packed - mine} == mine
    assert tokens_of(opened(lowered)) == expected


def test_its_weights_are_there_once(pair: Pair) -> None:
    """Drafting more tokens adds no weights, and all of them are counted."""

    def weights(tokens: int) -> int:
        buffers = program(pair, tokens).program.buffers.values()
        return sum(b.nbytes for b in buffers if b.kind == "weight")

    own = sum(int(e.type.nbytes) for e in imported(pair.draft).weights.values())
    assert weights(1) == weights(4)
    assert 0.9 * own < weights(1) - weights(0) <= 1.1 * own


SIZES: dict[str, Any] = {
    "max_sequences": 2,
    "max_tokens_per_sequence": LENGTH,
    "target": "cpu",
    "progress": False,
}


def tokens_by(model: ingot.Model | LoadedModel) -> list[Any]:
    return [s.tokens for s in model.session.generate(PROMPTS, max_new_tokens=NEW)]


def test_through_the_doors(pair: Pair, tmp_path: Path) -> None:
    """Compiled, as an ingot, without it, and by another way to draft: the same tokens."""
    expected = tokens_by(ingot.compile(pair.model, **SIZES))
    draft = tmp_path / "a:b" / "draft"
    draft.parent.mkdir()
    draft.symlink_to(pair.draft)
    model = ingot.compile(pair.model, speculate=ingot.Draft(draft, k=2), **SIZES)
    assert tokens_by(model) == expected
    report = model.report.speculation
    assert report is not None and report.kind == "draft:2" and report.verified > 0
    assert model.report.import_check.startswith("import checked")
    ingot.compile_to(pair.model, tmp_path / "made", speculate=f"draft:2:{draft}", **SIZES)
    draft.unlink()
    assert open_ingot(tmp_path / "made").manifest.options["speculate"] == f"draft:2:{draft}"
    for speculate in (None, "draft:1:anywhere", "ngram:2", "none"):
        assert tokens_by(ingot.load(tmp_path / "made", speculate=speculate)) == expected
    with pytest.raises(ValueError, match="drafts 3 tokens behind each in that way.* 2:"):
        ingot.load(tmp_path / "made", speculate=ingot.Draft(pair.draft, 3))
    with pytest.raises(ValueError, match="in that way, and this one drafts 0: compile"):
        ingot.load(tmp_path / "made", speculate="mtp")


@pytest.mark.slow
def test_over_ranks(pair: Pair) -> None:
    expected = tokens_by(ingot.compile(pair.model, **SIZES))
    drafting = ingot.compile(
        pair.model, speculate=ingot.Draft(pair.draft, k=3), tensor_parallel=2, **SIZES
    )
    assert tokens_by(drafting) == expected
    assert sum(drafting.session.stats.accepted) > 0
