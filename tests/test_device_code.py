"""The target of device code, read from what Triton really builds for each target."""

from __future__ import annotations

import re

import pytest
import triton
import triton.language as tl
from fake_gpu import FLAGS, image
from ingot.runtime.device_code import code_target
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "cuda:sm_90": (GPUTarget("cuda", 90, 32), "cubin"),
    "cuda:sm_100": (GPUTarget("cuda", 100, 32), "cubin"),
    "hip:gfx942": (GPUTarget("hip", "gfx942", 64), "hsaco"),
    "hip:gfx950": (GPUTarget("hip", "gfx950", 64), "hsaco"),
}


@triton.jit
def _increment(x_ptr):
    place = x_ptr + tl.program_id(0)
    tl.store(place, tl.load(place) + 1)


@pytest.mark.parametrize("target", TARGETS)
def test_what_triton_builds(target: str) -> None:
    gpu, kind = TARGETS[target]
    built = triton.compile(ASTSource(_increment, {"x_ptr": "*i32"}, {}), target=gpu)
    assert code_target(built.asm[kind]) == target


@pytest.mark.parametrize("target", FLAGS)
def test_headers_of_the_fakes(target: str) -> None:
    assert code_target(image(target)) == target


@pytest.mark.parametrize(
    ("abi", "flags", "target"),
    # ptxas 12.8, 13.0 and 13.1 on sm_90; sm_80, which no target is, has a name too.
    [(7, 0x5A0D5A, "cuda:sm_90"), (8, 0x6005A04, "cuda:sm_90"), (7, 0x500550, "cuda:sm_80")],
)
def test_both_places_of_the_sm(abi: int, flags: int, target: str) -> None:
    header = bytearray(image("cuda:sm_90", flags=flags))
    header[8] = abi
    assert code_target(bytes(header)) == target


def test_amd_machines_without_a_name() -> None:
    assert code_target(image("hip:gfx942", flags=0x53F)) == "hip:machine 0x3f"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected an ELF file, found 0 bytes"),
        (b"\x7fELF\x01\x01" + bytes(70), "begins 7f454c460101"),
        (image("cuda:sm_90")[:18] + b"\x3e\x00" + image("cuda:sm_90")[20:], "for machine 62"),
    ],
)
def test_what_is_no_device_code(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        code_target(data)
