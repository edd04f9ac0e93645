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

from .device_api import DeviceError, DeviceInfo, DriverMissingError, Edge, KernelNode
from .gpu_driver import GpuDriver
from .native_api import HANDLE, NativeApi, handles, pointers

# Versioned names first: libamdhip64.so is whatever the last development package left. If torch has
# loaded a library of one of these names, that one is used.
LIBRARIES = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so")
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
# These two return their text instead of a code.
TEXTS = ("hipGetErrorName", "hipGetErrorString")


class HipApi(NativeApi):
    """One AMD GPU, in its primary context: the one that torch uses too."""

    has_programmatic_edges = False
    libraries, shared_names = LIBRARIES, SHARED_NAMES
    own_signatures, sticky = OWN_SIGNATURES, STICKY

    def __init__(self, ordinal: int = 0, libraries: Sequence[str] | None = None) -> None:
        """See NativeApi. DriverMissingError also for a HIP older than 6.4."""
        super().__init__(ordinal, libraries)
        for name in TEXTS:
            function = getattr(self._library, name)
            function.argtypes, function.restype = (c_int,), c_char_p
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

    def _call(self, role: str, *args: Any) -> None:
        try:
            super()._call(role, *args)
        except DeviceError:
            # Reported here, so cleared: torch reads the thread's last error after its launches.
            self._functions["hipGetLastError"]()
            raise

    def _error_text(self, code: int) -> str:
        return ": ".join(
            getattr(self._library, name)(code).decode(errors="replace") for name in TEXTS
        )

    def open(self) -> None:
        """Does nothing: the runtime keeps the primary context for the process."""

    def close(self) -> None:
        """Does nothing; see open."""

    @contextmanager
    def current(self) -> Generator[None]:
        before = c_int()
        self._call("hipGetDevice", byref(before))
        self._call("hipSetDevice", self._ordinal)
        try:
            yield
        except BaseException:
            # The first of two errors is the cause: a second is ignored.
            self._functions["hipSetDevice"](before.value)
            raise
        self._call("hipSetDevice", before.value)

    def allow_shared(self, function: int, nbytes: int) -> None:
        """Does nothing: on AMD a launch may use all of a block's LDS."""

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


class HipDriver(GpuDriver):
    """Runs programs on one AMD GPU."""

    api = HipApi
