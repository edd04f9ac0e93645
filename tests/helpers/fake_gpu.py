"""The fake GPU drivers (fake_gpu.h), compiled and steered, and small programs for their kernels."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_elf import code_for
from ingot.runtime.devices.cuda import CudaApi, CudaDriver
from ingot.runtime.devices.graph_executable import GpuExecutable
from ingot.runtime.devices.hip import HipApi, HipDriver
from ingot.runtime.driver import WeightLoader
from ingot.runtime.program import Argument, Buffer, Entry, Kernel, Launch, Program, Slice
from msgspec.structs import replace
from programs import program_of, with_entries

HERE = Path(__file__).parent
COMPILE_SECONDS = 120


@dataclass(frozen=True)
class Vendor:
    """What differs between the two: `arch` is what the fake says it is, `functions` its names."""

    name: str
    folder: str  # of the headers that the triton wheel brings, in triton/backends
    driver: type[CudaDriver] | type[HipDriver]
    arch: str
    target: str
    warp: int
    functions: Mapping[str, str]


HIP = Vendor(
    "hip",
    "amd",
    HipDriver,
    "gfx942:sramecc+:xnack-",
    "hip:gfx942",
    64,
    {
        "allocate": "hipMalloc",
        "synchronize": "hipDeviceSynchronize",
        "launch": "hipGraphLaunch",
        "wait": "hipStreamSynchronize",
        "wait_event": "hipEventSynchronize",
        "to_device": "hipMemcpyHtoDAsync",
        "to_host": "hipMemcpyDtoHAsync",
        "module": "hipModuleLoadData",
        "instantiate": "hipGraphInstantiate",
        "free": "hipFree",
    },
)
CUDA = Vendor(
    "cuda",
    "nvidia",
    CudaDriver,
    "90",
    "cuda:sm_90",
    32,
    {
        "allocate": "cuMemAlloc_v2",
        "synchronize": "cuCtxSynchronize",
        "launch": "cuGraphLaunch",
        "wait": "cuStreamSynchronize",
        "wait_event": "cuEventSynchronize",
        "to_device": "cuMemcpyHtoDAsync_v2",
        "to_host": "cuMemcpyDtoHAsync_v2",
        "module": "cuModuleLoadData",
        "instantiate": "cuGraphInstantiateWithFlags",
        "free": "cuMemFree_v2",
    },
)


def compiler() -> str:
    """The C compiler; the test is skipped where there is none."""
    found = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if found is None:
        pytest.skip("needs a C compiler: none of gcc, cc, clang is on the PATH")
    return found


def headers(vendor: Vendor) -> Path:
    """The vendor's own headers, which lie in the triton wheel."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("needs triton, whose wheel brings the vendors' headers")
    return Path(spec.origin).parent / "backends" / vendor.folder / "include"


