"""Text to ids and back: equal to transformers, streams that never show half a character."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.frontends.importers.source_error import SourceError
from ingot.frontends.text import render_template
from ingot.frontends.text.chat import ChatError, ChatTemplate, chat_template_of
from ingot.frontends.text.model_tokenizer import open_tokenizer, tokenizer_files
from ingot.frontends.text.tokenizer import IncrementalDetokenizer, Tokenizer, stop_tokens
from tiny_tokenizers import FAMILIES, TEXTS, byte_fallback, byte_level, save


def opened(directory: Path) -> Tokenizer:
    tokenizer = open_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


# ---- streams


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Tokenizer:
    return opened(save(tmp_path_factory.mktemp(request.param), FAMILIES[request.param]()))


@given(data=st.data())
def test_stream_concatenates_to_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    # Special tokens, ids beyond the vocabulary and, of bytes, mostly runs that are no UTF-8.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    stream = tokenizer.decoder()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""


def test_unknown_ids_do_not_end_a_run_of_bytes() -> None:
    tokenizer = Tokenizer(byte_fallback(), None, None)
    zero, byte = (tokenizer.backend.token_to_id(name) for name in ("<0x00>", "<0x80>"))
    ids = [zero, tokenizer.vocab_size + 1, byte]
    stream = tokenizer.decoder()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids) == "\ufffd\ufffd"


@given(text=st.text(st.sampled_from("aé東🙂 \n\ufffd'.b"), max_size=30))
def test_stream_of_text_shows_whole_characters(text: str, tmp_path_factory: Any) -> None:
    for make in (byte_level, byte_fallback):
        tokenizer = Tokenizer(make(), None, None)
        ids = tokenizer.encode(text)
        stream = tokenizer.decoder()
        shown = ""
        for i in ids:
            shown += stream.push(i)
            assert tokenizer.decode(ids).startswith(shown)
        assert shown + stream.flush() == tokenizer.decode(ids)


def test_stream_decodes_a_window_only() -> None:
    tokenizer = Tokenizer(byte_level(), None, None)
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    stream = IncrementalDetokenizer(decode)
    for i in tokenizer.encode(TEXTS[0] * 20):
        stream.push(i)
    assert longest <= 3


# ---- a directory


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "pad_token": "<pad>",  # not in tokenizer.json
        "add_bos_token": False,  # the post-processor of tokenizer.json decides
        "added_tokens_decoder": {
            "900": {"content": "<tool>", "special": False},
            "901": {"content": "<think>", "special": True},
        },
        "additional_special_tokens": ["<|sep|>", "<|extra|>"],
        "clean_up_tokenization_spaces": False,
    }
    ours = opened(save(tmp_path, FAMILIES[family](), tokenizer_config=config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "", " ", "<s>a<tool>b<think></s><pad><|extra|><|sep|> c"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        bare = ours.encode(text, special_tokens=False)
        assert bare == theirs.encode(text, add_special_tokens=False)
    assert ours.vocab_size == len(theirs)
    assert theirs.eos_token_id == ours.eos_token_id


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    ours = opened(save(tmp_path, tokenizer))
    assert ours.encode("abcdefgh") == byte_level().encode("abcdefgh").ids


def test_stop_tokens_of_all_places(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "generation_config": {"eos_token_id": [7, 9]},
        "config": {"eos_token_id": 7, "text_config": {"eos_token_id": 11}},
        "tokenizer_config": {"eos_token": "</s>"},
    }
    assert opened(save(tmp_path, byte_level(), **files)).eos_token_id == 2
    assert stop_tokens(tokenizer_files(tmp_path)[0], "") == {7, 9, 11}
    for name in files:
        (tmp_path / f"{name}.json").unlink()
    assert opened(tmp_path).eos_token_id is None
    assert stop_tokens(tokenizer_files(tmp_path)[0], "") == set()


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    assert open_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=r"tokenizer\.json is no tokenizer"):
        open_tokenizer(tmp_path)
    save(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(SourceError, match="expected an object, found list"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(SourceError, match=r"tokenizer_config\.json: expected JSON, found none"):
        open_tokenizer(tmp_path)


# ---- chat templates

MESSAGES = [
    {"role": "system", "content": "Be <brief> & é."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye", "tool": {"b": [1, None], "a": "ü"}},
]
TEMPLATE = """{{ bos_token }}{% set ns = namespace(n=0) %}
{% for message in messages %}
    {% if message.role == 'nobody' %}{{ raise_exception('no nobody') }}{% endif %}
    {% if loop.index > 3 and skip is defined %}{% break %}{% endif %}
    {% set ns.n = ns.n + 1 %}
<|{{ message['role'] }}|>
    {% if message.tool is defined %}{{ message.tool | tojson(indent=1) }}{% endif %}
    {% generation %}
{{ message.content.strip() }}{{ eos_token }}
    {% endgeneration %}
{% endfor %}
{{ ns.n }} {{ dict(a=1) }} {{ strftime_now('%Y') }} {{ documents is none }}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""


