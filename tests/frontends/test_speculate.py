"""Speculation as its users meet it: the same completions, in fewer steps, with figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ingot
import numpy as np
import pytest
import torch
from ingot.codegen.lower import serving_bindings
from ingot.frontends import speculate
from ingot.frontends.cli.main import app
from ingot.frontends.cli.report import report_data
from ingot.frontends.speculate import rows
from ingot.frontends.text.completion import Completion
from ingot.runtime.artifact.reader import open_ingot
from ingot.runtime.serving.session import Session
from tiny_ingot import edit
from tiny_models import tiny_model
from tiny_tokenizers import byte_level
from tiny_tokenizers import save as save_tokenizer
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("shared_traces")

OPTIONS: dict[str, Any] = {
    "max_sequences": 2,
    "max_tokens_per_sequence": 160,
    "progress": False,
    "check_import": False,
}
PROMPT = "abcabcabcabc"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama that soon repeats itself, with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    tiny_model("llama", vocab_size=320).save_pretrained(path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return save_tokenizer(path, byte_level(), tokenizer_config=config)


@pytest.fixture(scope="module")
def plain(directory: Path) -> Any:
    return ingot.compile(directory, **OPTIONS)


@pytest.fixture
def drafting(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that verifies all that is drafted, whatever its steps take here."""
    monkeypatch.setattr(speculate, "Session", _session)
    return ingot.compile(directory, speculate=ingot.NGram(k=4, min_match=1), **OPTIONS)


def _session(*given: Any, **options: Any) -> Session:
    session = Session(*given, **options)
    session._scheduler._adaptive = None
    return session


