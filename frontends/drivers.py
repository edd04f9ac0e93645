"""The driver of each target, imported on use: that of the cpu imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runtime.driver import Driver
from .options import AUTO

if TYPE_CHECKING:
    from ..runtime.devices.graph_executable import GpuDriver

CPU = "cpu"


class NoDriverError(RuntimeError):
    """This version has no driver for a target."""


def driver_for(target: str) -> Driver:
    """A driver for programs of `target`.

    NoDriverError where this version has none; a GPU's own error, in one line, where the machine has
    no such device.
    """
    kind = target.partition(":")[0]
    if kind == "cpu":
        from ..codegen.cpu import CpuDriver

        return CpuDriver()
    if kind == "cuda":
        from ..runtime.devices.cuda import CudaDriver

        return CudaDriver()
    if kind == "hip":
        from ..runtime.devices.hip import HipDriver

        return HipDriver()
    raise NoDriverError(f"this version has no driver that runs programs for {target}")


def driver_here(target: str) -> Driver:
    """As `driver_for`; NoDriverError also when the present device has another target."""
    driver = driver_for(target)
    if driver.target != target:
        raise NoDriverError(f"expected a device for {target}, found one for {driver.target}")
    return driver


def gpu_here(target: str) -> GpuDriver:
    """As `driver_here`, for a GPU: the first of this machine for "auto". NoDriverError else."""
    from ..runtime.devices.graph_executable import GpuDriver

    driver = driver_here(present_target() if target == AUTO else target)
    if not isinstance(driver, GpuDriver):
        raise NoDriverError(f"expected a GPU, found {driver.target}, which launches no kernels")
    return driver


def present_target() -> str:
    """The target of the first GPU of this machine that code can be generated for, or cpu."""
    from ..compiler.target import TARGETS
    from ..runtime.devices.cuda import CudaDriver
    from ..runtime.devices.hip import HipDriver

    found = CudaDriver.find() or HipDriver.find()
    return found if found and found in TARGETS else CPU
