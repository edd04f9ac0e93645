"""Which GPU a cubin or hsaco was built for, as its ELF header says."""

from __future__ import annotations

import struct

# The architecture that each target's code must be of.
EXPECTED = {
    "cuda:sm_90": "sm_90",
    "cuda:sm_100": "sm_100",
    "hip:gfx942": "gfx942",
    "hip:gfx950": "gfx950",
}
_HEADER_BYTES = 64
_CLASS_64, _LITTLE_ENDIAN = 2, 1
_EM_CUDA, _EM_AMDGPU = 190, 224
# LLVM, "User Guide for AMDGPU Backend", e_flags: EF_AMDGPU_MACH.
_AMD = {0x4C: "gfx942", 0x4F: "gfx950"}
# ABI versions of cubins: up to 7 the SM number lies in bits 0 to 7 of e_flags, from 8 in 8 to 15.
_CUDA_NEW_ABI = 8


def architecture(binary: bytes | memoryview) -> str:
    """ "sm_90", "gfx950", ..., or what else `binary` is; never fails."""
    if len(binary) < _HEADER_BYTES or bytes(binary[:4]) != b"\x7fELF":
        return "no ELF file"
    if (binary[4], binary[5]) != (_CLASS_64, _LITTLE_ENDIAN):
        return "an ELF file that is not 64-bit little-endian"
    (machine,) = struct.unpack_from("<H", binary, 18)
    (flags,) = struct.unpack_from("<I", binary, 48)
    if machine == _EM_CUDA:
        return f"sm_{(flags >> 8 if binary[8] >= _CUDA_NEW_ABI else flags) & 0xFF}"
    if machine == _EM_AMDGPU:
        return _AMD.get(flags & 0xFF, f"an AMD GPU of number {flags & 0xFF:#x}")
    return f"an ELF file for machine {machine}"


__all__ = ["EXPECTED", "architecture"]
