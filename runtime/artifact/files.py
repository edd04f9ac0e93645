"""The files of an ingot, in a directory or an uncompressed zip; none outside can be reached.

A directory is opened once and every file relative to it, never through a link. A zip is mapped
once. Small files are copied into memory, large ones mapped: the bytes hashed are the bytes used.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .manifest import FOLDERS, MAX_FILES, is_file_name
from .stored_zip import Member, read_members
from .strict_json import IngotError

UNFINISHED = ".partial"  # what the name ends with while an ingot is being written
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
# A FIFO must not be waited for: it is opened only to be seen and refused.
_READ_FILE = _READ | os.O_NONBLOCK


@contextmanager
def open_files(path: Path) -> Generator[Files]:
    """Open the ingot at `path`. IngotError for neither a directory nor a zip.

    The temporary path of a writer is refused: it is unfinished.
    """
    if path.name.endswith(UNFINISHED):
        raise IngotError(f"expected an ingot, found the beginning of one (*{UNFINISHED})")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise IngotError(f"expected an ingot, found {error.strerror}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            yield _Directory(descriptor)
        elif stat.S_ISREG(mode):
            yield _Zip(descriptor)
        else:
            raise IngotError("expected a directory or a file, found neither")
    finally:
        os.close(descriptor)


class _Directory:
    """The files of an ingot: `sizes` by name, and contents."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.sizes: dict[str, int] = {}
        self._list(descriptor, "")

    def _list(self, descriptor: int, prefix: str) -> None:
        with os.scandir(descriptor) as found:
            for item in found:
                name = prefix + item.name
                if not prefix and item.name in FOLDERS:
                    with _opened(
                        item.name, _READ | os.O_DIRECTORY, descriptor, "a folder"
                    ) as inner:
                        self._list(inner, item.name + "/")
                    continue
                if not is_file_name(name):
                    raise IngotError(f"expected flat names of an ingot's files, found {name!r:.90}")
                if not item.is_file(follow_symlinks=False):
                    raise IngotError(f"{name}: expected a regular file, found something else")
                self.sizes[name] = item.stat(follow_symlinks=False).st_size
                if len(self.sizes) > MAX_FILES:
                    raise IngotError(f"expected at most {MAX_FILES} files, found more")

    @contextmanager
    def _open(self, name: str) -> Generator[tuple[int, int]]:
        """The descriptor and the size of a file."""
        folder, _, last = name.rpartition("/")
        inside, expected = self._descriptor, self.sizes.get(name)
        with ExitStack() as opened:
            if folder:
                flags = _READ | os.O_DIRECTORY
                inside = opened.enter_context(_opened(folder, flags, inside, "a folder"))
            descriptor = opened.enter_context(_opened(last, _READ_FILE, inside, "a file"))
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise IngotError(f"{name}: expected a regular file, found something else")
            if found.st_size != expected:
                raise IngotError(f"{name}: expected {expected} bytes, found {found.st_size}")
            yield descriptor, found.st_size

    def read(self, name: str) -> bytes:
        """A copy of a file. IngotError when it is missing or its size has changed."""
        with self._open(name) as (descriptor, size):
            data = bytearray()
            while len(data) < size and (part := os.read(descriptor, size - len(data))):
                data += part
            return bytes(data)

    def map(self, name: str) -> memoryview:
        """A private, copy-on-write mapping of a file."""
        with self._open(name) as (descriptor, size):
            return memoryview(_mapped(descriptor)) if size else memoryview(bytearray())


class _Zip:
    """As _Directory, of a zip."""

    def __init__(self, descriptor: int) -> None:
        if os.fstat(descriptor).st_size == 0:
            raise IngotError("expected a zip, found an empty file")
        self._view = memoryview(_mapped(descriptor))
        self._members: dict[str, Member] = {}
        for member in read_members(self._view, MAX_FILES):
            if not is_file_name(member.name):
                raise IngotError(
                    f"expected flat names of an ingot's files, found {member.name!r:.90}"
                )
            if member.name in self._members:
                raise IngotError(f"{member.name}: expected it once in the zip, found it twice")
            self._members[member.name] = member
        self.sizes = {name: member.size for name, member in self._members.items()}

    def read(self, name: str) -> bytes:
        return bytes(self.map(name))

    def map(self, name: str) -> memoryview:
        member = self._members.get(name)
        if member is None:
            raise IngotError(f"{name}: expected this file, found none")
        return self._view[member.offset : member.offset + member.size]


Files = _Directory | _Zip


@contextmanager
def _opened(name: str, flags: int, folder: int, what: str) -> Generator[int]:
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        raise IngotError(f"{name}: expected {what}, found {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _mapped(descriptor: int) -> mmap.mmap:
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
