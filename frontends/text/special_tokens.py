"""Special and added tokens of a model directory, out of the files that may name them.

tokenizer_config.json comes first; special_tokens_map.json and added_tokens.json, which older
versions of transformers wrote, count where it has no `added_tokens_decoder`. Precedence, order and
flags are those of transformers (`tokenization_utils_base.py`, `tokenization_utils_tokenizers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ..importers.side_files import json_object
from ..importers.source_error import SourceError

CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_DECODER = "added_tokens_decoder"
_EXTRA = "extra_special_tokens"
_ADDITIONAL = "additional_special_tokens"
# The names that every tokenizer knows, in the order in which transformers adds their tokens.
STANDARD_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken


def read_json(files: Mapping[str, bytes], name: str, place: str) -> dict[str, Any]:
    """The object in a JSON file of a model directory, empty when there is no file."""
    return json_object(files[name], f"{place}/{name}") if name in files else {}


def listed_tokens(config: Mapping[str, Any]) -> list[Any]:
    """The entries of the lists of extra tokens in tokenizer_config.json."""
    given = [config.get(name) for name in (_EXTRA, _ADDITIONAL)]
    return [token for tokens in given if isinstance(tokens, list | dict) for token in tokens]


def add_special_tokens(
    backend: tokenizers.Tokenizer, files: Mapping[str, bytes], place: str
) -> dict[str, str]:
    """Add the tokens that `backend`, read from tokenizer.json, lacks, and mark special ones.

    Returns the special tokens that have a name, by it: `bos_token` … `mask_token`, and the model's
    own (`image_token`, or any key of an object `extra_special_tokens`), as chat templates write
    them. SourceError names a file of `place` with an entry that is no token.
    """
    config = read_json(files, CONFIG, place)
    found = _Found()
    found.read_config(config, f"{place}/{CONFIG}")
    present = backend.get_added_tokens_decoder()
    if _DECODER in config:
        listed = _listed(config[_DECODER], f"{place}/{CONFIG}: {_DECODER}")
    else:
        found.read_map(read_json(files, _MAP, place), f"{place}/{_MAP}")
        listed = _numbered(read_json(files, _ADDED, place), found.special, f"{place}/{_ADDED}")
        listed |= present
    if backend.padding and "pad_token" not in config:
        found.standard.setdefault("pad_token", str(backend.padding["pad_token"]))

    by_text = {token.content: token for token in listed.values()}
    standard = {n: found.standard[n] for n in STANDARD_NAMES if n in found.standard}
    named = {name: by_text.get(_text(token), token) for name, token in standard.items()}
    named |= {**found.objects, **found.texts}
    names = {name: _text(token) for name, token in named.items()}
    held = {token.content for token in present.values()} | by_text.keys()
    new = [listed[id_] for id_ in sorted(listed)]
    missing: dict[str, Token] = {}  # each once, by its text and flags
    for token in (*named.values(), *found.more):
        if _text(token) not in held:
            missing.setdefault(repr(token), token)
    for token in missing.values():
        new += [AddedToken(token, special=True) if isinstance(token, str) else token]
    texts = set(names.values())
    for token in new:
        token.special = token.special or token.content in texts
    # All at once: each call takes time with the number of all tokens.
    backend.add_tokens([token for token in new if token.content])
    return names


@dataclass
class _Found:
    """The tokens that the files name; `additional` counts where no list of `extra` ones is.

    Of the model's own, `texts` go before `objects`, which special_tokens_map.json may replace.
    """

    standard: dict[str, Token] = field(default_factory=dict[str, Token])
    texts: dict[str, Token] = field(default_factory=dict[str, Token])
    objects: dict[str, Token] = field(default_factory=dict[str, Token])
    extra: list[Token] | None = None
    additional: list[Token] = field(default_factory=list[Token])
    mapped: set[str] = field(default_factory=set[str])  # names in special_tokens_map.json

    @property
    def special(self) -> set[str]:
        """The tokens that are special in added_tokens.json: no objects of tokenizer_config.json."""
        names = [n for n, t in self.standard.items() if isinstance(t, str) or n in self.mapped]
        extra = [token for token in self.extra or () if isinstance(token, str)]
        return {*(_text(self.standard[name]) for name in names), *extra}

    @property
    def more(self) -> list[Token]:
        return self.additional if self.extra is None else self.extra

    def read_config(self, config: Mapping[str, Any], where: str) -> None:
        self._read_names(config, where)
        self.texts = {n: t for n, t in self.objects.items() if isinstance(t, str)}
        self.objects = {n: t for n, t in self.objects.items() if n not in self.texts}
        extra: Any = config.get(_EXTRA)
        self.additional = _tokens(config.get(_ADDITIONAL), f"{where}: {_ADDITIONAL}")
        if isinstance(extra, Mapping) and extra:
            self._add_own(extra, where)
        elif not extra and _ADDITIONAL in config:
            self.extra = self.additional
        elif _EXTRA in config and not isinstance(extra, Mapping):
            self.extra = _tokens(extra, f"{where}: {_EXTRA}")

    def read_map(self, content: Mapping[str, Any], where: str) -> None:
        """special_tokens_map.json replaces named tokens, and adds to the others."""
        self._read_names(content, where, special=True)
        self.mapped = {*content}
        extra: Any = content.get(_EXTRA)
        if isinstance(extra, Mapping):
            self._add_own(extra, where)
        elif _EXTRA in content:
            self.extra = [*(self.extra or ()), *_tokens(extra, f"{where}: {_EXTRA}", special=True)]
        if _ADDITIONAL in content:
            self.additional = _tokens(content[_ADDITIONAL], f"{where}: {_ADDITIONAL}")

    def _add_own(self, named: Mapping[str, Any], where: str) -> None:
        self.texts |= {name: _token(t, f"{where}: {_EXTRA}: {name}") for name, t in named.items()}

    def _read_names(self, content: Mapping[str, Any], where: str, special: bool = False) -> None:
        for name, entry in content.items():
            if entry is None:
                self.standard.pop(name, None)
            elif name in STANDARD_NAMES:
                self.standard[name] = _token(entry, f"{where}: {name}", special)
            elif name.endswith("_token") and isinstance(entry, str | Mapping):
                self.objects[name] = _token(entry, f"{where}: {name}", special)


def _text(token: Token) -> str:
    return token if isinstance(token, str) else token.content


def _token(entry: Any, where: str, special: bool = False) -> Token:
    """A token as JSON has it: its text, or an object with `content` and flags."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
        raise SourceError(
            f"{where}: expected a token, a string or an object with content, found {entry!r:.80}"
        )
    flags = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
    return AddedToken(entry["content"], **{**flags, **({"special": True} if special else {})})


