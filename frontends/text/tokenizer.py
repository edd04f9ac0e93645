"""Tokenization and incremental detokenization with the `tokenizers` library alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ...runtime.artifact.reader import TEMPLATES, TOKENIZER_FILES
from ..importers.source_error import SourceError
from .chat import ChatTemplate, chat_template_of

_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
# Stands for bytes that are no character, and for the start of one whose rest has not come yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The tokens that tokenizer_config.json may name, in the order in which transformers adds them.
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The tokenizer of a model directory.

    `stop_token_ids` end a completion: every eos token that generation_config.json, config.json and
    tokenizer_config.json name. `chat_template` is None where the model has none. `files` are its
    source files, by their names in the directory.
    """

    backend: tokenizers.Tokenizer
    stop_token_ids: tuple[int, ...]
    chat_template: ChatTemplate | None
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])

    @classmethod
    def open(cls, directory: str | Path) -> Tokenizer | None:
        """The tokenizer of a directory, None when it has no tokenizer.json. SourceError as `of`."""
        return cls.of(_read_files(Path(directory)), str(directory))

    @classmethod
    def of(cls, files: Mapping[str, bytes], place: str) -> Tokenizer | None:
        """The tokenizer in the files of a model directory, None without a tokenizer.json.

        Tokens are added, and the file's own post-processor used, as transformers does for the same
        directory. SourceError names a file of `place` that cannot be read.
        """
        if _FILE not in files:
            return None
        try:
            backend = tokenizers.Tokenizer.from_buffer(files[_FILE])
        except Exception as error:  # the library raises nothing narrower
            raise SourceError(
                f"{place}/{_FILE} is no tokenizer of the tokenizers library: {error}"
            ) from error
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(files, _CONFIG, place)
        _add_tokens(backend, config)
        names = {name: text for name in _NAMED if (text := _content(config.get(name)))}
        configs = [_read_json(files, n, place) for n in ("generation_config.json", "config.json")]
        stops = _stop_tokens(configs, backend.token_to_id(names.get("eos_token", "")))
        return cls(backend, stops, chat_template_of(files, config, names), files)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """The ids of `text`; with the special tokens that the tokenizer itself puts around it.

        `special_tokens=False` is for text that has them already, as a chat template's.
        """
        return self.backend.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens and ids that the tokenizer lacks are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def decoder(self) -> IncrementalDetokenizer:
        """A new stream that decodes token by token."""
        return IncrementalDetokenizer(self.decode, self._is_silent, self._byte_ids)

    def _is_silent(self, token: int) -> bool:
        """Whether `decode` leaves the token out."""
        return token in self._special_ids or self.backend.id_to_token(token) is None

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(id_ for id_, token in added.items() if token.special)

    @cached_property
    def _byte_ids(self) -> frozenset[int]:
        """The tokens <0x00> to <0xFF>, where the decoder takes a run of them as UTF-8."""
        decoder: Any = self.backend.decoder
        if decoder is None or "A" not in decoder.decode(["B", "<0x41>"]):
            return frozenset()
        ids = (self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(id_ for id_ in ids if id_ is not None)


class IncrementalDetokenizer:
    """Decodes token by token: the pieces from `push` and `flush` concatenate to `decode(all)`.

    Text that a later token could still change is held back: the start of a character, and a run of
    byte tokens, which is UTF-8 only as a whole. Only the last few tokens are decoded again for each
    push: those since the boundary before the last one, at which every character was complete. That
    context keeps decoders from treating the next token as the first of the text.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        is_silent: Callable[[int], bool] = lambda token: False,
        byte_ids: Set[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._is_silent = is_silent
        self._byte_ids = byte_ids
        self._ids: list[int] = []  # the window
        self._given = 0  # characters of the window's text that were handed out
        self._boundary = 0  # tokens of the window up to the last boundary

    def push(self, token: int) -> str:
        """The text that `token` completes, often none."""
        if self._is_silent(token):
            return ""
        self._ids.append(token)
        if token in self._byte_ids:
            return ""
        text = self._decode(self._ids)
        stable = text.removesuffix(_REPLACEMENT)
        new = stable[self._given :]
        self._given = max(self._given, len(stable))
        if stable == text:
            self._start_from_boundary()
        return new

    def flush(self) -> str:
        """The text held back; resets the stream."""
        rest = self._decode(self._ids)[self._given :]
        self._ids, self._given, self._boundary = [], 0, 0
        return rest

    def _start_from_boundary(self) -> None:
        context = self._ids[self._boundary :]
        text = self._decode(context)
        if text:
            self._ids, self._given = context, len(text)
        self._boundary = len(self._ids)


def _read_files(directory: Path) -> dict[str, bytes]:
    """Tokenizer, chat templates and configs that are there, by their path in `directory`.

    SourceError for one that cannot be read.
    """
    paths = [directory / name for name in (*TOKENIZER_FILES, "config.json")]
    paths += sorted((directory / TEMPLATES).glob("*.jinja"))
    try:
        found = {path: path.read_bytes() for path in paths if path.is_file()}
    except OSError as error:
        raise SourceError(f"{directory}: not readable: {error}") from error
    return {path.relative_to(directory).as_posix(): data for path, data in found.items()}


def _read_json(files: Mapping[str, bytes], name: str, place: str) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no file."""
    if name not in files:
        return {}
    try:
        content = json.loads(files[name].decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{place}/{name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{place}/{name}: expected an object, found {type(content).__name__}")
    return content


def _content(entry: Any) -> str:
    """The text of a token in tokenizer_config.json: a string, or an object with `content`."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) else ""


def _added(entry: Any, **defaults: bool) -> AddedToken:
    given: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    chosen = {flag: bool(given[flag]) for flag in flags if flag in given}
    return AddedToken(_content(entry), **{**defaults, **chosen})


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that tokenizer_config.json has and tokenizer.json lacks; mark special ones."""
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    listed: dict[str, Any] = config.get("added_tokens_decoder") or {}
    for id_ in sorted(map(int, listed)):
        token = _added(listed[str(id_)])
        if repr(token) not in known:
            backend.add_tokens([token])
    for entry in _special_entries(config):
        if _content(entry):
            token = _added(entry, normalized=False)
            token.special = True
            backend.add_special_tokens([token])


def _special_entries(config: Mapping[str, Any]) -> Iterator[Any]:
    yield from (config.get(name) for name in _NAMED)
    for key in ("extra_special_tokens", "additional_special_tokens"):
        more: Any = config.get(key) or ()
        yield from more.values() if isinstance(more, Mapping) else more


def _stop_tokens(configs: Sequence[Mapping[str, Any]], named: int | None) -> tuple[int, ...]:
    places: list[Any] = [*configs, *(config.get("text_config") or {} for config in configs)]
    found = [] if named is None else [named]
    for place in places:
        ids = place.get("eos_token_id")
        found += [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
    return tuple(sorted(set(found)))
