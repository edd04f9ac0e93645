"""The manifest of an ingot: target, serving sizes, and files with size and hash."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, field, structs, to_builtins

from ..program import Size, Strict, Text
from ..serving.abi import ServingMeta
from .strict_json import IngotError, Sha256, decode, shown, typed, write_json

MANIFEST = "manifest.json"
FORMAT = "ingot"
VERSION = 4
# Files are at the top level or in one of these folders, with names of these characters.
FOLDERS = ("graphs", "plan", "kernels", "weights", "tokenizer", "additional_chat_templates")
_FILE = re.compile(rf"(?:(?:{'|'.join(FOLDERS)})/)?[A-Za-z0-9_][A-Za-z0-9_.\-]{{0,127}}")
MAX_FILES = 1 << 16
MAX_BYTES = 64 << 20  # of the manifest
_MOST_TABLE = 2**26

_Name = Annotated[str, Meta(pattern=r"^[\w.,=\-:/+ ]{1,256}\Z")]
_Symbol = Annotated[str, Meta(pattern=r"^[A-Za-z_]\w{0,31}\Z")]


def is_ingot(path: Path) -> bool:
    """A file, or a directory with a manifest: what is not a Hugging Face directory."""
    return path.is_file() or (path / MANIFEST).is_file()


class FileFact(Strict, frozen=True):
    """Size in bytes and SHA-256 in hexadecimal of one file."""

    size: Size
    sha256: Sha256


class EntryFact(Strict, frozen=True):
    """One entry: its function, the values of its symbols, and its number of launches."""

    function: _Name
    symbols: Annotated[Mapping[_Symbol, Annotated[int, Meta(ge=1, le=2**28)]], Meta(max_length=16)]
    launches: Annotated[int, Meta(ge=0, le=2**24)]


class Manifest(Strict, frozen=True, kw_only=True):
    """The metadata of an ingot.

    `made_with` is the compiler's torch version; `symbols` has the first and last value of each
    symbol; `meta` is that of the program; `stop_tokens` end a completion; `generation` has the
    sampling defaults of generation_config.json (temperature, top_k, ...), which callers may use;
    `options` are those that the model was compiled with; nothing but `speculate`, which says how a
    session drafts tokens, matters for what is served.
    """

    format: Literal["ingot"] = FORMAT
    version: Literal[4] = VERSION
    made_with: Text
    target: Annotated[str, Meta(pattern=r"^[a-z]+(:\w+)?\Z", max_length=64)]
    model_type: _Name
    dtype: Annotated[str, Meta(pattern=r"^\w+\Z", max_length=64)]
    symbols: Annotated[Mapping[_Symbol, tuple[Size, Size]], Meta(max_length=16)]
    entries: Annotated[tuple[EntryFact, ...], Meta(max_length=4096)]
    meta: ServingMeta
    stop_tokens: Annotated[tuple[Size, ...], Meta(max_length=4096)]
    generation: Annotated[
        Mapping[Annotated[str, Meta(pattern=r"^\w{1,64}\Z")], int | float], Meta(max_length=64)
    ]
    options: Annotated[Mapping[Text, Any], Meta(max_length=64)]
    files: Annotated[Mapping[str, FileFact], Meta(max_length=MAX_FILES)] = field(
        default_factory=dict[str, FileFact]
    )

    def bytes(self) -> bytes:
        """The content of manifest.json."""
        files = dict(sorted(self.files.items()))
        return write_json(to_builtins(structs.replace(self, files=files)))


def is_file_name(name: str) -> bool:
    """Whether `name` is a valid file name in an ingot: a fixed character set, one folder."""
    return _FILE.fullmatch(name) is not None


def read_manifest(data: bytes | memoryview) -> Manifest:
    """Decode and check a manifest; IngotError for an invalid one."""
    given = decode(data, dict[str, Any], MANIFEST, MAX_BYTES)
    kind = (given.get("format"), given.get("version"))
    if kind != (FORMAT, VERSION):
        raise IngotError(
            f"{MANIFEST}: expected format {FORMAT!r}, version {VERSION}, found {shown(kind[0])}, "
            f"version {shown(kind[1])}: export the model again with this version of Ingot"
        )
    for key in Manifest.__struct_fields__:  # those with defaults too
        if key not in given:
            raise IngotError(f"{MANIFEST}: expected {key!r}, found only {sorted(given)!r:.300}")
    for name, fact in typed(given["files"], dict[str, Any], f"{MANIFEST}: files").items():
        if not is_file_name(name) or name == MANIFEST:
            raise IngotError(
                f"{MANIFEST}: files: expected flat names of letters, digits and _.- in "
                f"{', '.join(FOLDERS)}; found {name[:80]!r}"
            )
        typed(fact, FileFact, f"{MANIFEST}: {name}")
    manifest = typed(given, Manifest, MANIFEST)
    meta = manifest.meta
    table = meta.max_sequences * meta.pages_per_slot
    if table > _MOST_TABLE:
        raise IngotError(
            f"{MANIFEST}: meta: page table: expected at most {_MOST_TABLE} pages, found {table}"
        )
    if beyond := [token for token in manifest.stop_tokens if token >= meta.vocab_size]:
        raise IngotError(
            f"{MANIFEST}: stop_tokens: expected tokens from 0 to {meta.vocab_size - 1}, "
            f"found {beyond[0]}"
        )
    return manifest
