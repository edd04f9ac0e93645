"""`GpuDriver`: runtime.driver.Driver for one GPU, over its C interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..driver import WeightLoader
from ..program import Program
from .device_api import DeviceError, DriverMissingError
from .graph_executable import GpuExecutable
from .native_api import NativeApi


class GpuDriver:
    """Runs programs on one GPU through the C interface `api`."""

    api: ClassVar[type[NativeApi]]

    def __init__(self, ordinal: int = 0, libraries: Sequence[str] | None = None) -> None:
        """DriverMissingError without a driver; DeviceError when there is no such device."""
        self._ordinal, self._libraries = ordinal, libraries
        self.info = self.api(ordinal, libraries).info
        self.target = self.info.target

    @classmethod
    def find(cls, libraries: Sequence[str] | None = None) -> str | None:
        """The target of device 0, such as hip:gfx942; None without such a device.

        CUDA: makes no context, but starts the driver, which forked processes cannot use then.
        """
        try:
            return cls(0, libraries).target
        except (DriverMissingError, DeviceError):
            return None

    def load(self, program: Program, weights: WeightLoader) -> GpuExecutable:
        """See Driver.load, and GpuExecutable for the other errors."""
        return GpuExecutable(program, self.api(self._ordinal, self._libraries), weights)


__all__ = ["GpuDriver"]
