"""Programs that a device cannot run are refused before anything is allocated, with the place."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from fake_gpu import (
    CUDA,
    HIP,
    Vendor,
    changed_kernel,
    image,
    sum_program,
    view,
    with_arg,
    with_launch,
)
from ingot.runtime.device_api import DeviceInfo
from ingot.runtime.gpu_checks import byte_range, check_program
from ingot.runtime.program import Argument, Slice


def device(vendor: Vendor) -> DeviceInfo:
    """A device of the vendor's: what the fakes say they are."""
    return DeviceInfo(
        ordinal=0,
        name="it",
        target=vendor.target,
        warp=vendor.warp,
        memory_bytes=1 << 30,
        shared_bytes=65536,
        max_threads=1024,
        max_grid=((1 << 31) - 1, 65535, 65535),
    )


A4 = Argument("*f32", 16)


REFUSED: dict[str, tuple[Any, str]] = {
    "target": (lambda p: replace(p, target="cpu"), "built for cpu, and the device is "),
    "callable": (lambda p: changed_kernel(p, binary=print), "expected device code"),
    "no ELF": (lambda p: changed_kernel(p, binary=b"PK" * 64), "expected a 64-bit little-endian"),
    "short": (lambda p: changed_kernel(p, binary=b"\x7fELF"), "expected an ELF file, found 4"),
    "block": (lambda p: changed_kernel(p, num_warps=64), "expected a block of 1 to 1024 threads"),
    "shared memory": (lambda p: changed_kernel(p, shared=1 << 20), "bytes of shared memory"),
    "kind": (lambda p: changed_kernel(p, args=(Argument("u7"),) * 4), "unknown kind 'u7'"),
    "promise": (lambda p: changed_kernel(p, args=(Argument("f32", 2),) * 4), "cannot be promised"),
    "no kernel": (lambda p: with_launch(p, 0, kernel="mul"), "no such kernel"),
    "count": (lambda p: with_launch(p, 0, args=(view("s"),)), "expected 4 arguments, found 1"),
    "number for a slice": (lambda p: with_arg(p, 1, 3), "expected a slice of f32"),
    "slice for a number": (lambda p: with_arg(p, 3, view("x")), "expected i32"),
    "float for an int": (lambda p: with_arg(p, 3, 1.5), "expected i32, found 1.5"),
    "bool for an int": (lambda p: with_arg(p, 3, True), "expected i32, found True"),
    "too large": (lambda p: with_arg(p, 3, 1 << 31), "does not fit i32"),
    "dtype": (
        lambda p: with_arg(p, 1, Slice("x", "i32", (8,))),
        "expected a slice of f32, found one of i32",
    ),
    "no buffer": (lambda p: with_arg(p, 1, view("q")), "no buffer q"),
    "past the end": (
        lambda p: with_arg(p, 1, view("x", 8, 4)),
        "bytes 4 to 36 are outside buffer x of 32 bytes",
    ),
    "before the start": (
        lambda p: with_arg(p, 1, Slice("x", "f32", (2,), 0, (-1,))),
        "bytes -4 to 4 are outside buffer x",
    ),
    "strides past the end": (
        lambda p: with_arg(p, 1, Slice("x", "f32", (2, 3), 0, (1, 4))),
        "bytes 0 to 40 are outside buffer x",
    ),
    "ranks": (
        lambda p: with_arg(p, 1, Slice("x", "f32", (2,), 0, (1, 1))),
        "expected 1 strides",
    ),
    "number promise": (
        lambda p: changed_kernel(p, args=(A4, A4, A4, Argument("i32", 16))),
        "promised a multiple of 16, found 8",
    ),
    "grid of none": (lambda p: with_launch(p, 0, grid=(0, 1, 1)), "expected a grid of 1 to"),
    "grid": (lambda p: with_launch(p, 0, grid=(1, 65536, 1)), r"found \(1, 65536, 1\) blocks"),
    "threads": (lambda p: with_launch(p, 0, grid=(1 << 26, 1, 1)), r"fewer than 2³² threads"),
    "place": (
        lambda p: with_launch(p, 0, kernel="mul"),
        r"entry only, launch 0 \(s\) of kernel mul",
    ),
    "arena": (lambda p: replace(p, arena_bytes=1024), "outside the arena of 1024 bytes"),
    "bytes": (
        lambda p: replace(p, buffers={**p.buffers, "w": replace(p.buffers["w"], nbytes=31)}),
        r"f32\[8\] is 32 bytes, found 31",
    ),
    "edge backwards": (
        lambda p: replace(p, entries=(replace(p.entries[0], dependencies=((3, 1),)),)),
        r"found \(3, 1\)",
    ),
    "edge twice": (
        lambda p: replace(p, entries=(replace(p.entries[0], dependencies=((0, 1), (0, 1))),)),
        "stands there twice",
    ),
}


@pytest.mark.parametrize("vendor", [HIP, CUDA], ids=lambda v: v.name)
@pytest.mark.parametrize("case", REFUSED)
def test_programs_that_cannot_run(vendor: Vendor, case: str) -> None:
    change, message = REFUSED[case]
    program = sum_program(vendor)
    check_program(program, device(vendor))
    with pytest.raises(ValueError, match=message):
        check_program(change(program), device(vendor))


@pytest.mark.parametrize("vendor", [HIP, CUDA], ids=lambda v: v.name)
@pytest.mark.parametrize(
    ("other", "flags"),
    [("hip:gfx950", None), ("cuda:sm_100", None), ("hip:gfx942", 0x3F), ("cuda:sm_90", 0x6005904)],
)
def test_code_for_another_device(vendor: Vendor, other: str, flags: int | None) -> None:
    binary = image(other, flags=flags)
    program = changed_kernel(sum_program(vendor), binary=binary)
    wanted = re.escape(vendor.target)
    with pytest.raises(ValueError, match=f"kernel add: expected code for {wanted}, found code for"):
        check_program(program, device(vendor))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Slice("x", "f32", (2, 3), 8), (8, 32)),
        (Slice("x", "f32", (2, 3), 8, (8, 1)), (8, 8 + 4 * 11)),
        (Slice("x", "f32", (2, 3), 8, (0, 1)), (8, 20)),
        (Slice("x", "bf16", (4,), 8, (-1,)), (2, 10)),
        (Slice("x", "f32", (0, 3), 8, (100, 1)), (8, 8)),
        (Slice("x", "f4e2m1", (3,), 1), (1, 3)),
        (Slice("x", "f4e2m1", (3,), 1, (2,)), (1, 4)),
    ],
)
def test_bytes_of_slices(part: Slice, expected: tuple[int, int]) -> None:
    assert byte_range(part) == expected
