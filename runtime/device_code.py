"""What a piece of device code was built for, read from its ELF header."""

from __future__ import annotations

import struct

# e_machine of CUDA and of AMD GPUs in the registry of ELF machines.
EM_CUDA = 190
EM_AMDGPU = 224
# EF_AMDGPU_MACH of LLVM's AMDGPU usage guide: the low byte of e_flags.
AMD_MACHINES = {0x4C: "gfx942", 0x4F: "gfx950"}

_IDENT = struct.Struct("<4sBBBBB")
_MACHINE_AT, _FLAGS_AT = 18, 48
_HEADER_BYTES = 64


def code_target(image: bytes) -> str:
    """The target that `image` (a cubin or hsaco) runs on, such as cuda:sm_90.

    ValueError for what is no 64-bit little-endian ELF file of a known kind of GPU.
    """
    if len(image) < _HEADER_BYTES:
        raise ValueError(f"expected an ELF file, found {len(image)} bytes")
    magic, width, order, _, _, abi = _IDENT.unpack_from(image)
    if (magic, width, order) != (b"\x7fELF", 2, 1):
        raise ValueError(
            f"expected a 64-bit little-endian ELF file, found a file that begins {image[:6].hex()}"
        )
    (machine,) = struct.unpack_from("<H", image, _MACHINE_AT)
    (flags,) = struct.unpack_from("<I", image, _FLAGS_AT)
    if machine == EM_AMDGPU:
        low = flags & 0xFF
        return f"hip:{AMD_MACHINES.get(low, f'machine {low:#x}')}"
    if machine == EM_CUDA:
        # The number of the SM moved up by a byte with ABI version 8 (CUDA 13, and sm_100 before).
        return f"cuda:sm_{flags >> 8 & 0xFF if abi >= 8 else flags & 0xFF}"
    raise ValueError(f"expected code for a GPU, found an ELF file for machine {machine}")
