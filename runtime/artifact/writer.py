"""Writes an ingot atomically: to a hidden temporary path, renamed after everything is synced.

A temporary path that a killed process leaves behind is refused by the reader.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import struct
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from msgspec import structs

from .files import UNFINISHED
from .manifest import MANIFEST, FileFact, Manifest, is_file_name
from .reader import read_ingot_manifest
from .strict_json import IngotError

SUFFIX = ".ingot"  # of a zip; everything else is a directory
# Alignment in bytes of files in a zip, by an extra field of zeros.
_ALIGNMENT = 64
_PADDING = 0xD935
_LOCAL_HEADER, _ZIP64_FIELD, _FIELD_HEAD = 30, 20, 4

Write = Callable[[bytes | memoryview], object]


class IngotWriter:
    """Writes one ingot: a zip if `path` ends in .ingot, else a directory.

    A context manager: `add` and `file`, then `finish`; without `finish` everything is removed.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        """FileExistsError if `path` exists, except an ingot with `overwrite`."""
        self.path = Path(path)
        self._files: dict[str, FileFact] = {}
        check_free(self.path, overwrite)
        beside = f".{self.path.name}.{secrets.token_hex(4)}{UNFINISHED}"
        self._beside = self.path.parent / beside
        self._zip: zipfile.ZipFile | None = None

    def __enter__(self) -> IngotWriter:
        if self.path.suffix == SUFFIX:
            self._zip = zipfile.ZipFile(self._beside, "x", zipfile.ZIP_STORED)
        else:
            self._beside.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._zip is not None:
            self._zip.close()
        _remove(self._beside)

    def add(self, name: str, data: bytes) -> None:
        """Add one small file."""
        with self.file(name, len(data)) as write:
            write(data)

    @contextmanager
    def file(self, name: str, size: int) -> Generator[Write]:
        """Add a file of `size` bytes, written in pieces with the function that this yields."""
        if name in self._files or not is_file_name(name) or name == MANIFEST:
            raise ValueError(f"{name!r} is no name for another file of an ingot")
        digest, written = hashlib.sha256(), 0
        with self._open(name, size) as out:

            def write(data: bytes | memoryview) -> None:
                nonlocal written
                digest.update(data)
                out.write(data)
                written += len(data)

            yield write
        if written != size:
            raise ValueError(f"{name}: expected {size} bytes, wrote {written}")
        self._files[name] = FileFact(size, digest.hexdigest())

    def finish(self, manifest: Manifest) -> Manifest:
        """Write `manifest` with the files added, and rename the ingot to its path."""
        complete = structs.replace(manifest, files=self._files)
        data = complete.bytes()
        with self._open(MANIFEST, len(data)) as out:
            out.write(data)
        if self._zip is not None:
            self._zip.close()
            _sync(self._beside)
        else:
            for folder in (*(p for p in self._beside.iterdir() if p.is_dir()), self._beside):
                _sync(folder)
        aside = self._beside.with_suffix(".old")
        # A file takes the place of a file in one step; a directory must make way first.
        if self.path.exists() and (self._zip is None or self.path.is_dir()):
            self.path.rename(aside)
        self._beside.replace(self.path)
        _sync(self.path.parent)
        _remove(aside)
        return complete

    @contextmanager
    def _open(self, name: str, size: int) -> Generator[IO[bytes]]:
        if self._zip is not None:
            with self._open_in_zip(self._zip, name, size) as file:
                yield file
            return
        path = self._beside / name
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def _open_in_zip(self, archive: zipfile.ZipFile, name: str, size: int) -> IO[bytes]:
        wide = size * 1.05 > zipfile.ZIP64_LIMIT  # as zipfile decides
        info = zipfile.ZipInfo(name)  # of 1980: equal ingots are equal files
        info.external_attr = 0o644 << 16
        info.file_size = size
        head = _LOCAL_HEADER + len(name) + _ZIP64_FIELD * wide + _FIELD_HEAD
        padding = -(archive.start_dir + head) % _ALIGNMENT
        info.extra = struct.pack("<2H", _PADDING, padding) + bytes(padding)
        return archive.open(info, "w", force_zip64=wide)


def check_free(path: Path, overwrite: bool) -> None:
    """FileExistsError if `path` exists, except an ingot with `overwrite`.

    FileNotFoundError if its parent directory does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such directory")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f"{path} is there already: expected a new path")
    try:
        read_ingot_manifest(path)
    except IngotError as error:
        raise FileExistsError(f"{path} is no ingot, so it is not replaced") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
