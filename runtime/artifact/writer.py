"""Writes an ingot, a zip or a directory, whole or not at all."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from msgspec import structs

from .atomic_write import AtomicWrite
from .manifest import MANIFEST, FileFact, Manifest, is_file_name

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
        self._write = AtomicWrite(self.path, overwrite=overwrite)
        self._zip: zipfile.ZipFile | None = None
        self._opened = ExitStack()

    def __enter__(self) -> IngotWriter:
        with self._opened as opened:
            content = opened.enter_context(self._write).content
            if self.path.suffix == SUFFIX:
                self._zip = zipfile.ZipFile(content, "x", zipfile.ZIP_STORED)
                opened.callback(self._close_zip)
            else:
                content.mkdir()
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, trace)

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
        self._write.publish()
        return complete

    def _close_zip(self) -> None:
        if self._zip is not None:
            with suppress(OSError):  # it is closed all the same, and not to be kept
                self._zip.close()

    @contextmanager
    def _open(self, name: str, size: int) -> Generator[IO[bytes]]:
        if self._zip is not None:
            with self._open_in_zip(self._zip, name, size) as file:
                yield file
            return
        path = self._write.content / name
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as file:
            yield file

    def _open_in_zip(self, archive: zipfile.ZipFile, name: str, size: int) -> IO[bytes]:
        wide = size * 1.05 > zipfile.ZIP64_LIMIT  # as zipfile decides
        info = zipfile.ZipInfo(name)  # of 1980: equal ingots are equal files
        info.external_attr = 0o644 << 16
        info.file_size = size
        head = _LOCAL_HEADER + len(name) + _ZIP64_FIELD * wide + _FIELD_HEAD
        padding = -(archive.start_dir + head) % _ALIGNMENT
        info.extra = struct.pack("<2H", _PADDING, padding) + bytes(padding)
        return archive.open(info, "w", force_zip64=wide)
