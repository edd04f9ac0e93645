"""The target that a cubin or hsaco was built for, from its ELF header."""

from __future__ import annotations

import struct

from ...compiler.target import EM_AMDGPU, EM_CUDA, GPUS

_HEADER_BYTES = 64
_CLASS_64, _LITTLE_ENDIAN = 2, 1
_NAMES = {target.elf: target.name for target in GPUS.values()}
# ABI versions of cubins: up to 7 the SM number lies in bits 0 to 7 of e_flags, from 8 in 8 to 15.
_CUDA_NEW_ABI = 8


def code_target(binary: bytes | memoryview) -> str:
    """The target of device code, such as "cuda:sm_90", or a description of other data."""
    if len(binary) < _HEADER_BYTES or bytes(binary[:4]) != b"\x7fELF":
        return "no ELF file"
    if (binary[4], binary[5]) != (_CLASS_64, _LITTLE_ENDIAN):
        return "an ELF file that is not 64-bit little-endian"
    (machine,) = struct.unpack_from("<H", binary, 18)
    (flags,) = struct.unpack_from("<I", binary, 48)
    shifted = machine == EM_CUDA and binary[8] >= _CUDA_NEW_ABI
    number = (flags >> 8 if shifted else flags) & 0xFF
    if (machine, number) in _NAMES:
        return _NAMES[machine, number]
    others = {EM_CUDA: f"cuda:sm_{number}", EM_AMDGPU: f"an AMD GPU of number {number:#x}"}
    return others.get(machine, f"an ELF file for machine {machine}")