def chat_tokenizer(directory: Path, template: Any) -> Tokenizer:
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return opened(save(directory, byte_level(), tokenizer_config=config))


@pytest.mark.parametrize("variables", [{}, {"skip": True}, {"add_generation_prompt": False}])
def test_chat_equal_to_transformers(variables: dict[str, bool], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = chat_tokenizer(tmp_path, TEMPLATE)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.chat_template is not None
    text = ours.chat_template.render(MESSAGES, **variables)
    given = {"add_generation_prompt": True, **variables}
    assert text == theirs.apply_chat_template(MESSAGES, tokenize=False, **given)
    assert str(datetime.now().astimezone().year) in text
    ids = theirs.apply_chat_template(MESSAGES, return_dict=False, **given)
    assert ours.encode(text, special_tokens=False) == ids


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert chat_tokenizer(tmp_path, None).chat_template is None
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    template = chat_tokenizer(tmp_path, named).chat_template
    assert template is not None
    assert [template.render([]), template.render([], name="tool_use")] == ["one", "two"]
    assert [template.render([], tools=[]), template.render([], tools=None)] == ["two", "one"]
    with pytest.raises(ChatError, match="no chat template 'default'; there are tool_use"):
        ChatTemplate({"tool_use": "two"}).render([])
    with pytest.raises(ChatError, match="no chat template 'rag'; there are default, tool_use"):
        template.render([], name="rag")
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    template = chat_tokenizer(tmp_path, named).chat_template
    assert template is not None and template.render([]) == "file"
    with pytest.raises(SourceError, match="expected chat_template to be a string or a list"):
        chat_template_of({}, {"chat_template": [1]}, {})


HOSTILE: dict[str, str] = {
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ dict.__init__.__globals__ }}": "unsafe",
    "{{ namespace.__init__.__globals__ }}": "unsafe",
    "{% set n = namespace(__class__=1) %}": "unsafe",
    "{% set n = namespace() %}{% set n._x = 1 %}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('id') }}": "unsafe",
    "{{ raise_exception.__globals__ }}": "unsafe",
    "{{ '{0.__class__}'.format(1) }}": "unsafe",
    "{% for i in range(10000000) %}x{% endfor %}": "Range too big",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ messages[0].content.nothing.more }}": "has no attribute 'nothing'",
    "a\n{% if %}": "line 2",
    "{% include '/etc/passwd' %}": "no loader",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "too much memory",
    "{{ 'x' * 10 ** 11 }}": "too much memory",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}": (
        "too much memory"
    ),
    "{{ '(' * 100000 }}{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "memory|line|signal|fails",
    "{{ raise_exception('a\nb\x1b[0m') }}": "a\nb",
}


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_and_broken_templates_are_refused(source: str) -> None:
    with pytest.raises(ChatError, match=HOSTILE[source]):
        print(ChatTemplate({"default": source}).render(MESSAGES))


def test_parts_of_messages_are_text() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content[0].text }}"})
    text = {"type": "text", "text": "hi"}
    assert template.render([{"role": "user", "content": [text]}]) == "hi"
    for kind in ("image", "image_url", "input_audio", "video"):
        with pytest.raises(ChatError, match=f"message 0 has a part of type '{kind}': .* text"):
            template.render([{"role": "user", "content": [text, {"type": kind, kind: "x.png"}]}])


ENDLESS = {
    "loops": "{% for a in range(99999) %}" * 4 + "x" + "{% endfor %}" * 4,
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) ~ m(n-1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "powers": "{{ 9 ** (9 ** 9) }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_templates_without_end_are_ended(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(render_template.__file__).read_text(encoding="utf-8")
    quick = tmp_path / "render_template.py"
    quick.write_text(source.replace("SECONDS = 10", "SECONDS = 1"), encoding="utf-8")
    monkeypatch.setattr(render_template, "__file__", str(quick))
    start = time.monotonic()
    with pytest.raises(ChatError, match="chat template 'default' (takes more than|uses too much)"):
        ChatTemplate({"default": ENDLESS[kind]}).render(MESSAGES)
    assert time.monotonic() - start < 60


def test_messages_lack_what_they_have_as_none(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = chat_tokenizer(tmp_path, "{{ messages | tojson }}{{ (1, 2) }}")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    said = [{"role": "assistant", "content": None, "tool_calls": [None]}]
    assert ours.chat_template is not None
    assert ours.chat_template.render(said) == theirs.apply_chat_template(said, tokenize=False)


def test_templates_see_plain_data() -> None:
    with pytest.raises(ChatError, match="found a PosixPath"):
        ChatTemplate({"default": ""}).render([{"role": "user", "content": Path("x")}])
