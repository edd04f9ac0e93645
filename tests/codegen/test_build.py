"""Kernels built and cached: once each, whole or not at all, by many at a time."""

from __future__ import annotations

import ast
import errno
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from ingot.codegen import build as build_module
from ingot.codegen.build import BuildError, Built, build, build_one
from ingot.codegen.kernel_source import KernelSource
from ingot.codegen.templates.generated import from_text
from ingot.codegen.templates.rowwise.copy import copy_kernel
from ingot.compiler.target import GPUS, Target, target_of
from ingot.compiler.text import parse_type
from ingot.runtime.devices.elf import code_target
from ingot.runtime.program import Argument, Kernel

SM_90 = target_of("cuda:sm_90")
TWICE = """@triton.jit
def twice(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at) * 2)
"""


def source(size: int, text: str = TWICE) -> KernelSource:
    kinds = {"x": Argument("*f32", 16), "y": Argument("*f32", 16)}
    return KernelSource.of(from_text(text, "twice"), {**kinds, "N": size}, 1, 2, False)


def built(sources: list[KernelSource], folder: Path) -> tuple[list[Kernel], int]:
    """The kernels, and how many Triton was asked for."""
    with patch.object(build_module, "build_one", side_effect=build_one) as asked:
        kernels = build(sources, SM_90, cache=folder)
    return [kernels[s] for s in sources], asked.call_count


@pytest.mark.parametrize("target", GPUS.values(), ids=lambda t: t.name)
def test_code_is_for_its_target(target: Target, tmp_path: Path) -> None:
    (kernel,) = build([source(64)], target, cache=tmp_path).values()
    assert isinstance(kernel.binary, bytes)
    assert code_target(kernel.binary) == target.name
    assert kernel.symbol == "twice" and kernel.facts["registers"] > 0
    assert kernel.args == (Argument("*f32", 16),) * 2