def _tokens(entries: Any, where: str, special: bool = False) -> list[Token]:
    if not isinstance(entries, list | None):
        raise SourceError(f"{where}: expected a list of tokens, found {entries!r:.80}")
    return [_token(entry, where, special) for entry in entries or ()]


def _listed(entries: Any, where: str) -> dict[int, AddedToken]:
    """`added_tokens_decoder`: tokens by their ids, which JSON has as strings."""
    if not isinstance(entries, Mapping):
        raise SourceError(f"{where}: expected an object of ids, found {entries!r:.80}")
    found: dict[int, AddedToken] = {}
    for id_, entry in entries.items():
        token = _token(entry, f"{where}: {id_}")
        if not str(id_).isdecimal() or isinstance(token, str):
            raise SourceError(
                f"{where}: {id_!r:.80}: expected a token by its id, found {entry!r:.80}"
            )
        found[int(id_)] = token
    return found


def _numbered(content: Mapping[str, Any], special: set[str], where: str) -> dict[int, AddedToken]:
    """added_tokens.json: ids by the texts of tokens, of which those in `special` are so."""
    found: dict[int, AddedToken] = {}
    for text, id_ in content.items():
        if not isinstance(id_, int):
            raise SourceError(f"{where}: {text!r:.80}: expected an id, found {id_!r:.80}")
        found[id_] = AddedToken(text, normalized=text not in special, special=text in special)
    return found
