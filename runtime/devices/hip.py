"""AMD GPUs through the HIP runtime (libamdhip64, ROCm 6.4 or later), without torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_byte,
    c_char,
    c_char_p,
    c_int,
    c_size_t,
    c_uint,
    c_void_p,
)
from typing import Any

from .device_api import (
    HANDLE,
    DeviceApi,
    DeviceError,
    DeviceInfo,
    DriverMissingError,
    Edge,
    KernelNode,
    handles,
    pointers,
)
from .graph_executable import GpuDriver

# HIP numbers its versions major · 10⁷ + minor · 10⁵ + patch; graphs of older ones are unsound.
OLDEST = 6 * 10**7 + 4 * 10**5


class KernelNodeParams(Structure):
    """hipKernelNodeParams."""

    _fields_ = (
        ("blockDim", c_uint * 3),
        ("extra", c_void_p),
        ("func", c_void_p),
        ("gridDim", c_uint * 3),
        ("kernelParams", c_void_p),
        ("sharedMemBytes", c_uint),
    )


class DeviceProperties(Structure):
    """hipDeviceProp_tR0600; fields that are not read are padding."""

    _fields_ = (
        ("name", c_char * 256),
        ("unread0", c_byte * 32),
        ("totalGlobalMem", c_size_t),
        ("sharedMemPerBlock", c_size_t),
        ("unread1", c_byte * 4),
        ("warpSize", c_int),
        ("unread2", c_byte * 8),
        ("maxThreadsPerBlock", c_int),
        ("unread3", c_byte * 12),
        ("maxGridSize", c_int * 3),
        ("unread4", c_byte * 812),
        ("gcnArchName", c_char * 256),
        ("unread5", c_byte * 56),
    )


# hipError_t after which the device is unusable: deinitialized, ECC, illegal address,
# timeout, context destroyed, assert, launch failure, unknown.
STICKY = frozenset({4, 214, 700, 702, 709, 710, 719, 999})

OWN_SIGNATURES = {
    "hipRuntimeGetVersion": (POINTER(c_int),),
    "hipGetDevice": (POINTER(c_int),),
    "hipSetDevice": (c_int,),
    "hipGetLastError": (),
    "hipGetDevicePropertiesR0600": (POINTER(DeviceProperties), c_int),
    "hipGraphAddKernelNode": (HANDLE, c_void_p, c_void_p, c_size_t, POINTER(KernelNodeParams)),
    "hipGraphInstantiate": (HANDLE, c_void_p, HANDLE, c_char_p, c_size_t),
}
# These two return their text instead of a code.
TEXTS = ("hipGetErrorName", "hipGetErrorString")


class HipApi(DeviceApi):
    """One AMD GPU, in its primary context, which the runtime keeps for the process."""

    vendor = "hip"
    has_programmatic_edges = False
    # Versioned names first: libamdhip64.so is whatever the last development package left. If torch
    # has loaded a library of one of these names, that one is used.
    libraries = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so")
    own_signatures, sticky = OWN_SIGNATURES, STICKY

    def __init__(self, ordinal: int = 0, libraries: Sequence[str] | None = None) -> None:
        """See DeviceApi. DriverMissingError also for a HIP older than 6.4."""
        super().__init__(ordinal, libraries)
        for name in TEXTS:
            self._bind(name, (c_int,), c_char_p)
        version = c_int()
        self.call("hipRuntimeGetVersion", byref(version))
        if version.value < OLDEST:
            raise DriverMissingError(
                f"{self._library._name}: expected HIP {OLDEST} (6.4) or later, "
                f"found {version.value}"
            )
        self.init()
        properties = DeviceProperties()
        self.call("hipGetDevicePropertiesR0600", byref(properties), ordinal)
        # gfx942:sramecc+:xnack-: the name is followed by feature flags.
        arch = properties.gcnArchName.decode(errors="replace").partition(":")[0]
        x, y, z = properties.maxGridSize
        self.info = DeviceInfo(
            ordinal=ordinal,
            name=properties.name.decode(errors="replace"),
            target=f"hip:{arch}",
            warp=properties.warpSize,
            memory_bytes=properties.totalGlobalMem,
            shared_bytes=properties.sharedMemPerBlock,
            max_threads=properties.maxThreadsPerBlock,
            max_grid=(x, y, z),
        )

    def call(self, name: str, *args: Any) -> None:
        """See DeviceApi."""
        try:
            super().call(name, *args)
        except DeviceError:
            # Reported here, so cleared: torch reads the thread's last error after its launches.
            self._functions["hipGetLastError"]()
            raise

    def _error_text(self, code: int) -> str:
        return ": ".join(
            getattr(self._library, name)(code).decode(errors="replace") for name in TEXTS
        )

    def _enter(self) -> tuple[Any, ...]:
        before = c_int()
        self.call("hipGetDevice", byref(before))
        self.call("hipSetDevice", self._ordinal)
        return "hipSetDevice", before.value

    def add_kernel_node(self, graph: int, node: KernelNode, edges: Sequence[Edge]) -> int:
        """See DeviceApi. HIP has no programmatic edges: ValueError for one."""
        if any(edge.programmatic for edge in edges):
            raise ValueError("HIP graphs have no programmatic edges; expected full ones")
        params = pointers(node.params)
        kernel = KernelNodeParams(
            blockDim=(node.threads, 1, 1),
            func=node.function,
            gridDim=node.grid,
            kernelParams=ctypes.addressof(params),
            sharedMemBytes=node.shared,
        )
        before = handles([edge.node for edge in edges])
        return self.create("hipGraphAddKernelNode", graph, before, len(edges), byref(kernel))

    def instantiate(self, graph: int, stream: int) -> int:
        return self.create("hipGraphInstantiate", graph, None, None, 0)


class HipDriver(GpuDriver):
    """Runs programs on one AMD GPU."""

    api = HipApi
