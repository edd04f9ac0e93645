"""What transformers makes of a directory's tokenizer is what Ingot makes, at both of its doors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_ingot
from ingot.frontends.aot import export
from ingot.frontends.importers.source_error import SourceError
from ingot.frontends.text.model_tokenizer import open_tokenizer, tokenizer_files
from ingot.frontends.text.tokenizer import Tokenizer
from ingot.runtime.artifact.reader import open_ingot
from tiny_tokenizers import FAMILIES, TEXTS, byte_fallback, byte_level, save
from transformers import AutoTokenizer

MANY = [*TEXTS, "", " ", "  two  ", "a<s>b</s> <|sep|>c", "don't a\n\n\tb", "é 🙂"]
MESSAGES = [{"role": "user", "content": "Hello"}]
# Each makes normalizer, pre-tokenizer and decoder anew, out of its arguments.
CLASSES = ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "CohereTokenizer"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no prefix": {"add_prefix_space": False},
    "prefix": {"add_prefix_space": True},
    "legacy": {"legacy": True, "add_prefix_space": True},
    "ends": {"add_bos_token": True, "add_eos_token": True},
    "named": {"eos_token": "<|sep|>", "bos_token": {"__type": "AddedToken", "content": "<new>"}},
    "split": {"split_special_tokens": True},
    "lower": {"do_lower_case": True, "errors": "ignore"},
}


def loaded(directory: Path, place: Path) -> Tokenizer:
    """The tokenizer of an ingot that was exported from `directory`."""
    export(tiny_ingot.exportable(files=tokenizer_files(directory)[0]), place / "x.ingot")
    tokenizer = Tokenizer.of(open_ingot(place / "x.ingot").model_files, "ingot")
    assert tokenizer is not None
    return tokenizer


def check_doors(directory: Path, place: Path, wanted: Any) -> None:
    ours = open_tokenizer(directory)
    assert ours is not None
    for tokenizer in (ours, loaded(directory, place)):
        for text in MANY:
            ids = tokenizer.encode(text)
            assert ids == wanted.encode(text)
            assert tokenizer.decode(ids) == wanted.decode(ids, skip_special_tokens=True)
            bare = tokenizer.encode(text, special_tokens=False)
            assert bare == wanted.encode(text, add_special_tokens=False)
        assert tokenizer.eos_token_id == wanted.eos_token_id
        template = tokenizer.chat_template
        assert (template is None) == (wanted.chat_template is None)
        if template is not None:
            assert template.tokens == wanted.special_tokens_map
            said = wanted.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
            assert template.render(MESSAGES) == said


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_classes_that_make_the_backend_anew(kind: str, variant: str, tmp_path: Path) -> None:
    for family in (byte_level, byte_fallback):
        directory = tmp_path / family.__name__
        directory.mkdir()
        config = {"tokenizer_class": kind, **VARIANTS[variant]}
        save(directory, family(), tokenizer_config=config, config={"model_type": "llama"})
        check_doors(directory, directory, AutoTokenizer.from_pretrained(directory))


def test_they_differ_from_the_file(tmp_path: Path) -> None:
    """Else the test above would hold nothing."""
    save(tmp_path, byte_level(), tokenizer_config={"tokenizer_class": "GemmaTokenizer"})
    ours = open_tokenizer(tmp_path)
    assert ours is not None and ours.encode("a b") != byte_level().encode("a b").ids


SIDES: dict[str, dict[str, Any]] = {
    "map": {"special_tokens_map": {"eos_token": "<|sep|>", "image_token": "<img>"}},
    "added": {"added_tokens": {"<tool>": 300, "<img>": 301}},
    "decoder": {
        "tokenizer_config": {"added_tokens_decoder": {"300": {"content": "<tool>"}}},
        "special_tokens_map": {"eos_token": "<|sep|>"},
        "added_tokens": {"<img>": 300},
    },
    "own": {"tokenizer_config": {"boi_token": "<boi>", "extra_special_tokens": {"audio": "<a>"}}},
    "lists": {"tokenizer_config": {"additional_special_tokens": ["<x>"], "eos_token": None}},
    "config": {"config": {"model_type": "llama", "eos_token_id": 3, "bos_token_id": 1}},
    "generation": {"generation_config": {"eos_token_id": [2, 3], "temperature": 0.5}},
}
TEMPLATES: dict[str, dict[str, str]] = {
    "none": {},
    "file": {"chat_template.jinja": "F{{ eos_token }}{{ messages[0].content }}"},
    "more": {
        "chat_template.jinja": "F{{ bos_token }}{{ audio }}",
        "additional_chat_templates/tool_use.jinja": "T{{ tools }}",
        "additional_chat_templates/default.jinja": "D",
    },
}


@pytest.mark.parametrize("templates", TEMPLATES)
@pytest.mark.parametrize("side", SIDES)
def test_both_doors_read_side_files_alike(side: str, templates: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    (directory / "additional_chat_templates").mkdir(parents=True)
    own = SIDES[side].get("tokenizer_config", {})
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", **own}
    config["chat_template"] = "C{{ image_token }}{{ eos_token }}{{ boi_token }}{{ audio }}"
    save(directory, byte_fallback(), **{**SIDES[side], "tokenizer_config": config})
    for name, text in TEMPLATES[templates].items():
        (directory / name).write_text(text, encoding="utf-8")
    check_doors(directory, tmp_path, AutoTokenizer.from_pretrained(directory))


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_files_are_the_same(family: str, tmp_path: Path) -> None:
    """What was written down is read as itself, by transformers too."""
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    save(first, FAMILIES[family](), tokenizer_config={"tokenizer_class": "TokenizersBackend"})
    files = tokenizer_files(first)[0]
    for name, data in files.items():
        (second / name).write_bytes(data)
    again = tokenizer_files(second)[0]
    assert json.loads(again["tokenizer.json"]) == json.loads(files["tokenizer.json"])


# ---- what is refused, and what is told


def test_tokenizers_that_no_file_repeats(tmp_path: Path) -> None:
    save(tmp_path, byte_fallback(), tokenizer_config={"tokenizer_class": "CodeLlamaTokenizer"})
    with pytest.raises(SourceError, match="cannot repeat what a CodeLlamaTokenizer makes: of "):
        open_tokenizer(tmp_path)
    save(tmp_path, byte_fallback(), tokenizer_config={"tokenizer_class": "ByT5Tokenizer"})
    with pytest.raises(SourceError, match="is a ByT5Tokenizer, Python code of transformers"):
        open_tokenizer(tmp_path)
    save(tmp_path, byte_level(), tokenizer_config={"tokenizer_class": "T5Tokenizer"})
    with pytest.raises(SourceError, match="transformers cannot load its tokenizer: .*Sequence"):
        open_tokenizer(tmp_path)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "class of another kind": ({"tokenizer_class": 5}, "transformers cannot load its tokenizer: "),
    "map that is a text": ({"auto_map": "x.Y"}, "transformers cannot load its tokenizer: "),
    "map that is a number": ({"auto_map": 3}, "transformers cannot load its tokenizer: "),
    "token of another kind": ({"eos_token": {"content": [1]}}, "eos_token: expected a token"),
    "flags of another kind": (
        {"added_tokens_decoder": {"1": {"content": "<x>", "lstrip": {}, "more": 1}}},
        "transformers cannot load its tokenizer: ",
    ),
    "arguments of classes": (
        {"init_inputs": ["/dev/zero", 3], "tokenizer_object": "x"},
        "transformers cannot load its tokenizer: ",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_configs_are_refused_in_a_line(case: str, tmp_path: Path) -> None:
    given, words = HOSTILE[case]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **given}
    save(tmp_path, byte_level(), tokenizer_config=config)
    with pytest.raises(SourceError, match=words) as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "given",
    [
        {"gguf_file": "/dev/zero", "vocab_file": "/dev/zero", "tokenizer_file": "/dev/zero"},
        {"fast_tokenizer_files": ["../x.json"]},
        {"added_tokens_decoder": {"9" * 40: {"content": "<x>"}}, "chat_template": 5},
    ],
    ids=["files of others", "files of versions", "an id beyond all"],
)
def test_odd_configs_are_taken_as_transformers_takes_them(given: Any, tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **given}
    save(tmp_path, byte_level(), tokenizer_config=config)
    ours, theirs = open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None and [ours.encode(t) for t in MANY] == [theirs.encode(t) for t in MANY]


def test_code_beside_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    save(tmp_path, byte_level(), tokenizer_config=config, config={"model_type": "own"})
    (tmp_path / "own.py").write_text("raise SystemExit", encoding="utf-8")
    files, notes = tokenizer_files(tmp_path)
    assert notes and "not run: tokenizer.json is taken as it is" in notes[0]
    ours = Tokenizer.of(files, "")
    assert ours is not None and ours.encode("a b") == byte_level().encode("a b").ids


def test_what_transformers_would_wait_for(tmp_path: Path) -> None:
    many = {"extra_special_tokens": [f"<{i}>" for i in range(10_001)]}
    save(tmp_path, byte_level(), tokenizer_config=many)
    with pytest.raises(SourceError, match="at most 10000 extra special tokens, found 10001"):
        open_tokenizer(tmp_path)
    save(tmp_path, byte_level(), tokenizer_config={})
    os.mkfifo(tmp_path / "vocab.json")
    with pytest.raises(SourceError, match=r"vocab\.json: expected a regular file"):
        open_tokenizer(tmp_path)