class FakeGpu:
    """One compiled fake: a driver library whose doings can be looked at."""

    def __init__(self, vendor: Vendor, path: Path) -> None:
        self.vendor, self.path = vendor, str(path)
        self._library = ctypes.CDLL(self.path)
        for name in ("fake_log", "fake_order", "fake_complaints", "fake_outstanding"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def reset(self, arch: str | None = None, device: int = 0) -> None:
        """A fresh start, as a device of `arch`; all work must happen with `device` current."""
        self._library.fake_reset((arch or self.vendor.arch).encode(), device)

    def driver(self, ordinal: int = 0) -> CudaDriver | HipDriver:
        return self.vendor.driver(ordinal, [self.path])

    def api(self) -> CudaApi | HipApi:
        """The driver's own interface, to do things beside a program: what else a process does."""
        return (CudaApi if self.vendor is CUDA else HipApi)(0, [self.path])

    def load(self, program: Program, weights: Mapping[str, Any] | None = None) -> GpuExecutable:
        loader: WeightLoader = (weights or {}).__getitem__
        return self.driver().load(program, loader)

    def fail(self, role: str, code: int, from_now: int = 1) -> str:
        """Make a coming call of a function fail; gives the function's name."""
        name = self.vendor.functions[role]
        self._library.fake_fail(name.encode(), from_now, code)
        return name

    def corrupt_copies(self, *, lost: bool) -> None:
        """Copies to the host change a byte from now on, or never happen."""
        self._library.fake_corrupt_copies(2 if lost else 1)

    def answer(self, kernel: str, param: int, word: int) -> None:
        """The real kernel's parameter points to i32 of `word` from now on, one more each launch."""
        self._library.fake_answer(kernel.encode(), param, word)

    def calls(self, role: str) -> int:
        return self.calls_by_name(self.vendor.functions[role])

    def calls_by_name(self, name: str) -> int:
        return self._library.fake_calls(name.encode())

    @property
    def current_device(self) -> int:
        return self._library.fake_current_device()

    @property
    def last_error(self) -> int:
        """What hipGetLastError would give."""
        return self._library.fake_last_error()

    @property
    def complaints(self) -> str:
        return self._library.fake_complaints().decode()

    @property
    def outstanding(self) -> list[str]:
        return self._library.fake_outstanding().decode().splitlines()

    def take_order(self) -> list[str]:
        """The roles of all calls since the last time, in their order; "" for one without."""
        roles = {name: role for role, name in self.vendor.functions.items()}
        names = self._library.fake_order().decode().split()
        self._library.fake_clear_order()
        return [roles.get(name, "") for name in names]

    def take_launches(self) -> list[dict[str, Any]]:
        """The kernels that ran since the last call, in the order in which they ran."""
        lines = self._library.fake_log().decode().splitlines()
        self._library.fake_clear_log()
        return [json.loads(line) for line in lines]


def build_fake(vendor: Vendor, folder: Path, *options: str) -> FakeGpu:
    """Compile the fake against the vendor's headers."""
    path = folder / f"libfake_{vendor.name}{len(options)}.so"
    command = [compiler(), "-shared", "-fPIC", "-std=gnu11", "-Wall", "-Werror", *options]
    command += ["-Wno-unused-variable", "-Wno-enum-compare", "-Wno-enum-conversion"]
    # Every function is one that the headers declare, just so.
    command += ["-Wmissing-prototypes"]
    command += [f"-I{headers(vendor)}"]
    command += [str(HERE / f"fake_{vendor.name}.c"), "-o", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return FakeGpu(vendor, path)


# ---- device code and programs


def image(target: str, symbols: str = "add axpy copy count noise") -> bytes:
    """An ELF header for `target`, and behind it the names of the kernels in it."""
    return code_for(target, symbols.encode() + b"\0")


POINTER, N = Argument("*f32", 16), Argument("i32")
ARGS = {
    "add": (POINTER, POINTER, POINTER, N),
    "axpy": (POINTER, POINTER, Argument("f32"), N),
    "copy": (Argument("*u8"), Argument("*u8"), Argument("i64")),
    "count": (Argument("*i32", 4), Argument("*i32", 4)),
    "noise": (Argument("*i32", 4),),
}


def kernel(vendor: Vendor, name: str, **changes: Any) -> Kernel:
    """The kernel `name` of the fake."""
    made = Kernel(name, name, image(vendor.target), num_warps=2, args=ARGS[name])
    return replace(made, **changes)


def floats(name: str, kind: Any, offset: int | None, n: int = 8) -> Buffer:
    return Buffer(name, "f32", (n,), kind, 4 * n, offset)


def view(name: str, n: int = 8, offset: int = 0) -> Slice:
    return Slice(name, "f32", (n,), offset)


def sum_program(vendor: Vendor, **changes: Any) -> Program:
    """out = (x + w) + ((x + x) + (x + w)), twice counted state beside it; edges as they must be."""
    launches = (
        Launch("add", (view("s"), view("x"), view("w"), 8), (3, 2, 1), "s"),
        Launch("add", (view("d"), view("x"), view("x"), 8), label="d"),
        Launch("add", (view("d"), view("d"), view("s"), 8), label="d+s"),
        Launch("add", (view("out"), view("s"), view("d"), 8), label="out"),
        Launch("count", (Slice("seen", "i32", (1,)), Slice("n", "i32", (1,))), label="count"),
    )
    buffers = (
        floats("x", "input", 0),
        floats("s", "scratch", 256),
        floats("d", "scratch", 512),
        floats("out", "output", 768),
        Buffer("n", "i32", (1,), "output", 4, 1024),
    )
    program = program_of(
        target=vendor.target,
        kernels={name: kernel(vendor, name) for name in ("add", "count")},
        buffers={
            "w": floats("w", "weight", None),
            "seen": Buffer("seen", "i32", (1,), "state", 4),
        },
        entry=Entry({}, buffers, launches, ((0, 2), (1, 2), (2, 3))),
        arena_bytes=1280,
    )
    return replace(program, **changes)


WEIGHTS = {"w": np.arange(8, dtype=np.float32)}


def with_launch(program: Program, index: int, **changes: Any) -> Program:
    """The program with another launch in its first entry."""
    entry, *others = program.entries
    launches = list(entry.launches)
    launches[index] = replace(launches[index], **changes)
    return with_entries(program, (replace(entry, launches=tuple(launches)), *others))


def changed_kernel(program: Program, **changes: Any) -> Program:
    """The program with another kernel `add`."""
    return replace(
        program, kernels={**program.kernels, "add": replace(program.kernels["add"], **changes)}
    )


def with_arg(program: Program, place: int, value: Any) -> Program:
    """The program, whose first launch takes `value` at `place`."""
    values = list(program.entries[0].launches[0].args)
    values[place] = value
    return with_launch(program, 0, args=tuple(values))