def same(found: Completion, expected: Completion) -> None:
    """All but the rounding of sums, which depends on what is batched, and the figures."""
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    for ours, theirs in zip(found.top_logprobs, expected.top_logprobs, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        np.testing.assert_allclose([p for _, p in ours], [p for _, p in theirs], atol=1e-4)
    equal: dict[str, Any] = {"logprobs": (), "top_logprobs": (), "stats": None}
    assert replace(found, **equal) == replace(expected, **equal)
    assert found.stats.generated_tokens == expected.stats.generated_tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": 3},
        {"temperature": 0.7, "seed": 3, "logprobs": 2},
        {"temperature": 1.0, "seed": 8, "top_k": 3, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_completions_are_those_without(plain: Any, drafting: Any, options: dict[str, Any]) -> None:
    prompts = [PROMPT, "xyz xyz xyz xyz"]
    expected = plain.generate(prompts, max_new_tokens=60, **options)
    found = drafting.generate(prompts, max_new_tokens=60, **options)
    for ours, theirs in zip(found, expected, strict=True):
        same(ours, theirs)
    assert any(completion.stats.verified_tokens for completion in found)
    if "temperature" not in options:
        assert found[0].stats.steps < 40 < expected[0].stats.steps


def test_every_way_to_end_within_a_run(plain: Any, drafting: Any) -> None:
    """Lengths, tokens and texts that end a completion, at every place of what a step accepts."""
    whole = plain.generate(PROMPT, max_new_tokens=48)
    ends: list[dict[str, Any]] = [{"max_new_tokens": count} for count in range(30, 38)]
    ends += [{"max_new_tokens": 48, "stop": [token]} for token in sorted({*whole.tokens[-8:]})]
    text = whole.text
    ends += [
        {"max_new_tokens": 48, "stop": text[at : at + size]}
        for at in range(len(text) // 2, len(text) // 2 + 6)
        for size in (1, 3)
    ]
    inside = 0
    for options in ends:
        expected, found = (model.generate(PROMPT, **options) for model in (plain, drafting))
        same(found, expected)
        streamed = [*drafting.generate(PROMPT, stream=True, **options)]
        assert "".join(event.text for event in streamed) == expected.text
        assert streamed[-1].finish_reason == expected.finish_reason
        stats = found.stats
        inside += stats.verified_tokens > 0 and stats.steps < expected.stats.steps
    assert inside > len(ends) / 2


def test_the_last_event_of_a_stream_has_figures(drafting: Any) -> None:
    events = [*drafting.generate(PROMPT, max_new_tokens=48, stream=True)]
    assert all(event.stats is None for event in events[:-1])
    stats = events[-1].stats
    assert stats.acceptance_length > 1.5 and len(stats.acceptance_rates) == 4
    assert stats.verify_seconds > stats.draft_seconds > 0


def test_the_report_has_the_decision(directory: Path, plain: Any) -> None:
    model = ingot.compile(directory, speculate="ngram", **OPTIONS)
    assert model.report.speculation.decision == "nothing to decide yet"
    model.generate(PROMPT, max_new_tokens=60)
    report = model.report
    found = report.speculation
    assert found.kind == "ngram:4:2" and found.verified + found.declined > 0
    assert found.decision.startswith(("on: ", "off: "))
    assert "speculation ngram:4:2: o" in str(report)
    shown = json.loads(json.dumps(report_data(model)))["speculation"]
    assert shown["kind"] == "ngram:4:2" and shown["verified"] == found.verified
    assert plain.report.speculation is None and report_data(plain)["speculation"] is None


def test_an_ingot_records_how_it_drafts(directory: Path, tmp_path: Path) -> None:
    ingot.compile_to(directory, tmp_path / "drafts", speculate="ngram:3", **OPTIONS)
    assert open_ingot(tmp_path / "drafts").manifest.options["speculate"] == "ngram:3:2"
    assert str(ingot.load(tmp_path / "drafts").session.drafter) == "ngram:3:2"
    assert ingot.load(tmp_path / "drafts", speculate="none").speculation is None
    other = ingot.load(tmp_path / "drafts", speculate=ingot.NGram(2, min_match=5))
    assert other.speculation.kind == "ngram:2:5"
    other.generate(PROMPT, max_new_tokens=20)
    # Two sequences with a row each and three drafted tokens: as many rows as NGram(k=7) needs.
    assert ingot.load(tmp_path / "drafts", speculate="ngram:7").speculation
    with pytest.raises(ValueError, match="needs 9 results a step, and this program gives 8"):
        ingot.load(tmp_path / "drafts", speculate="ngram:8")
    with pytest.raises(ValueError, match="'none' or None, found 'nonsense'"):
        ingot.load(tmp_path / "drafts", speculate="nonsense")


@pytest.mark.parametrize("recorded", ["ngram:0", "mtp", 7, {"k": 4}])
def test_an_ingot_that_records_nonsense_is_refused(
    directory: Path, tmp_path: Path, recorded: Any
) -> None:
    ingot.compile_to(directory, tmp_path / "it", **OPTIONS)
    edit(tmp_path / "it", "manifest.json", lambda m: m["options"].update(speculate=recorded))
    with pytest.raises(ingot.IngotError, match=r"manifest\.json: options: speculate"):
        ingot.load(tmp_path / "it")
    assert ingot.load(tmp_path / "it", speculate="none").speculation is None


def test_rows_of_entries() -> None:
    """A row for each drafted token, in entries as many as without."""
    four = ingot.NGram(k=4)
    assert [rows(None, 8), rows(four, 1), rows(four, 8)] == [8, 5, 40]
    assert [rows(four, 100), rows(four, 300)] == [256, 300]
    without, drafting = (serving_bindings(8, 4096, rows=rows(s, 8)) for s in (None, four))
    assert [b["T"] for b in drafting] == [b["T"] for b in without]
    assert [b["L"] for b in drafting] == [1, 2, 4, 8, 16, 32, 40, 40, 40, 40, 40, 40]


def test_a_model_in_memory_does_not_draft() -> None:
    with pytest.raises(TypeError, match="the path of a model that drafts, found a Llama"):
        ingot.Draft(tiny_model("llama"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the path of a model that drafts, found a bytes"):
        ingot.Draft(b"there")  # type: ignore[arg-type]


def test_a_module_drafts_nothing() -> None:
    with pytest.raises(ValueError, match="speculate: a module has no tokens"):
        ingot.compile(torch.nn.Linear(2, 2), example_inputs=(torch.ones(2),), speculate="ngram")


def test_on_the_command_line(
    directory: Path, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(source: Path, *more: str) -> Any:
        flags = ("--prompt", PROMPT, "--max-new-tokens", "40", "--max-tokens", "160", *more)
        kept = flags if source == directory else (*flags[:4], *more)
        return CliRunner().invoke(app, ["run", str(source), *kept])

    monkeypatch.setattr(speculate, "Session", _session)
    expected = plain.generate(PROMPT, max_new_tokens=40)
    result = run(directory, "--speculate", "ngram:4:1")
    assert result.stdout == expected.text + "\n"
    assert "tokens in each of" in result.stderr and "as fast as without drafts" in result.stderr
    found = json.loads(run(directory, "--speculate", "ngram:4:1", "--json").stdout)
    assert found["stats"]["acceptance_length"] > 1 and found["stats"]["verified_steps"] > 3
    assert tuple(found["tokens"]) == expected.tokens
    wrong = run(directory, "--speculate", "ngrams")
    assert wrong.exit_code == 2 and "speculate: expected an NGram" in wrong.stderr

    ingot.compile_to(directory, tmp_path / "it", speculate="ngram:4:1", **OPTIONS)
    told = {
        flags: "tokens in each of" in run(tmp_path / "it", *flags).stderr
        for flags in ((), ("--speculate", "ngram:2:1"), ("--speculate", "none"))
    }
    assert [*told.values()] == [True, True, False]