@pytest.mark.parametrize(("spilled", "warps", "asked"), [(24, 4, 255), (24, 16, 128), (80, 4, 255)])
def test_what_spills_is_built_again_with_all_registers(
    spilled: int, warps: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what spills less is taken; AMD's compiler takes all registers at once."""
    tried: list[int | None] = []

    def fake(source: KernelSource, target: Target, registers: int | None = None) -> Built:
        tried.append(registers)
        return Built(b"", {"spills": 40 if registers else spilled})

    monkeypatch.setattr(build_module, "_build", fake)
    wide = replace(source(64), num_warps=warps)
    assert build_one(wide, SM_90).facts["spills"] == min(spilled, 40)
    assert tried == [None, asked]
    tried.clear()
    assert build_one(wide, target_of("hip:gfx942")).facts["spills"] == spilled
    assert tried == [None]


def test_registers_are_bounded_where_a_number_is_given() -> None:
    assert ".maxnreg 64" in build_module.compiled(source(64), SM_90, 64).asm["ptx"]
    assert ".maxnreg" not in build_module.compiled(source(64), SM_90).asm["ptx"]


@pytest.mark.parametrize(("warps", "most"), [(8, 128), (4, 255)])
def test_resident_programs_share_a_multiprocessor(warps: int, most: int, tmp_path: Path) -> None:
    """Two fit on it, by registers and shared memory, and a third does not; of what spreads one."""
    pair = replace(source(64), num_warps=warps, resident=2)
    text = build_module.compiled(pair, SM_90).asm["ptx"]
    assert f".maxnreg {most}" in text
    (kernel,) = build([pair], SM_90, cache=tmp_path).values()
    # A block's own kilobyte is taken from the 228 as well.
    assert 2 * (kernel.shared + 1024) <= 228 << 10 < 3 * (kernel.shared + 1024)
    (wide,) = build([replace(pair, spreads=True)], SM_90, cache=tmp_path).values()
    assert kernel.shared + wide.shared + 2048 <= 228 << 10 < 2 * (wide.shared + 1024)
    (other,) = build([pair], target_of("hip:gfx942"), cache=tmp_path).values()
    assert other.shared == 0


def test_equal_sources_are_built_once_and_then_read(tmp_path: Path) -> None:
    first, asked = built([source(32), source(64), source(32)], tmp_path)
    assert asked == 2 and first[0] is first[2]
    again, asked = built([source(32), source(64)], tmp_path)
    assert asked == 0 and again == first[:2]
    assert not list(tmp_path.glob(".new-*"))


def test_what_makes_other_code_has_another_name() -> None:
    names = {source(n).hash(t.name) for n in (32, 64) for t in GPUS.values()}
    assert len(names) == 2 * len(GPUS)
    assert source(32, TWICE.replace("* 2", "* 3")).hash("cuda:sm_90") not in names


DAMAGED: dict[str, str] = {
    "no JSON": "{",
    "other JSON": "[1]",
    "deep JSON": "[" * 100_000,
    "no key": '{"key": null}',
    "a name that is none": '{"facts": {"name": 5, "shared": 0}}',
    "no shared memory": '{"facts": {"name": "twice"}}',
    "shared memory of no size": '{"facts": {"name": "twice", "shared": -1}}',
    "registers in words": '{"facts": {"name": "twice", "shared": 0, "registers": "ten"}}',
    "facts in a list": '{"facts": ["name", "shared"]}',
}


@pytest.mark.parametrize("damage", ["cut", "no facts", *DAMAGED])
def test_a_damaged_entry_is_built_anew(damage: str, tmp_path: Path) -> None:
    before, _ = built([source(32)], tmp_path)
    facts, code = next(tmp_path.glob("*.json")), next(tmp_path.glob("*.cubin"))
    if damage == "cut":
        code.write_bytes(code.read_bytes()[:-1])
    elif damage == "no facts":
        facts.unlink()
    else:
        text = DAMAGED[damage]
        changed = json.loads(text) if text.startswith('{"') else None
        whole = json.loads(facts.read_text())
        facts.write_text(text if changed is None else json.dumps({**whole, **changed}))
    after, asked = built([source(32)], tmp_path)
    assert asked == 1 and after == before


def test_an_entry_of_another_kernel_is_built_anew(tmp_path: Path) -> None:
    first, second = source(32), source(64)
    before, _ = built([first, second], tmp_path)
    keys = [s.hash(SM_90.name) for s in (first, second)]
    for suffix in ("json", "cubin"):
        content = (tmp_path / f"{keys[0]}.{suffix}").read_bytes()
        (tmp_path / f"{keys[1]}.{suffix}").write_bytes(content)
    after, asked = built([first, second], tmp_path)
    assert asked == 1 and after == before


def test_many_may_build_at_once(tmp_path: Path) -> None:
    wanted = [source(n) for n in (16, 32, 64, 128)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(build, wanted, SM_90, None, tmp_path) for _ in range(4)]
        found = [job.result() for job in jobs]
    assert all(f == found[0] for f in found)
    assert len(files(tmp_path)) == 2 * len(wanted)


class Cycle:
    """Garbage whose end runs Python, in which threads may switch."""

    def __init__(self) -> None:
        self.self = self

    def __del__(self) -> None:
        time.sleep(0)


@pytest.fixture
def garbage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Garbage is collected often, and interrupts whoever parses, as by chance otherwise."""
    parse = ast.parse

    def littered(*args: Any, **options: Any) -> Any:
        Cycle()
        return parse(*args, **options)

    monkeypatch.setattr(ast, "parse", littered)
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(100)
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)


@pytest.mark.usefixtures("garbage")
def test_threads_take_turns_with_the_parser(tmp_path: Path) -> None:
    """Python 3.11 gives threads that parse at once one counter: "recursion depth mismatch"."""
    deep = "+".join(["((tl.load(x + at)))"] * 60)
    texts = [TWICE.replace("tl.load(x + at) * 2", f"{deep} + {i}") for i in range(16)]
    with ThreadPoolExecutor(4) as pool:  # as several callers: hashing a source parses, too
        wanted = list(pool.map(partial(source, 32), texts))
        types = list(
            pool.map(parse_type, (f"f32[{'+'.join(['T'] * n)}]" for n in [*range(1, 64)] * 3))
        )
    assert len(build(wanted, SM_90, cache=tmp_path, workers=4)) == len(texts)
    assert len(types) == 3 * 63


def files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != "locks"]


class Processes:
    """Processes that build into one folder and tell what they build, in order; dead in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._told, self._go = folder / "kernels", folder / "told", folder / "go"
        self._living: list[int] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in list(self._living):
            os.kill(process, signal.SIGKILL)
            self.ended(process)

    def build(self, sizes: list[int], then: Callable[[], None] = lambda: None) -> int:
        """One that builds sources of these sizes, and does `then` when it begins with one; its id.

        It waits until `start` is called.
        """
        child = os.fork()
        if child:
            self._living.append(child)
            return child

        def telling(source: KernelSource, target: Target) -> Built:
            with self._told.open("a") as file:
                file.write(f"{source.hash(target.name)}\n")
            then()
            return build_one(source, target)

        code = 1
        try:
            until(self._go.exists)
            with patch.object(build_module, "build_one", telling):
                build([source(n) for n in sizes], SM_90, cache=self.folder, workers=2)
            code = 0
        finally:
            os._exit(code)

    def start(self) -> None:
        self._go.touch()

    def ended(self, process: int) -> int:
        self._living.remove(process)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def names(self) -> list[str]:
        return self._told.read_text().split() if self._told.exists() else []


def until(condition: Callable[[], bool]) -> None:
    latest = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < latest, "waited for a minute"
        time.sleep(0.005)


def test_processes_build_each_kernel_once_in_all(tmp_path: Path) -> None:
    """Three at once, each in another order; all find all."""
    sizes = [16, 32, 64, 128, 256]
    with Processes(tmp_path) as processes:
        started = [processes.build(sizes[i:] + sizes[:i]) for i in range(3)]
        processes.start()
        assert [processes.ended(process) for process in started] == [0, 0, 0]
        assert sorted(processes.names()) == sorted(source(n).hash("cuda:sm_90") for n in sizes)
        assert len(files(processes.folder)) == 2 * len(sizes)
        _, asked = built([source(n) for n in sizes], processes.folder)
        assert asked == 0


def test_what_was_killed_while_building_is_in_nobodys_way(tmp_path: Path) -> None:
    """It holds a lock; another builds what else there is, and waits; it is killed; that builds."""
    names = [source(n).hash("cuda:sm_90") for n in (32, 64)]
    with Processes(tmp_path) as processes:
        processes.start()
        holder = processes.build([32], then=signal.pause)
        until(lambda: len(processes.names()) == 1)
        waiter = processes.build([32, 64])
        until(lambda: len(processes.names()) == 2)
        time.sleep(0.3)
        assert processes.names() == names
        os.kill(holder, signal.SIGKILL)
        assert (processes.ended(holder), processes.ended(waiter)) == (-signal.SIGKILL, 0)
        assert processes.names() == [*names, names[0]]
        assert len(files(processes.folder)) == 4


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError()])
def test_without_locks_it_builds(tmp_path: Path, error: Exception) -> None:
    with patch.object(build_module.FileLock, "acquire", side_effect=error):
        _, asked = built([source(32)], tmp_path)
    assert asked == 1 and len(files(tmp_path)) == 2


