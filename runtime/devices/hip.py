"""AMD GPUs through the HIP runtime (libamdhip64, ROCm 6.4 or later), without torch."""

from __future__ import annotations

import ctypes
from collections.abc import Generator, Sequence
from contextlib import contextmanager
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

from ..driver import WeightLoader
from ..program import Program
from .device_api import DeviceError, DeviceInfo, DriverMissingError, Edge, KernelNode
from .graph_executable import GpuExecutable
from .native_api import HANDLE, NativeApi, handles, open_library, pointers

# The versions first: libamdhip64.so is whatever the last development package left. A library that
# torch has loaded is found by these names as well, and is the one used.
LIBRARIES = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so")
# HIP numbers its versions major · 10⁷ + minor · 10⁵ + patch; graphs of older ones are not sound.
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
    """hipDeviceProp_tR0600; what is not read is padding."""

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


# hipError_t after which the device takes no more work: deinitialized, ECC, illegal address,
# timeout, context destroyed, assert, launch failure, unknown.
STICKY = frozenset({4, 214, 700, 702, 709, 710, 719, 999})

SHARED_NAMES = {
    "init": "hipInit",
    "synchronize": "hipDeviceSynchronize",
    "allocate": "hipMalloc",
    "free": "hipFree",
    "allocate_pinned": "hipHostMalloc",
    "free_pinned": "hipHostFree",
    "fill": "hipMemsetAsync",
    "to_device": "hipMemcpyHtoDAsync",
    "to_host": "hipMemcpyDtoHAsync",
    "create_stream": "hipStreamCreateWithFlags",
    "destroy_stream": "hipStreamDestroy",
    "wait_stream": "hipStreamSynchronize",
    "create_event": "hipEventCreateWithFlags",
    "destroy_event": "hipEventDestroy",
    "record_event": "hipEventRecord",
    "wait_event": "hipEventSynchronize",
    "elapsed_ms": "hipEventElapsedTime",
    "load_module": "hipModuleLoadData",
    "unload_module": "hipModuleUnload",
    "get_function": "hipModuleGetFunction",
    "create_graph": "hipGraphCreate",
    "destroy_graph": "hipGraphDestroy",
    "launch": "hipGraphLaunch",
    "destroy_executable": "hipGraphExecDestroy",
}
OWN_SIGNATURES = {
    "hipRuntimeGetVersion": (POINTER(c_int),),
    "hipGetDevice": (POINTER(c_int),),
    "hipSetDevice": (c_int,),
    "hipGetLastError": (),
    "hipGetDevicePropertiesR0600": (POINTER(DeviceProperties), c_int),
    "hipGraphAddKernelNode": (HANDLE, c_void_p, c_void_p, c_size_t, POINTER(KernelNodeParams)),
    "hipGraphInstantiate": (HANDLE, c_void_p, HANDLE, c_char_p, c_size_t),
}
# These two give their text back instead of a code.
TEXTS = ("hipGetErrorName", "hipGetErrorString")


class HipApi(NativeApi):
    """One AMD GPU, in its primary context: the one that torch uses too."""

    has_programmatic_edges = False

    def __init__(self, ordinal: int = 0, libraries: Sequence[str] = LIBRARIES) -> None:
        """Start the runtime and look at device `ordinal`.

        DriverMissingError without a driver; DeviceError when there is no such device.
        """
        super().__init__(open_library(libraries), SHARED_NAMES, OWN_SIGNATURES, STICKY)
        for name in TEXTS:
            function = getattr(self._library, name)
            function.argtypes, function.restype = (c_int,), c_char_p
        self._ordinal = ordinal
        version = c_int()
        self._call("hipRuntimeGetVersion", byref(version))
        if version.value < OLDEST:
            raise DriverMissingError(
                f"{self._library._name}: expected HIP {OLDEST} (6.4) or later, "
                f"found {version.value}"
            )
        self._call("init", 0)
        properties = DeviceProperties()
        self._call("hipGetDevicePropertiesR0600", byref(properties), ordinal)
        # gfx942:sramecc+:xnack-: what follows the name are switches.
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

    def _call(self, role: str, *args: Any) -> None:
        try:
            super()._call(role, *args)
        except DeviceError:
            # The error is told here. It must not be left to be this thread's last one: torch asks
            # for that after launches of its own.
            self._functions["hipGetLastError"]()
            raise

    def _error_text(self, code: int) -> str:
        return ": ".join(
            getattr(self._library, name)(code).decode(errors="replace") for name in TEXTS
        )

    def open(self) -> None:
        """Nothing to hold: the runtime keeps the primary context for the process."""

    def close(self) -> None:
        """Nothing to let go of; see open."""

    @contextmanager
    def current(self) -> Generator[None]:
        before = c_int()
        self._call("hipGetDevice", byref(before))
        self._call("hipSetDevice", self._ordinal)
        try:
            yield
        except BaseException:
            # Of two errors the first is the cause: this one is not looked at.
            self._functions["hipSetDevice"](before.value)
            raise
        self._call("hipSetDevice", before.value)

    def allow_shared(self, function: int, nbytes: int) -> None:
        """Nothing to ask for: on AMD a launch may use all of a block's LDS."""

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
        return self._create("hipGraphAddKernelNode", graph, before, len(edges), byref(kernel))

    def instantiate(self, graph: int, stream: int) -> int:
        return self._create("hipGraphInstantiate", graph, None, None, 0)


class HipDriver:
    """Runs programs on one AMD GPU."""

    def __init__(self, ordinal: int = 0, libraries: Sequence[str] = LIBRARIES) -> None:
        """DriverMissingError without a driver; DeviceError when there is no such device."""
        self._ordinal, self._libraries = ordinal, libraries
        self.info = HipApi(ordinal, libraries).info
        self.target = self.info.target

    @staticmethod
    def find(libraries: Sequence[str] = LIBRARIES) -> str | None:
        """The target of device 0, such as hip:gfx942, or None where there is no such device."""
        try:
            return HipApi(0, libraries).info.target
        except (DriverMissingError, DeviceError):
            return None

    def load(self, program: Program, weights: WeightLoader) -> GpuExecutable:
        """See Driver.load, and GpuExecutable for the other errors."""
        return GpuExecutable(program, HipApi(self._ordinal, self._libraries), weights)
