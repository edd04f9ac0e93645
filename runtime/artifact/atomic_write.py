"""Files and directories that are written whole or not at all, and replace nothing but ingots.

What is written lies in a hidden folder beside its path, locked while it is written, and takes its
name in one step at the end. Folders that killed processes left behind are not locked: the next
writer beside them removes them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from .files import UNFINISHED
from .reader import read_ingot_manifest
from .strict_json import IngotError

# In the folder: its lock, what is written, and the same while it changes places with an ingot.
_LOCK, _NEW, _SWAPPED = "lock", "new", "swapped"
_FOLDER = re.compile(rf"\.ingot-[0-9a-f]{{16}}{re.escape(UNFINISHED)}")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of renameat2(2).
_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_NO_SUCH_FLAG = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class AtomicWrite:
    """A file or directory to write at `content`, which `publish` gives the name `path`.

    A context manager; without `publish` everything is removed. Where there is no room for what is
    written, the OSError names `path`.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """FileExistsError if `path` exists, except an ingot with `overwrite`."""
        check_free(path, overwrite)
        self.path = path
        self._overwrite = overwrite
        self._folder = Path()
        self._lock = -1

    def __enter__(self) -> AtomicWrite:
        try:
            _remove_abandoned(self.path.parent)
            while self._lock < 0:
                name = f".ingot-{secrets.token_hex(8)}{UNFINISHED}"
                self._folder = self.path.parent / name
                self._folder.mkdir()
                with suppress(FileNotFoundError, BlockingIOError):  # taken for an abandoned one
                    self._lock = _locked(self._folder, os.O_CREAT | os.O_EXCL)
        except OSError as error:
            self._name_path(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what cannot be removed now is by the next writer
            _remove_folder(self._folder)
        os.close(self._lock)
        self._name_path(error)

    @property
    def content(self) -> Path:
        """Where to write."""
        return self._folder / _NEW

    def publish(self) -> None:
        """Give what was written its name, in one step, when all of it is on the disk.

        FileExistsError if something else came to lie there meanwhile, which is kept; with
        `overwrite` an ingot is replaced. OSError where a directory is to be replaced on a file
        system that cannot exchange two.
        """
        _sync_below(self.content)
        if not self._overwrite:
            if not self._take():
                raise FileExistsError(f"{self.path} came to be there meanwhile, and is kept")
        else:
            while not (self._take() or self._replace()):
                pass
        _sync(self.path.parent)

    def _take(self) -> bool:
        """Move the content to its path; False if something is there."""
        try:
            if _rename(self.content, self.path, _NOREPLACE):
                return True
            if not self.content.is_dir():
                os.link(self.content, self.path)
                return True
            self.path.mkdir()
        except FileExistsError:
            return False
        try:
            self.content.rename(self.path)  # takes the place of an empty directory
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                return False
            raise
        return True

    def _replace(self) -> bool:
        """Let the content change places with the ingot at its path; False if nothing is there.

        FileExistsError if something else is.
        """
        swapped = self._folder / _SWAPPED
        self.content.rename(swapped)
        try:
            before = _identity(self.path)
            check_free(self.path, overwrite=True)
            if not _rename(swapped, self.path, _EXCHANGE):
                if stat.S_ISDIR(os.lstat(self.path).st_mode) or swapped.is_dir():
                    raise OSError(
                        errno.EOPNOTSUPP,
                        "this file system cannot exchange two directories; remove the old one",
                        str(self.path),
                    )
                os.replace(swapped, self.path)
                return True
            if _identity(swapped) == before:
                return True
            _rename(swapped, self.path, _EXCHANGE)  # something else came before: back
            return False
        except FileNotFoundError:
            return False
        finally:
            if os.path.lexists(swapped):
                swapped.rename(self.content)

    def _name_path(self, error: BaseException | None) -> None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise OSError(error.errno, os.strerror(error.errno), str(self.path)) from error


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


def _rename(source: Path, target: Path, flag: int) -> bool:
    """renameat2 with one flag; False where the system or the file system does not have it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(source), os.fsencode(target)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flag) == 0:
        return True
    if (number := ctypes.get_errno()) in _NO_SUCH_FLAG:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def _identity(path: Path) -> tuple[int, ...]:
    """What tells a file, a directory or a link from another, and from itself after a change."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _locked(folder: Path, flags: int = 0) -> int:
    """The descriptor of the lock of a folder, held. BlockingIOError if another process holds it."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.lstat(folder / _LOCK)):
            raise FileNotFoundError(folder)
    except OSError as error:
        # Without locks nothing is ever taken for abandoned.
        if flags and error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return lock
        os.close(lock)
        raise
    return lock


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders that killed writers left in `parent`."""
    found: list[str] = []
    with suppress(OSError):  # a directory may be written to and not listed
        found = os.listdir(parent)
    for folder in (parent / name for name in found if _FOLDER.fullmatch(name)):
        with suppress(OSError):
            try:
                lock = _locked(folder)
            except FileNotFoundError:
                folder.rmdir()  # its writer came no further than this
                continue
            try:
                _remove_folder(folder)
            finally:
                os.close(lock)


def _remove_folder(folder: Path) -> None:
    """Remove the folder of a writer and what it holds, its lock last."""
    _remove(folder / _NEW)
    # Of who was killed before it had looked at what it exchanged, which may be no ingot.
    if os.path.lexists(folder / _SWAPPED):
        check_free(folder / _SWAPPED, overwrite=True)
        _remove(folder / _SWAPPED)
    (folder / _LOCK).unlink()
    folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_below(path: Path) -> None:
    """Have a file, or a directory and all that it holds, on the disk."""
    for inner in path.iterdir() if path.is_dir() else ():
        _sync_below(inner)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
