"""The driver of a target: the one place that knows which there are. Each is imported when it is
asked for: the cpu's brings torch, and those of GPUs look for a device."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..runtime.driver import Driver

# Kind of GPU target -> its driver, in the module of `runtime` that is called like the kind.
_GPU_DRIVERS = {"cuda": "CudaDriver", "hip": "HipDriver"}
_RUNTIME = __name__.rsplit(".", 2)[0] + ".runtime"


class NoDriverError(RuntimeError):
    """This version has no driver for a target."""


def driver_for(target: str) -> Driver:
    """A driver for programs of `target`.

    NoDriverError where this version has none; a GPU's own error, in one line, where the machine has
    no such device.
    """
    kind = target.partition(":")[0]
    if kind == "cpu":
        from ..runtime.cpu import CpuDriver

        return CpuDriver()
    if kind not in _GPU_DRIVERS or find_spec(f"{_RUNTIME}.{kind}") is None:
        raise NoDriverError(f"this version has no driver that runs programs for {target}")
    made: Any = getattr(import_module(f"{_RUNTIME}.{kind}"), _GPU_DRIVERS[kind])()
    return made


__all__ = ["NoDriverError", "driver_for"]
