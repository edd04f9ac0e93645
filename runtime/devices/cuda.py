"""NVIDIA GPUs through the CUDA driver interface (libcuda.so.1), without torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_byte,
    c_char_p,
    c_int,
    c_longlong,
    c_size_t,
    c_ubyte,
    c_uint,
    c_ulonglong,
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


class KernelNodeParams(Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2, and v3, which has the same layout."""

    _fields_ = (
        ("func", c_void_p),
        ("gridDimX", c_uint),
        ("gridDimY", c_uint),
        ("gridDimZ", c_uint),
        ("blockDimX", c_uint),
        ("blockDimY", c_uint),
        ("blockDimZ", c_uint),
        ("sharedMemBytes", c_uint),
        ("kernelParams", c_void_p),
        ("extra", c_void_p),
        ("kern", c_void_p),
        ("ctx", c_void_p),
    )


class GraphNodeParams(Structure):
    """CUgraphNodeParams of a kernel node (type 0): the union is 232 bytes."""

    _fields_ = (
        ("type", c_int),
        ("reserved0", c_int * 3),
        ("kernel", KernelNodeParams),
        ("reserved1", c_byte * (232 - ctypes.sizeof(KernelNodeParams))),
        ("reserved2", c_longlong),
    )


class EdgeData(Structure):
    """CUgraphEdgeData: all zero is a full dependency."""

    _fields_ = (
        ("from_port", c_ubyte),
        ("to_port", c_ubyte),
        ("type", c_ubyte),
        ("reserved", c_ubyte * 5),
    )


# CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC and CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC.
PROGRAMMATIC_EDGE = (1, 0, 1)

# CUdevice_attribute
MAX_THREADS_PER_BLOCK = 1
MAX_GRID_DIM = (5, 6, 7)
WARP_SIZE = 10
COMPUTE_CAPABILITY = (75, 76)
MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
# CUfunction_attribute
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
PREFERRED_SHARED_MEMORY_CARVEOUT = 9
# CU_SHAREDMEM_CARVEOUT_MAX_SHARED, in percent.
ALL_SHARED = 100
# Bytes of shared memory a block may use without opting in.
SHARED_WITHOUT_OPT_IN = 48 << 10

# CUresult after which a context is unusable: deinitialized, ECC, NVLink, a contained fault,
# illegal address, timeout, context destroyed, assert, 714 to 719 (faults of a kernel), a leak of
# tensor memory, the end of the MPS client, unknown.
STICKY = frozenset({4, 214, 220, 226, 700, 702, 709, 710, *range(714, 720), 721, 810, 999})

