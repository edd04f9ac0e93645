"""Device code with nothing in it but an ELF header: what says which target it is for."""

from __future__ import annotations

import struct

EM_CUDA, EM_AMDGPU = 190, 224
# Machine, flags and ABI version of what Triton 3.7 builds.
HEADERS = {
    "cuda:sm_90": (EM_CUDA, 0x6005A04, 8),
    "cuda:sm_100": (EM_CUDA, 0x6006402, 8),
    "hip:gfx942": (EM_AMDGPU, 0x54C, 4),
    "hip:gfx950": (EM_AMDGPU, 0x54F, 4),
}


def elf(machine: int, flags: int, abi: int = 8, body: bytes = b"") -> bytes:
    """A 64-bit little-endian ELF header, and `body` behind its 64 bytes."""
    ident = b"\x7fELF" + bytes([2, 1, 1, 0x41, abi]) + bytes(7)
    rest = struct.pack("<2HI3QI6H", 2, machine, 1, 0, 0, 0, flags, 64, 0, 0, 0, 0, 0)
    return ident + rest + body


def code_for(target: str, body: bytes = b"") -> bytes:
    """Code for `target`."""
    return elf(*HEADERS[target], body)
