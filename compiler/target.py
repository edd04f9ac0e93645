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
    on paper; all 0 for the cpu, which runs the references. `launch_seconds` is what a launch of a
    replayed graph adds, `arrival_seconds` what an atomic addition does that orders memory over the
    whole device (see below).
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
    launch_seconds: float = 2e-6
    arrival_seconds: float = 1e-6
    max_threads: int = 1024
    max_grid: tuple[int, int, int] = (2**31 - 1, 65535, 65535)

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


EM_CUDA, EM_AMDGPU = 190, 224
_MI300, _MI350 = "AMD Instinct MI300X, MI325X", "AMD Instinct MI350X, MI355X"
CPU = Target("cpu", "any CPU, through the references")
# Bandwidths and multiprocessors: NVIDIA H200 and B200 data sheets; AMD CDNA 3 and CDNA 4 data
# sheets (MI300X, MI355X). Launches: on an H200 the gap between two nodes of a graph is 1.0-1.14 µs
# measured, 0.6-0.7 where PDL hides it; with it a launch of next to no work, which reads what the
# one before wrote, adds 2.3-2.7 µs to a step. AMD's is from others' reports on the MI300X, not
# measured.
# Arrivals are estimated: on NVIDIA a round trip to the L2; on AMD the L2 of an XCD is written back
# before it as well.
_AMD_LAUNCH, _AMD_ARRIVAL = 4.5e-6, 2e-6
_ROWS = (
    CPU,
    Target("cuda:sm_90", "NVIDIA H100, H200", 32, 232_448, 132, 4.8e12, (EM_CUDA, 90)),
    Target("cuda:sm_100", "NVIDIA B200", 32, 232_448, 148, 8.0e12, (EM_CUDA, 100)),
    Target(
        "hip:gfx942",
        _MI300,
        64,
        65_536,
        304,
        5.3e12,
        (EM_AMDGPU, 0x4C),
        mfma=3,
        launch_seconds=_AMD_LAUNCH,
        arrival_seconds=_AMD_ARRIVAL,
    ),
    Target(
        "hip:gfx950",
        _MI350,
        64,
        163_840,
        256,
        8.0e12,
        (EM_AMDGPU, 0x4F),
        True,
        mfma=4,
        launch_seconds=_AMD_LAUNCH,
        arrival_seconds=_AMD_ARRIVAL,
    ),
)
TARGETS = {target.name: target for target in _ROWS}
GPUS = {name: target for name, target in TARGETS.items() if target.is_gpu}


def target_of(name: str) -> Target:
    """The target called `name`; ValueError lists those there are."""
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
