"""Side files of a model directory, from anywhere: read within bounds, refused in one line."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from ingot.frontends.checkpoints.quantization_config import quantization_scheme
from ingot.frontends.checkpoints.safetensors_files import safetensors_files
from ingot.frontends.importers.meta_model import read_config
from ingot.frontends.importers.side_files import json_object, read_file
from ingot.frontends.importers.source_error import SourceError
from ingot.frontends.text.model_tokenizer import open_tokenizer
from tiny_tokenizers import byte_level
from transformers import LlamaConfig


def _scheme(directory: Path) -> object:
    return quantization_scheme(LlamaConfig(), directory)


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": read_config,
    "hf_quant_config.json": _scheme,
    "model.safetensors.index.json": safetensors_files,
    "tokenizer_config.json": open_tokenizer,
    "special_tokens_map.json": open_tokenizer,
    "added_tokens.json": open_tokenizer,
    "generation_config.json": open_tokenizer,
}
HOSTILE = {
    "deep": (b'{"a": ' * 40 + b"1" + b"}" * 40, "expected at most 32 levels of JSON, found more"),
    "deepest": (b"[" * (1 << 20), "expected JSON, found none: "),
    "values": (b"[" + b"0," * (9 << 20) + b"0]", "expected at most 8388608 values of JSON"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "expected JSON, found none: "),
    "list": (b"[]", "expected an object, found list"),
    "bytes": (b"\xff{}", "expected JSON, found none: "),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def refused(name: str, directory: Path) -> str:
    """Why a reader refuses its file; within a second or two, and without memory for all of it."""
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(SourceError) as caught:
            READERS[name](directory)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 4 and peak < 150 << 20
    said = str(caught.value)
    assert said.startswith(f"{directory / name}: ") and "\n" not in said and len(said) < 500
    return said


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_json_is_refused(name: str, case: str, directory: Path) -> None:
    data, expected = HOSTILE[case]
    (directory / name).write_bytes(data)
    assert expected in refused(name, directory)


@pytest.mark.parametrize("name", [*READERS, "tokenizer.json"])
def test_a_file_beyond_all_bounds_is_not_read(name: str, directory: Path) -> None:
    with (directory / name).open("wb") as file:
        file.truncate(1 << 40)
    reader = READERS.get(name, open_tokenizer)
    with pytest.raises(SourceError, match=rf"{name}: expected at most \d+ bytes, found {1 << 40}$"):
        reader(directory)


def test_what_is_no_file_is_not_waited_for(directory: Path) -> None:
    name = "model.safetensors.index.json"
    os.mkfifo(directory / name)
    assert "expected a regular file, found something else" in refused(name, directory)
    with pytest.raises(SourceError, match="expected a regular file"):
        read_file(Path("/dev/zero"))
    with pytest.raises(SourceError, match="nothing: not readable: No such file"):
        read_file(directory / "nothing")


def test_an_index_of_many_names_takes_seconds(tmp_path: Path) -> None:
    count = 200_000  # a second; compared one with all it would take hours
    for files in ((f"{i}.safetensors" for i in range(count)), ["a.safetensors"] * count):
        names = {f"layers.{i}.weight": file for i, file in enumerate(files)}
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": names}), encoding="utf-8")
        start = time.process_time()
        with pytest.raises(SourceError, match="no such file"):
            safetensors_files(tmp_path)
        assert time.process_time() - start < 12


def test_what_transformers_writes_is_read() -> None:
    assert json_object(b'{"a": Infinity, "b": NaN, "a": 1}', "there")["a"] == 1
