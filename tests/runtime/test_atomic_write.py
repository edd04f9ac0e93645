"""Atomic writing: what came meanwhile is kept, only ingots are replaced, and nothing is left."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_ingot
from full_disk import files_of_at_most
from ingot.runtime.artifact import atomic_write
from ingot.runtime.artifact.atomic_write import AtomicWrite
from ingot.runtime.artifact.reader import open_ingot

KINDS = ["x", "x.ingot"]  # a directory and a zip
real_rename = atomic_write._rename


def loads(path: Path) -> bool:
    open_ingot(path)
    return True


@pytest.fixture(params=["renameat2", "old"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the flags of renameat2, and as on a file system that does not have them."""
    if request.param == "old":
        monkeypatch.setattr(atomic_write, "_rename", lambda *_: False)
    return request.param


def before_the_rename(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do `act` once, right before the first rename of what was written."""
    pending = [act]
    rename = atomic_write._rename

    def late(*args: Any) -> bool:
        if pending:
            pending.pop()()
        return rename(*args)

    patch.setattr(atomic_write, "_rename", late)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["file", "folder", "link", "ingot"])
def test_what_came_meanwhile_is_kept(
    system: str, name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name

    def come() -> None:
        if kind == "file":
            path.write_text("mine")
        elif kind == "folder":
            path.mkdir()
            (path / "notes").write_text("mine")
        elif kind == "link":
            path.symlink_to("gone")
        else:
            tiny_ingot.write(path)

    before_the_rename(monkeypatch, come)
    with pytest.raises(FileExistsError, match=f"{name} came to be there meanwhile, and is kept"):
        tiny_ingot.write(path)
    assert os.listdir(tmp_path) == [name]
    if kind == "link":
        assert os.readlink(path) == "gone"
    elif kind == "ingot":
        assert loads(path)
    else:
        assert (path if kind == "file" else path / "notes").read_text() == "mine"


def test_an_empty_directory_that_came_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain rename would replace it."""
    before_the_rename(monkeypatch, (tmp_path / "x").mkdir)
    with pytest.raises(FileExistsError, match="meanwhile"):
        tiny_ingot.write(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == []


@pytest.mark.parametrize("name", KINDS)
def test_what_takes_the_place_of_the_ingot_meanwhile_is_kept(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at what is replaced and the exchange."""
    path = tiny_ingot.write(tmp_path / name)
    looked = atomic_write.check_free

    def check(where: Path, overwrite: bool) -> None:
        looked(where, overwrite)
        if where == path and (tmp_path / "mine").exists():
            path.rename(tmp_path / "moved")
            (tmp_path / "mine").rename(path)

    monkeypatch.setattr(atomic_write, "check_free", check)
    with AtomicWrite(path, overwrite=True) as writing:
        writing.content.mkdir()
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(FileExistsError, match="is no ingot, so it is not replaced"):
            writing.publish()
    assert path.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == sorted([name, "moved"])


@pytest.mark.parametrize("was", KINDS)
@pytest.mark.parametrize("becomes", KINDS)
def test_an_ingot_is_always_there_while_it_is_replaced(
    was: str, becomes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen after every call of the system that could take it away."""
    source, path = tiny_ingot.write(tmp_path / was), tmp_path / f"there{Path(becomes).suffix}"
    source.rename(path)
    before = open_ingot(path).manifest
    seen: list[bool] = []

    def watched(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **named: Any) -> Any:
            result = real(*args, **named)
            seen.append(loads(path))
            return result

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (Path, "rename"),
        (atomic_write, "_rename"),
        (atomic_write, "_remove"),
        (os, "fsync"),
    ):
        watched(owner, name)
    tiny_ingot.write(path, overwrite=True)
    assert len(seen) > 5 and all(seen) and open_ingot(path).manifest == before
    assert os.listdir(tmp_path) == [path.name]


def test_without_an_exchange_files_are_replaced_and_directories_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KINDS:
        tiny_ingot.write(tmp_path / name)
    monkeypatch.setattr(atomic_write, "_rename", lambda *_: False)
    tiny_ingot.write(tmp_path / "x.ingot", overwrite=True)
    with pytest.raises(OSError, match="cannot exchange two directories; remove the old one.*/x'"):
        tiny_ingot.write(tmp_path / "x", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == KINDS and all(loads(tmp_path / name) for name in KINDS)


def test_a_link_to_an_ingot_is_replaced_and_the_ingot_kept(tmp_path: Path) -> None:
    first = tiny_ingot.write(tmp_path / "first")
    (tmp_path / "latest").symlink_to("first")
    tiny_ingot.write(tmp_path / "latest", overwrite=True)
    assert loads(first) and loads(tmp_path / "latest") and not (tmp_path / "latest").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["first", "latest"]


# ---- what killed writers leave


def killed(act: Callable[[], object]) -> None:
    """Do `act` in a process that is killed at its end, or before."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def begin(path: Path, **options: Any) -> None:
    writing = AtomicWrite(path, **options).__enter__()
    writing.content.mkdir()
    (writing.content / "part").write_bytes(bytes(1000))


@pytest.mark.parametrize("name", KINDS)
def test_the_next_removes_what_a_killed_one_left(name: str, tmp_path: Path) -> None:
    killed(lambda: begin(tmp_path / name))
    (tmp_path / ".ingot-0123456789abcdef.partial").mkdir()  # of one killed before its lock
    assert len(os.listdir(tmp_path)) == 2
    tiny_ingot.write(tmp_path / f"other{name}")
    assert os.listdir(tmp_path) == [f"other{name}"]


def test_what_another_is_writing_is_left_alone(tmp_path: Path) -> None:
    with AtomicWrite(tmp_path / "a") as writing:
        writing.content.mkdir()
        tiny_ingot.write(tmp_path / "b")
        (writing.content / "file").write_text("whole")
        writing.publish()
    assert (tmp_path / "a" / "file").read_text() == "whole"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_names_that_are_not_its_own_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".ingot-mine.partial").mkdir()
    (tmp_path / "film.partial").write_text("mine")
    (tmp_path / ".ingot-0123456789abcdef.partial").write_text("mine")
    tiny_ingot.write(tmp_path / "x")
    assert len(os.listdir(tmp_path)) == 4


def test_killed_in_an_exchange_what_is_no_ingot_is_kept(tmp_path: Path) -> None:
    """Something came between the look and the exchange, and the writer saw no more."""
    path = tiny_ingot.write(tmp_path / "x")

    def act() -> None:
        def exchange(*args: Any) -> bool:
            if args[2] == atomic_write._EXCHANGE:
                path.rename(tmp_path / "moved")
                path.write_text("mine")
                real_rename(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return real_rename(*args)

        atomic_write._rename = exchange
        tiny_ingot.write(path, overwrite=True)

    killed(act)
    tiny_ingot.write(tmp_path / "y")
    (left,) = tmp_path.glob(".ingot-*")
    assert (left / "swapped").read_text() == "mine"


def test_a_folder_that_is_taken_for_abandoned_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another removes it between its making and its lock: the next try has another name."""
    locked = atomic_write._locked
    gone: list[Path] = []

    def late(folder: Path, flags: int = 0) -> int:
        if flags and not gone:
            gone.append(folder)
            atomic_write._remove_abandoned(tmp_path)
        return locked(folder, flags)

    monkeypatch.setattr(atomic_write, "_locked", late)
    tiny_ingot.write(tmp_path / "x")
    assert gone and os.listdir(tmp_path) == ["x"]


# ---- full disks


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("nbytes", [0, 100, 1000, 3000])
def test_a_full_disk_names_the_path_and_leaves_nothing(
    name: str, nbytes: int, tmp_path: Path
) -> None:
    with files_of_at_most(nbytes), pytest.raises(OSError, match="too large") as raised:
        tiny_ingot.write(tmp_path / name)
    assert raised.value.errno == errno.EFBIG and raised.value.filename == str(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", KINDS)
def test_a_disk_that_is_full_at_the_sync_names_the_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = tiny_ingot.write(tmp_path / name)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{old}'"):
        tiny_ingot.write(old, overwrite=True)
    assert os.listdir(tmp_path) == [name] and loads(old)
