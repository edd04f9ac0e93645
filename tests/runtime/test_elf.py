"""The target of device code, read from what Triton really builds for each target."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl
from fake_elf import HEADERS, code_for, elf
from ingot.compiler.target import GPUS
from ingot.runtime.devices.elf import code_target
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM_90 = code_for("cuda:sm_90")


@triton.jit
def _increment(x_ptr):
    place = x_ptr + tl.program_id(0)
    tl.store(place, tl.load(place) + 1)


@pytest.mark.parametrize("target", GPUS)
def test_what_triton_builds(target: str) -> None:
    backend, arch = target.split(":")
    number = int(arch.removeprefix("sm_")) if backend == "cuda" else arch
    gpu = GPUTarget(backend, number, GPUS[target].warp)
    built = triton.compile(ASTSource(_increment, {"x_ptr": "*i32"}, {}), target=gpu)
    assert code_target(built.asm["cubin" if backend == "cuda" else "hsaco"]) == target


@pytest.mark.parametrize("target", HEADERS)
def test_headers_of_the_fakes(target: str) -> None:
    assert code_target(code_for(target)) == target
    assert code_target(memoryview(code_for(target, b"more"))) == target


@pytest.mark.parametrize(
    ("code", "found"),
    [
        # ptxas 12.8, 13.0 and 13.1; what no target is has a name too.
        (elf(190, 0x5A0D5A, abi=7), "cuda:sm_90"),
        (elf(190, 0x6005A04), "cuda:sm_90"),
        (elf(190, 0x600640A), "cuda:sm_100"),
        (elf(190, 0x500550, abi=7), "cuda:sm_80"),
        (elf(190, 0x6005904), "cuda:sm_89"),
        (elf(224, 0x54C), "hip:gfx942"),
        (elf(224, 0x52C), "an AMD GPU of number 0x2c"),
        (elf(224, 0x53F), "an AMD GPU of number 0x3f"),
        (elf(62, 0), "an ELF file for machine 62"),
        (SM_90[:63], "no ELF file"),
        (b"PK" * 64, "no ELF file"),
        (b"", "no ELF file"),
        (SM_90[:4] + b"\x01" + SM_90[5:], "an ELF file that is not 64-bit little-endian"),
        (SM_90[:5] + b"\x02" + SM_90[6:], "an ELF file that is not 64-bit little-endian"),
    ],
)
def test_what_code_is_for(code: bytes, found: str) -> None:
    assert code_target(code) == found
