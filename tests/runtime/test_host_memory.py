"""Limits on memory: the machine's, a cgroup's of either version, and resource limits."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from ingot.runtime import host_memory as module
from ingot.runtime.host_memory import HostMemory, NotEnoughMemory, check_host_memory, host_memory

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file system of our own in place of /proc/self and /sys/fs/cgroup."""
    monkeypatch.setattr(module, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(module, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc").mkdir()
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: unlimited)
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_limits_it_is_the_machines(system: Path) -> None:
    assert host_memory() == HostMemory(MACHINE, "this machine's memory")


@pytest.mark.parametrize("limited", ["a/b", "a", "."])
def test_cgroups_around_the_process_count(system: Path, limited: str) -> None:
    _write(system / "proc/cgroup", "0::/a/b\n")
    _write(system / "cgroup/a/b/memory.max", "max\n")
    _write(system / "cgroup" / limited / "memory.max", "1048576\n")
    assert host_memory() == HostMemory(1 << 20, "this process's cgroup")


def test_cgroups_of_version_1(system: Path) -> None:
    _write(system / "proc/cgroup", "3:cpuset:/\n4:memory,hugetlb:/job\n")
    _write(system / "cgroup/memory/job/memory.limit_in_bytes", "4096\n")
    _write(system / "cgroup/memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert host_memory() == HostMemory(4096, "this process's cgroup")


@pytest.mark.parametrize("text", ["", "nonsense", "0::", "0::/../..\n"])
def test_files_that_say_nothing_are_no_limits(system: Path, text: str) -> None:
    _write(system / "proc/cgroup", text)
    assert host_memory().nbytes == MACHINE


def test_what_does_not_fit_is_told_in_one_line(system: Path) -> None:
    check_host_memory(MACHINE, "m")
    with pytest.raises(NotEnoughMemory, match=f"^m: .* the {MACHINE} bytes of this m.*; use less$"):
        check_host_memory(MACHINE + 1, "m", "use less")


def test_resource_limits_count_without_what_is_held() -> None:
    code = (
        "import resource; from ingot.runtime.host_memory import host_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "print(host_memory().source, host_memory().nbytes)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    source, found = run.stdout.split()
    assert source == "RLIMIT_AS" and 1 << 30 < int(found) < 2 << 30


def test_the_limit_of_this_process_is_found() -> None:
    with patch.object(module, "_cgroup_limits", lambda: iter(())):
        assert host_memory().nbytes <= MACHINE