OWN_SIGNATURES = {
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (HANDLE, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (HANDLE,),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuGraphAddKernelNode_v2": (HANDLE, c_void_p, c_void_p, c_size_t, POINTER(KernelNodeParams)),
    "cuGraphInstantiateWithFlags": (HANDLE, c_void_p, c_ulonglong),
    "cuGraphUpload": (c_void_p, c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}
# Since CUDA 12.3; graphs without programmatic edges run on older drivers too.
ADD_NODE = "cuGraphAddNode_v2"
ADD_NODE_SIGNATURE = (
    HANDLE,
    c_void_p,
    c_void_p,
    POINTER(EdgeData),
    c_size_t,
    POINTER(GraphNodeParams),
)


class CudaApi(DeviceApi):
    """One NVIDIA GPU, in its primary context: the one that torch uses too."""

    vendor = "cuda"
    has_programmatic_edges = True
    libraries = ("libcuda.so.1", "libcuda.so")
    own_signatures, sticky = OWN_SIGNATURES, STICKY

    def __init__(self, ordinal: int = 0, libraries: Sequence[str] | None = None) -> None:
        """See DeviceApi. No context is made before `open`."""
        super().__init__(ordinal, libraries)
        if hasattr(self._library, ADD_NODE):
            self._functions[ADD_NODE] = self._bind(ADD_NODE, ADD_NODE_SIGNATURE)
        self._context = 0
        self.init()
        device = c_int()
        self.call("cuDeviceGet", byref(device), ordinal)
        self._device = device.value
        self.info = self._read_info(ordinal)

    def _read_info(self, ordinal: int) -> DeviceInfo:
        name, memory = ctypes.create_string_buffer(256), c_size_t()
        self.call("cuDeviceGetName", name, len(name), self._device)
        self.call("cuDeviceTotalMem_v2", byref(memory), self._device)
        major, minor = map(self._attribute, COMPUTE_CAPABILITY)
        x, y, z = map(self._attribute, MAX_GRID_DIM)
        return DeviceInfo(
            ordinal=ordinal,
            name=name.value.decode(errors="replace"),
            target=f"cuda:sm_{major}{minor}",
            warp=self._attribute(WARP_SIZE),
            memory_bytes=memory.value,
            shared_bytes=self._attribute(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
            max_threads=self._attribute(MAX_THREADS_PER_BLOCK),
            max_grid=(x, y, z),
        )

    def _attribute(self, attribute: int) -> int:
        value = c_int()
        self.call("cuDeviceGetAttribute", byref(value), attribute, self._device)
        return value.value

    def _error_text(self, code: int) -> str:
        # Not through _call: both fail for an unknown code.
        name, text = c_char_p(), c_char_p()
        self._functions["cuGetErrorName"](code, byref(name))
        self._functions["cuGetErrorString"](code, byref(text))
        words = [part.decode(errors="replace") for part in (name.value, text.value) if part]
        return ": ".join(words) or "a code that the driver does not know"

    def open(self) -> None:
        self._context = self.create("cuDevicePrimaryCtxRetain", self._device)

    def close(self) -> None:
        self._context = 0
        self.call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _enter(self) -> tuple[Any, ...]:
        self.call("cuCtxPushCurrent_v2", self._context)
        return "cuCtxPopCurrent_v2", byref(c_void_p())

    def allow_shared(self, function: int, nbytes: int) -> None:
        if nbytes <= SHARED_WITHOUT_OPT_IN:
            return
        self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, nbytes)
        # A multiprocessor divides its memory anew only while it is idle: kernels that overlap want
        # the same division. Others need the first cache, where loads on their way have their place:
        # with 28 KB of it a GEMV read 3.4 TB/s of an H200's 4.6.
        self.call("cuFuncSetAttribute", function, PREFERRED_SHARED_MEMORY_CARVEOUT, ALL_SHARED)

    def add_kernel_node(self, graph: int, node: KernelNode, edges: Sequence[Edge]) -> int:
        """See DeviceApi. DriverMissingError for a programmatic edge that the driver cannot make."""
        params = pointers(node.params)
        block = (node.threads, 1, 1)
        kernel = KernelNodeParams(
            node.function, *node.grid, *block, node.shared, ctypes.addressof(params)
        )
        before = handles([edge.node for edge in edges])
        if not any(edge.programmatic for edge in edges):
            return self.create("cuGraphAddKernelNode_v2", graph, before, len(edges), byref(kernel))
        if ADD_NODE not in self._functions:
            raise DriverMissingError(
                f"{self._library._name} lacks {ADD_NODE}, which programmatic edges need: "
                "a driver for CUDA 12.3 or later is needed"
            )
        kinds = [PROGRAMMATIC_EDGE if edge.programmatic else (0, 0, 0) for edge in edges]
        data = (EdgeData * len(edges))(*(EdgeData(*kind) for kind in kinds))
        whole = GraphNodeParams(kernel=kernel)
        return self.create(ADD_NODE, graph, before, data, len(edges), byref(whole))

    def instantiate(self, graph: int, stream: int) -> int:
        executable = self.create("cuGraphInstantiateWithFlags", graph, 0)
        try:
            self.call("cuGraphUpload", executable, stream)
        except DeviceError:
            with suppress(DeviceError):  # the first of two errors is the cause
                self.destroy_executable(executable)
            raise
        return executable


class CudaDriver(GpuDriver):
    """Runs programs on one NVIDIA GPU."""

    api = CudaApi
