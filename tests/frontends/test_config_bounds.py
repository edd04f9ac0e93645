"""Configs that ask for more than a model can have are refused before anything is built."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from ingot.frontends.importers.config_bounds import check_config_file
from ingot.frontends.importers.meta_model import read_config
from ingot.frontends.importers.source_error import SourceError
from transformers import CONFIG_MAPPING

HOSTILE: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**9},
    "layers of GPT-2": {"model_type": "gpt2", "n_layer": 10**9},
    "layers of a part": {"model_type": "llava", "text_config": {"num_hidden_layers": 10**12}},
    "decoder layers": {"decoder_layers": 10**9},
    "negative layers": {"num_hidden_layers": -(10**9)},
    "experts": {"model_type": "mixtral", "num_local_experts": 10**8},
    "layers of experts": {"num_hidden_layers": 2000, "num_experts": 60000},
    "labels": {"num_labels": 10**9},
    "beyond 64 bits": {"vocab_size": 10**30},
}


def _write(directory: Path, config: dict[str, Any]) -> Path:
    text = json.dumps({"model_type": "llama", **config})
    (directory / "config.json").write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize("case", HOSTILE)
def test_counts_are_bounded(tmp_path: Path, case: str) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(SourceError, match="expected at most") as caught:
        read_config(_write(tmp_path, HOSTILE[case]))
    assert "\n" not in str(caught.value) and time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 100_000, "expected JSON"),
        ('{"a": ' * 40 + "1" + "}" * 40, "levels of JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "expected JSON"),
        ("nonsense", "expected JSON"),
    ],
)
def test_text_that_is_no_config_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=expected):
        read_config(tmp_path)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SourceError, match="expected at most 67108864 bytes"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "kind", ["gpt2", "mixtral", "deepseek_v3", "gemma3n_text", "doge", "mamba2"]
)
def test_what_models_ask_for_is_let_through(tmp_path: Path, kind: str) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    check_config_file(tmp_path / "config.json")


def test_numbers_that_are_not_finite_are_let_through(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    check_config_file(tmp_path / "config.json")