def test_a_stuck_lock_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with patch.object(build_module, "_PATIENCE_SECONDS", 0.1):
        (tmp_path / "locks").mkdir()
        with build_module.FileLock(tmp_path / "locks" / source(32).hash("cuda:sm_90")[:2]):
            _, asked = built([source(32)], tmp_path)
    assert asked == 1 and len(files(tmp_path)) == 2


def test_where_nothing_can_be_written_is_told(tmp_path: Path) -> None:
    """What is there is read all the same."""
    before, _ = built([source(32)], tmp_path)
    denied = PermissionError(errno.EROFS, "Read-only file system")
    with (
        patch.object(build_module.FileLock, "acquire", side_effect=denied),
        patch.object(build_module.tempfile, "mkstemp", side_effect=denied),
    ):
        after, asked = built([source(32)], tmp_path)
        assert after == before and asked == 0
        with pytest.raises(BuildError, match=r"kernel cache .*: expected .*, found Read-only"):
            built([source(64)], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"kernel cache .*/file: expected .*, found Not a dir"):
        built([source(32)], tmp_path / "file")


def test_a_full_disk_leaves_nothing_half(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        patch.object(build_module.os, "replace", side_effect=full),
        pytest.raises(BuildError, match="found No space left on device"),
    ):
        built([source(32)], tmp_path)
    assert files(tmp_path) == []


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    build([source(n) for n in (16, 32)], SM_90, lambda *done: told.append(done), tmp_path)
    assert told == [(0, 2), (1, 2), (2, 2)]
    build([source(n) for n in (16, 32)], SM_90, lambda *done: told.append(done), tmp_path)
    assert told[3:] == [(2, 2)]


def test_errors_name_the_kernel(tmp_path: Path) -> None:
    broken = source(32, TWICE.replace("tl.load(x + at)", "tl.load(x + nothing)"))
    with pytest.raises(BuildError, match="(?s)kernel twice for cuda:sm_90:.*nothing"):
        build([broken], SM_90, cache=tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("times", [0, 2])
def test_a_kernel_that_does_not_wait_once_is_refused(times: int, tmp_path: Path) -> None:
    """No one else would tell: it would be launched before what it reads is written."""
    lines = TWICE.replace("constexpr)", "constexpr, PROGRAMMATIC: tl.constexpr)").splitlines()
    text = "\n".join([*lines[:2], *["    pdl_wait(PROGRAMMATIC)"] * times, *lines[2:]]) + "\n"
    kinds = {"x": Argument("*f32", 16), "y": Argument("*f32", 16)}
    late = KernelSource.of(from_text(text, "twice"), {**kinds, "N": 32}, 1, 2, True)
    with pytest.raises(BuildError, match=f"one griddepcontrol.launch_dependents .*found {times}"):
        build([late], SM_90, cache=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_function_that_does_not_wait_is_not_programmatic(tmp_path: Path) -> None:
    kinds = {"x": Argument("*f32", 16), "y": Argument("*f32", 16)}
    plain = KernelSource.of(from_text(TWICE, "twice"), {**kinds, "N": 32}, 1, 2, True)
    assert not plain.programmatic
    assert not build([plain], SM_90, cache=tmp_path)[plain].programmatic


def test_parameters_must_be_those_of_the_function() -> None:
    with pytest.raises(ValueError, match=r"kernel copy_kernel: expected parameters .*'count_'"):
        KernelSource.of(copy_kernel, {"count_": Argument("i32")}, 1, 2, False)
