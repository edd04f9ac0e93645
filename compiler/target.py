"""The hardware that code is built for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One kind of device.

    `warp` is threads a warp, `shared_bytes` shared memory (LDS) a block may use,
    `bytes_per_second` memory bandwidth on paper; all 0 for the cpu, which runs the references.
    `scaled_conversions` says whether it has instructions that turn MXFP4 codes and a scale into
    numbers (v_cvt_scalef32_pk_*_fp4); `mfma` is the generation of AMD's matrix cores, 0 for none.
    """

    name: str
    title: str
    warp: int = 0
    shared_bytes: int = 0
    bytes_per_second: float = 0.0
    scaled_conversions: bool = False
    mfma: int = 0

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


CPU = Target("cpu", "any CPU, through the references")
# Bandwidths: NVIDIA H200 and B200 data sheets; AMD CDNA 3 and CDNA 4 data sheets (MI300X, MI355X).
TARGETS = {
    target.name: target
    for target in (
        CPU,
        Target("cuda:sm_90", "NVIDIA H100, H200", 32, 232_448, 4.8e12),
        Target("cuda:sm_100", "NVIDIA B200", 32, 232_448, 8.0e12),
        Target("hip:gfx942", "AMD Instinct MI300X, MI325X", 64, 65_536, 5.3e12, mfma=3),
        Target(
            "hip:gfx950",
            "AMD Instinct MI350X, MI355X",
            64,
            163_840,
            8.0e12,
            scaled_conversions=True,
            mfma=4,
        ),
    )
}


def target_of(name: str) -> Target:
    """The target called `name`; ValueError lists those there are."""
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
