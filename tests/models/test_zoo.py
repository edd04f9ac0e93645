"""Every causal language model type of transformers: right or refused, as docs/coverage.md says.

The table is renewed with `python examples/bench/zoo.py NAME --markdown docs/coverage.md`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ingot.codegen.lower import lower
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.target import target_of
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.pipelines import causal_lm
from ingot.passes.serving.sample_on_device import output_names
from interpreted import InterpretedBackend
from pass_checks import for_target
from tiny_configs import MAX_LAYERS, WINDOW
from transformers import AutoConfig, PreTrainedModel
from zoo import (
    MAX_PARAMETERS,
    MAX_TOKENS,
    NEW_TOKENS,
    NOT_BUILT,
    REFUSED,
    RIGHT,
    UNCLEAR,
    WRONG,
    Attempt,
    Verdict,
    attempt,
    isolated,
    judge,
    reference,
    rows_of,
    with_rows,
)
from zoo_models import TYPES, config_of, random_model

COVERAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
TABLE = COVERAGE.read_text(encoding="utf-8")
ROWS = rows_of(TABLE)


def _sampled(names: Iterable[str], every: int) -> list[Any]:
    """All names as slow cases, of which those that are not one of `every` are for the sweep."""
    return [
        pytest.param(name, marks=[pytest.mark.slow, *([pytest.mark.sweep] if i % every else [])])
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize("name", _sampled(TYPES, every=16))
def test_right_or_refused(name: str) -> None:
    """Each type has the verdict of the table."""
    found = isolated(name)
    expected, _ = ROWS.get(name, (found.verdict, ""))
    assert found.verdict == expected, f"renew the row in docs/coverage.md: {found}"
    assert found.verdict not in (UNCLEAR, WRONG), found


def test_no_type_is_wrong_or_unclear() -> None:
    assert not {UNCLEAR, WRONG} & {verdict for verdict, _ in ROWS.values()}


_RIGHT = [name for name, (verdict, _) in ROWS.items() if verdict == RIGHT]


@pytest.mark.parametrize("name", _sampled(_RIGHT, every=16))
def test_what_is_right_has_kernels_on_gpus(name: str) -> None:
    model = random_model(name, MAX_PARAMETERS).to(torch.bfloat16)
    made = import_hugging_face(model, dtype=None, max_tokens=MAX_TOKENS)
    passes = causal_lm(max_sequences=2, max_tokens_per_sequence=made.max_tokens, sample=True)
    graph = run_pipeline(made.graph, passes)[-1].graph
    backend = InterpretedBackend(target_of("cuda:sm_90"))
    lowered = lower(
        for_target(graph, backend.target),
        made.weights,
        backend.target,
        [{"T": 1, "L": 1}, {"T": 64, "L": 2}],
        output_names(graph),
        backend=backend,
    )
    assert all(entry.launches for entry in lowered.program.entries)


def test_the_table_has_every_type() -> None:
    if f"transformers {transformers.__version__}" not in TABLE:
        pytest.skip(f"the table is of another version than {transformers.__version__}")
    assert set(ROWS) == set(TYPES)


# ---- the sweep itself sees what is wrong


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model("qwen3, windows", MAX_PARAMETERS)


def test_right_in_both_ways() -> None:
    found = isolated("qwen3, windows")
    assert (found.memory, found.directory) == (RIGHT, RIGHT), found


def test_another_weight_is_wrong(model: PreTrainedModel) -> None:
    expected = reference(model)
    norm = model.model.layers[1].self_attn.k_norm.weight
    with torch.no_grad():
        norm[3] *= 1.5
        found = attempt(model, model, expected)
        norm[3] /= 1.5
    assert found.verdict == WRONG
    assert found.error is not None and found.error > 1e-3


def test_another_window_is_wrong(model: PreTrainedModel, tmp_path: Path) -> None:
    """The prompt is long enough to see a window of another length."""
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text(encoding="utf-8")
    assert f'"sliding_window": {WINDOW}' in text
    config.write_text(text.replace(f'"sliding_window": {WINDOW}', '"sliding_window": 36'), "utf-8")
    assert attempt(tmp_path, model, reference(model)).verdict == WRONG


def test_a_cache_of_transformers_that_differs_is_told(model: PreTrainedModel) -> None:
    expected = reference(model)
    tokens = [*expected.tokens[:-1], (expected.tokens[-1] + 1) % 90]
    found = attempt(model, model, type(expected)(expected.prompt, expected.logits, tokens))
    assert found.verdict == RIGHT and found.reason.endswith(
        f"another token at step {NEW_TOKENS - 1}"
    )


def test_errors_are_told_apart(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = reference(model)
    refused = attempt(tmp_path, model, expected)
    assert refused == Attempt(
        REFUSED, "SourceError: DIR: expected a directory with config.json, found none"
    )
    assert attempt(3, model, expected).verdict == UNCLEAR


def _end(name: str) -> Verdict:
    os.kill(os.getpid(), signal.SIGKILL)
    return Verdict(name, RIGHT)


def _wait(name: str) -> Verdict:
    time.sleep(60)
    return Verdict(name, RIGHT)


def test_a_process_that_ends_is_unclear() -> None:
    assert "SIGKILL" in isolated("llama", _end).reason
    found = isolated("llama", _wait, seconds=1)
    assert found.verdict == UNCLEAR and "1 seconds" in found.reason


def test_what_transformers_cannot_make_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.MAX_PARAMETERS", 1000)
    found = judge("llama")
    assert found.verdict == NOT_BUILT and "million parameters" in found.reason


def test_rows_join_a_table() -> None:
    text = with_rows("# Title\n", [Verdict("b", RIGHT), Verdict("a", REFUSED, "x | y")])
    again = with_rows(text, [Verdict("b", WRONG, "off by *one*")])
    assert again.startswith("# Title\n\nCounts: 0 right, 1 refused, 0 unclear, 1 WRONG,")
    assert rows_of(again) == {"a": (REFUSED, "x / y"), "b": (WRONG, "off by \\*one\\*")}
    assert with_rows(again, []) == again


@pytest.mark.parametrize("name", ["gemma3_text", "glm4_moe", "gemma3n_text", "deepseek_v4"])
def test_a_tiny_configuration_has_every_kind_of_layer(name: str) -> None:
    default, tiny = AutoConfig.for_model(name), config_of(name)
    assert 2 <= tiny.num_hidden_layers <= 2 * MAX_LAYERS
    for kinds in ("layer_types", "mlp_layer_types"):
        if getattr(default, kinds, None):
            assert {*getattr(tiny, kinds)} == {*getattr(default, kinds)}
            assert len(getattr(tiny, kinds)) == tiny.num_hidden_layers
