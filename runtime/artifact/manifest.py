"""The manifest of an ingot: what it is for, how it serves, its files with size and hash."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ..serving.abi import ServingMeta
from .strict_json import (
    IngotError,
    decode,
    each,
    fields,
    integer,
    items,
    mapping,
    one_of,
    text,
    write_json,
)

MANIFEST = "manifest.json"
FORMAT = "ingot"
VERSION = 2
# A file lies at the top or in one of these folders, under a name of these characters.
FOLDERS = ("graphs", "plan", "kernels", "weights", "tokenizer", "additional_chat_templates")
_FILE = re.compile(rf"(?:(?:{'|'.join(FOLDERS)})/)?[A-Za-z0-9_][A-Za-z0-9_.\-]{{0,127}}")
_SHA = r"[0-9a-f]{64}"
_NAME = r"[\w.,=\-:/+ ]{1,256}"
MAX_FILES = 1 << 16
_MAX_BYTES = 64 << 20
_MAX_ENTRIES = 4096
_MAX_FILE = 2**48
# What a session allocates on the host follows from these: the page table, and lists of pages.
_MOST = {
    "vocab_size": 2**24,
    "page_size": 2**16,
    "max_sequences": 2**16,
    "max_tokens_per_sequence": 2**28,
    "pages": 2**24,
}
_MOST_TABLE = 2**26


@dataclass(frozen=True)
class FileFact:
    """The bytes of a file and their sha256, in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class EntryFact:
    """One entry: of which function, what its symbols are bound to, and how many launches it has."""

    function: str
    symbols: Mapping[str, int]
    launches: int


@dataclass(frozen=True)
class Manifest:
    """Everything about an ingot but the content of its files.

    `made_with` names the compiler's torch; `symbols` has the first and last value of each symbol;
    `meta` is that of the program; `stop_tokens` end a completion; `generation` has the numbers by
    which the model's makers sample (temperature, top_k, ...), for whoever wants them: nothing
    applies them unasked.
    """

    target: str
    model_type: str
    dtype: str
    made_with: str
    symbols: Mapping[str, tuple[int, int]]
    entries: tuple[EntryFact, ...]
    meta: Mapping[str, int]
    stop_tokens: tuple[int, ...]
    generation: Mapping[str, float]
    files: Mapping[str, FileFact] = field(default_factory=dict[str, FileFact])

    def bytes(self) -> bytes:
        """The content of manifest.json."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "made_with": self.made_with,
            "target": self.target,
            "model_type": self.model_type,
            "dtype": self.dtype,
            "symbols": {name: list(ends) for name, ends in self.symbols.items()},
            "entries": [asdict(entry) for entry in self.entries],
            "meta": dict(self.meta),
            "stop_tokens": list(self.stop_tokens),
            "generation": dict(self.generation),
            "files": {name: asdict(fact) for name, fact in sorted(self.files.items())},
        }
        return write_json(data)


def is_file_name(name: str) -> bool:
    """Whether a file of an ingot may have this name: flat, of a fixed set of characters."""
    return _FILE.fullmatch(name) is not None


def read_manifest(data: bytes | memoryview) -> Manifest:
    """The manifest in `data`; IngotError says what is wrong with it."""
    where = MANIFEST
    given = mapping(decode(data, dict[str, Any], where, _MAX_BYTES), where, 64)
    one_of(given.get("format"), f"{where}: format", [FORMAT])
    one_of(given.get("version"), f"{where}: version", [VERSION])
    names = ["format", "version", "made_with", "target", "model_type", "dtype", "symbols"]
    names += ["entries", "meta", "stop_tokens", "generation", "files"]
    found = fields(given, where, names)
    symbols = mapping(found["symbols"], f"{where}: symbols", 16)
    files = mapping(found["files"], f"{where}: files", MAX_FILES)
    for name in files:
        if not is_file_name(name) or name == MANIFEST:
            raise IngotError(
                f"{where}: files: expected flat names of letters, digits and _.- in "
                f"{', '.join(FOLDERS)}; found {name[:80]!r}"
            )
    entries = items(found["entries"], f"{where}: entries", _MAX_ENTRIES, 1)
    vocab = _meta(found["meta"])["vocab_size"]
    stops = items(found["stop_tokens"], f"{where}: stop_tokens", 4096)
    return Manifest(
        target=text(found["target"], f"{where}: target", r"[a-z]+(:\w+)?"),
        model_type=text(found["model_type"], f"{where}: model_type", _NAME),
        dtype=text(found["dtype"], f"{where}: dtype", r"\w+"),
        made_with=text(found["made_with"], f"{where}: made_with"),
        symbols={_symbol(n, where): _ends(v, f"{where}: symbols") for n, v in symbols.items()},
        entries=each(entries, f"{where}: entries", _entry),
        meta=_meta(found["meta"]),
        stop_tokens=each(stops, f"{where}: stop_tokens", partial(integer, most=vocab - 1)),
        generation=_numbers(found["generation"], f"{where}: generation"),
        files={name: _fact(value, f"{where}: {name}") for name, value in files.items()},
    )


def _symbol(name: str, where: str) -> str:
    return text(name, f"{where}: symbols", r"[A-Za-z_]\w{0,31}")


def _ends(value: Any, where: str) -> tuple[int, int]:
    first, last = each(items(value, where, 2, 2), where, integer)
    return first, last


def _entry(value: Any, where: str) -> EntryFact:
    found = fields(value, where, ("function", "symbols", "launches"))
    symbols = mapping(found["symbols"], f"{where}: symbols", 16)
    return EntryFact(
        text(found["function"], f"{where}: function", _NAME),
        {_symbol(n, where): integer(v, f"{where}: {n}", 1, 2**28) for n, v in symbols.items()},
        integer(found["launches"], f"{where}: launches", 0, 2**24),
    )


def _meta(value: Any) -> Mapping[str, int]:
    where = f"{MANIFEST}: meta"
    found = fields(value, where, _MOST)
    facts = {n: integer(found[n], f"{where}: {n}", 1, most) for n, most in _MOST.items()}
    meta = ServingMeta.of(facts)
    integer(meta.max_sequences * meta.pages_per_slot, f"{where}: page table", 1, _MOST_TABLE)
    return facts


def _numbers(value: Any, where: str) -> Mapping[str, float]:
    found = mapping(value, where, 64)
    for name, number in found.items():
        text(name, where, r"\w{1,64}")
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise IngotError(f"{where}: {name}: expected a number, found {number!r:.60}")
    return found


def _fact(value: Any, where: str) -> FileFact:
    found = fields(value, where, ("size", "sha256"))
    return FileFact(
        integer(found["size"], f"{where}: size", 0, _MAX_FILE),
        text(found["sha256"], f"{where}: sha256", _SHA),
    )


__all__ = [
    "FOLDERS",
    "MANIFEST",
    "MAX_FILES",
    "EntryFact",
    "FileFact",
    "Manifest",
    "is_file_name",
    "read_manifest",
]
