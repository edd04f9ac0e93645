"""The targets: one row each, with the limits of a launch and how device code names them.

Standard library only: the compiler and the runtime share this table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One kind of device.

    `warp` is threads a warp, `shared_bytes` shared memory (LDS) a block may use,
    `multiprocessors` how many (compute units) the device has, `bytes_per_second` memory bandwidth
    on paper; all 0 for the cpu, which runs the references.
    `elf` is the machine of its device code and its number there: the SM version, or EF_AMDGPU_MACH
    (LLVM, "User Guide for AMDGPU Backend", e_flags). `scaled_conversions` says whether it has
    instructions that turn MXFP4 codes and a scale into numbers (v_cvt_scalef32_pk_*_fp4); `mfma` is
    the generation of AMD's matrix cores, 0 for none. A block has up to `max_threads` threads, and a
    launch up to `max_grid` blocks along x, y and z.
    """

    name: str
    title: str
    warp: int = 0
    shared_bytes: int = 0
    multiprocessors: int = 0
    bytes_per_second: float = 0.0
    elf: tuple[int, int] = (0, 0)
    scaled_conversions: bool = False
    mfma: int = 0
    max_threads: int = 1024
    max_grid: tuple[int, int, int] = (2**31 - 1, 65535, 65535)

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


EM_CUDA, EM_AMDGPU = 190, 224
_MI300, _MI350 = "AMD Instinct MI300X, MI325X", "AMD Instinct MI350X, MI355X"
CPU = Target("cpu", "any CPU, through the references")
# Bandwidths and multiprocessors: NVIDIA H200 and B200 data sheets; AMD CDNA 3 and CDNA 4 data
# sheets (MI300X, MI355X).
_ROWS = (
    CPU,
    Target("cuda:sm_90", "NVIDIA H100, H200", 32, 232_448, 132, 4.8e12, (EM_CUDA, 90)),
    Target("cuda:sm_100", "NVIDIA B200", 32, 232_448, 148, 8.0e12, (EM_CUDA, 100)),
    Target("hip:gfx942", _MI300, 64, 65_536, 304, 5.3e12, (EM_AMDGPU, 0x4C), mfma=3),
    Target("hip:gfx950", _MI350, 64, 163_840, 256, 8.0e12, (EM_AMDGPU, 0x4F), True, mfma=4),
)
TARGETS = {target.name: target for target in _ROWS}
GPUS = {name: target for name, target in TARGETS.items() if target.is_gpu}


def target_of(name: str) -> Target:
    """The target called `name`; ValueError lists those there are."""
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
