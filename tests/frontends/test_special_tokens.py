"""Special and added tokens out of side files: equal to transformers, or refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ingot.frontends.importers.source_error import SourceError
from ingot.frontends.text.model_tokenizer import open_tokenizer
from ingot.frontends.text.tokenizer import Tokenizer
from tiny_tokenizers import FAMILIES, byte_level, save

CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}


def opened(directory: Path) -> Tokenizer:
    tokenizer = open_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


def check_equal(directory: Path, texts: list[str]) -> None:
    """Ids, text, size and named tokens are those of transformers for the same directory."""
    transformers = pytest.importorskip("transformers")
    ours, theirs = opened(directory), transformers.AutoTokenizer.from_pretrained(directory)
    assert ours.vocab_size == len(theirs)
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    added = ours.backend.get_added_tokens_decoder()
    assert {i: repr(t) for i, t in added.items()} == {
        i: repr(t) for i, t in theirs.added_tokens_decoder.items()
    }
    named = {} if ours.chat_template is None else ours.chat_template.tokens
    assert named == theirs.special_tokens_map


TEXT = ["a<tool>b<img> <s> </s><|im_end|><|im_start|><pad> <|sep|>c <unk> <new>"]
_WORDS = st.sampled_from(["<tool>", "<img>", "</s>", "<|im_end|>", "<|sep|>", "<pad>", "<new>"])
_FLAGS = st.fixed_dictionaries(
    {}, optional={f: st.booleans() for f in ("special", "normalized", "lstrip", "rstrip")}
)


def _typed(word: str, flags: dict[str, bool]) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": word, **flags}


_TYPED = st.builds(_typed, _WORDS, _FLAGS)
_TOKEN = st.one_of(_WORDS, _TYPED)
_NAMES = st.sampled_from(["eos_token", "pad_token", "unk_token", "image_token", "boi_token"])
_DECODER = st.dictionaries(
    st.integers(0, 320).map(str),
    st.builds(lambda w, f: {"content": w, **f}, _WORDS, _FLAGS),
    max_size=4,
)
_LIST = st.lists(_TOKEN, max_size=3)
_CONFIG = st.builds(
    lambda names, more: {**CLASS, "chat_template": "x", **names, **more},
    st.dictionaries(_NAMES, _TOKEN, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "added_tokens_decoder": _DECODER,
            "additional_special_tokens": _LIST,
            "extra_special_tokens": st.one_of(
                _LIST, st.dictionaries(_NAMES.filter(lambda n: n[0] in "ib"), _WORDS, max_size=2)
            ),
        },
    ),
)
_PLAIN = st.one_of(_WORDS, st.builds(lambda w, f: {"content": w, **f}, _WORDS, _FLAGS))
_MAP = st.builds(
    lambda names, more: {**names, **more},
    st.dictionaries(_NAMES, _PLAIN, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "additional_special_tokens": st.lists(_WORDS, max_size=3),
            "extra_special_tokens": st.lists(_WORDS, max_size=2),
        },
    ),
)
_ADDED = st.lists(_WORDS, unique=True, max_size=4).map(
    lambda w: {t: 290 + i for i, t in enumerate(w)}
)


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    config=_CONFIG,
    mapped=st.none() | _MAP,
    added=st.none() | _ADDED,
)
@settings(max_examples=40, deadline=None)
def test_side_files_equal_to_transformers(
    family: str, config: Any, mapped: Any, added: Any, tmp_path_factory: Any
) -> None:
    directory = save(tmp_path_factory.mktemp("t"), FAMILIES[family](), tokenizer_config=config)
    for name, content in (("special_tokens_map", mapped), ("added_tokens", added)):
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    try:
        check_equal(directory, TEXT)
    except SourceError as error:
        assume("is listed both as a special token and as another" not in str(error))
        raise


# ---- the cases that users met


def _legacy(directory: Path, **files: Any) -> Path:
    """A directory as older versions of transformers wrote it: no `added_tokens_decoder`."""
    config = {**CLASS, "chat_template": "{{ eos_token }}{{ image_token }}"}
    return save(directory, byte_level(), tokenizer_config=config, **files)


def test_special_tokens_map_names_tokens(tmp_path: Path) -> None:
    mapped = {
        "eos_token": {"content": "<|im_end|>", "lstrip": False, "normalized": False},
        "pad_token": "</s>",
        "image_token": "<img>",
        "additional_special_tokens": ["<|im_start|>"],
    }
    _legacy(tmp_path, special_tokens_map=mapped)
    check_equal(tmp_path, TEXT)
    ours = opened(tmp_path)
    assert ours.chat_template and ours.chat_template.render([]) == "<|im_end|><img>"
    assert ours.eos_token_id == ours.backend.token_to_id("<|im_end|>") is not None
    assert ours.decode(ours.encode("a<|im_start|>b<|im_end|>")) == "ab"


def test_added_tokens_file(tmp_path: Path) -> None:
    numbers = {"<tool>": 300, "<|im_end|>": 301}
    _legacy(tmp_path, special_tokens_map={"eos_token": "<|im_end|>"}, added_tokens=numbers)
    check_equal(tmp_path, TEXT)
    ours = opened(tmp_path)
    assert ours.decode(ours.encode("a<tool>b<|im_end|>")) == "a<tool>b"
    assert len(ours.encode("<tool>", special_tokens=False)) == 1


def test_named_extra_tokens_and_tokens_of_the_model(tmp_path: Path) -> None:
    config = {
        **CLASS,
        "boi_token": "<boi>",
        "extra_special_tokens": {"image_token": "<img>", "audio": "<audio>"},
        "chat_template": "{{ boi_token }}{{ image_token }}{{ audio }}",
    }
    save(tmp_path, byte_level(), tokenizer_config=config)
    check_equal(tmp_path, [*TEXT, "<boi><audio>"])
    ours = opened(tmp_path)
    assert ours.chat_template and ours.chat_template.render([]) == "<boi><img><audio>"
    assert ours.decode(ours.encode("a<img><boi>b")) == "ab"


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_tokens_that_are_listed_but_not_special_are_shown(key: str, tmp_path: Path) -> None:
    decoder = {"300": {"content": "<tool>", "special": False}}
    config = {**CLASS, "added_tokens_decoder": decoder, key: ["<tool>"]}
    save(tmp_path, byte_level(), tokenizer_config=config)
    check_equal(tmp_path, TEXT)
    ours = opened(tmp_path)
    assert ours.decode(ours.encode("a<tool>b")) == "a<tool>b"


@pytest.mark.slow
def test_many_added_tokens_are_added_at_once(tmp_path: Path) -> None:
    count = 300_000
    decoder = {str(300 + i): {"content": f"<t{i}>", "special": i % 2 == 0} for i in range(count)}
    save(tmp_path, byte_level(), tokenizer_config={**CLASS, "added_tokens_decoder": decoder})
    start = time.process_time()
    ours = opened(tmp_path)
    assert time.process_time() - start < 60  # one by one it takes hours
    assert ours.vocab_size >= count and len(ours.encode(f"<t{count - 1}>")) == 2
    assert ours.decode(ours.encode("<t0><t1>")) == "<t1>"


WRONG: list[tuple[str, Any, str]] = [
    ("tokenizer_config", {"eos_token": 5}, "eos_token: expected a token"),
    ("tokenizer_config", {"eos_token": {"text": "a"}}, "eos_token: expected a token"),
    ("tokenizer_config", {"additional_special_tokens": "<s>"}, "expected a list of tokens"),
    ("tokenizer_config", {"extra_special_tokens": {"a": 1}}, "extra_special_tokens: a"),
    ("tokenizer_config", {"added_tokens_decoder": [1]}, "expected an object of ids"),
    ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}, "'x'.*by its id"),
    ("special_tokens_map", {"bos_token": [1]}, r"special_tokens_map\.json: bos_token"),
    ("added_tokens", {"<x>": "1"}, r"added_tokens\.json: '<x>': expected an id"),
    ("added_tokens", ["<x>"], r"added_tokens\.json: expected an object"),
    ("generation_config", {"eos_token_id": "2"}, r"generation_config\.json: eos_token_id"),
    ("generation_config", {"eos_token_id": [2, 2.5]}, "expected an id or a list of ids"),
    ("config", {"text_config": {"eos_token_id": True}}, r"config\.json: eos_token_id"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_entries_that_are_no_tokens_are_refused(
    name: str, content: Any, message: str, tmp_path: Path
) -> None:
    save(tmp_path, byte_level(), **{name: content})
    with pytest.raises(SourceError, match=message):
        open_tokenizer(tmp_path)


# ---- what the tokenizers library panics on


def _damaged(directory: Path, **parts: Any) -> Path:
    content = json.loads(byte_level().to_str()) | parts
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def test_panics_while_loading(tmp_path: Path) -> None:
    _damaged(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(SourceError, match=r"tokenizer\.json is no tokenizer.*charsmap"):
        open_tokenizer(tmp_path)


def test_panics_and_bare_exceptions_while_encoding(tmp_path: Path) -> None:
    _damaged(tmp_path, pre_tokenizer={"type": "FixedLength", "length": 0})
    with pytest.raises(SourceError, match="cannot encode this text: chunk size"):
        opened(tmp_path).encode("ab")
    model = {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}
    _damaged(tmp_path, model=model, pre_tokenizer=None, post_processor=None)
    with pytest.raises(SourceError, match=r"cannot encode this text.*\[UNK\]"):
        opened(tmp_path).encode("zz")


def test_panics_while_decoding(tmp_path: Path) -> None:
    strip = {"type": "Strip", "content": "a", "start": 100, "stop": 100}
    tokenizer = opened(_damaged(tmp_path, decoder=strip))
    with pytest.raises(SourceError, match="cannot decode these ids"):
        tokenizer.decode(tokenizer.encode("a"))
