"""The host memory that this process may have: the machine's, its cgroup's, its resource limits'."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PROC, _CGROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")


class NotEnoughMemory(MemoryError):
    """A program needs more host memory than there is; one line."""


@dataclass(frozen=True, order=True)
class HostMemory:
    """At most `nbytes`, by `source`."""

    nbytes: int
    source: str


def host_memory() -> HostMemory:
    """The smallest limit on what this process may have.

    Of the machine and its cgroup in all, of resource limits (RLIMIT_AS, RLIMIT_DATA) what the
    process does not have yet.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(
        (HostMemory(machine, "this machine's memory"), *_cgroup_limits(), *_resource_limits())
    )


def check_host_memory(needed: int, what: str, mend: str = "") -> None:
    """NotEnoughMemory unless `needed` bytes fit."""
    memory = host_memory()
    if needed > memory.nbytes:
        raise NotEnoughMemory(
            f"{what}: expected to need at most the {memory.nbytes} bytes of {memory.source}, found "
            f"{needed}{mend and f'; {mend}'}"
        )


def _cgroup_limits() -> Iterator[HostMemory]:
    """Of the groups that this process is in, and of those around them, by version 2 and 1."""
    try:
        lines = (_PROC / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            root, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = PurePosixPath(group.lstrip("/"))
        for folder in (inner, *inner.parents):
            with suppress(OSError, ValueError):  # "max" is no limit; a namespace hides groups
                limit = int((root / folder / name).read_text(encoding="ascii"))
                yield HostMemory(limit, "this process's cgroup")


def _resource_limits() -> Iterator[HostMemory]:
    for kind, name, field in (
        (resource.RLIMIT_AS, "RLIMIT_AS", "VmSize"),
        (resource.RLIMIT_DATA, "RLIMIT_DATA", "VmData"),
    ):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield HostMemory(max(soft - _held(field), 0), name)


def _held(field: str) -> int:
    """Bytes by a field of /proc/self/status; 0 where there is none."""
    with suppress(OSError):
        for line in (_PROC / "status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
    return 0
