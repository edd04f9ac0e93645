"""`NativeApi`: the functions that CUDA and HIP share under different names, through ctypes."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_void_p
from typing import Any, ClassVar

from .device_api import DeviceError, DeviceInfo, DriverMissingError, Edge, KernelNode

HANDLE = POINTER(c_void_p)
NON_BLOCKING = 1  # a stream that does not wait for the default stream, in CUDA and in HIP

# Functions of both interfaces with the same arguments: role -> argument types.
SHARED_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "init": (c_uint,),
    "synchronize": (),
    "allocate": (HANDLE, c_size_t),
    "free": (c_void_p,),
    "allocate_pinned": (HANDLE, c_size_t, c_uint),
    "free_pinned": (c_void_p,),
    "fill": (c_void_p, c_int, c_size_t, c_void_p),
    "to_device": (c_void_p, c_void_p, c_size_t, c_void_p),
    "to_host": (c_void_p, c_void_p, c_size_t, c_void_p),
    "create_stream": (HANDLE, c_uint),
    "destroy_stream": (c_void_p,),
    "wait_stream": (c_void_p,),
    "create_event": (HANDLE, c_uint),
    "destroy_event": (c_void_p,),
    "record_event": (c_void_p, c_void_p),
    "wait_event": (c_void_p,),
    "elapsed_ms": (POINTER(c_float), c_void_p, c_void_p),
    "load_module": (HANDLE, c_char_p),
    "unload_module": (c_void_p,),
    "get_function": (HANDLE, c_void_p, c_char_p),
    "create_graph": (HANDLE, c_uint),
    "destroy_graph": (c_void_p,),
    "launch": (c_void_p, c_void_p),
    "destroy_executable": (c_void_p,),
}


def open_library(names: Sequence[str]) -> ctypes.CDLL:
    """The first library of `names` that can be loaded; DriverMissingError says what was tried."""
    failures: list[str] = []
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            failures.append(f"{name} ({error})")
    raise DriverMissingError(f"no GPU driver library: looked for {'; '.join(failures)}")


class NativeApi(ABC):
    """Implements device_api.DeviceApi, which documents the methods, over a C library."""

    info: DeviceInfo
    has_programmatic_edges: bool

    # Default library names; C names of SHARED_SIGNATURES; other functions; sticky error codes.
    libraries: ClassVar[Sequence[str]]
    shared_names: ClassVar[Mapping[str, str]]
    own_signatures: ClassVar[Mapping[str, tuple[Any, ...]]]
    sticky: ClassVar[frozenset[int]]

    def __init__(self, ordinal: int = 0, libraries: Sequence[str] | None = None) -> None:
        """Load the first of `libraries` that exists and bind its functions.

        DriverMissingError for a missing library or function. Subclasses fill `info` of device
        `ordinal`; DeviceError when there is no such device.
        """
        library = open_library(libraries or self.libraries)
        self._library, self._ordinal = library, ordinal
        self._names = {**self.shared_names, **{name: name for name in self.own_signatures}}
        signatures = {**SHARED_SIGNATURES, **self.own_signatures}
        lacking = [name for name in self._names.values() if not hasattr(library, name)]
        if lacking:
            raise DriverMissingError(
                f"{library._name} lacks {', '.join(lacking)}: a newer driver is needed"
            )
        self._functions: dict[str, Callable[..., int]] = {
            role: self._bind(name, signatures[role]) for role, name in self._names.items()
        }

    def _bind(self, name: str, signature: tuple[Any, ...]) -> Any:
        function = getattr(self._library, name)
        function.argtypes, function.restype = signature, c_int
        return function

    def _call(self, role: str, *args: Any) -> None:
        code = self._functions[role](*args)
        if code:
            sticky = code in self.sticky
            raise DeviceError(self._names[role], code, self._error_text(code), sticky=sticky)

    def _create(self, role: str, *args: Any) -> int:
        """Call a function that stores a handle through its first argument."""
        handle = c_void_p()
        self._call(role, byref(handle), *args)
        return handle.value or 0

    @abstractmethod
    def _error_text(self, code: int) -> str:
        """The driver's name and message of error `code`."""

    @abstractmethod
    def open(self) -> None: ...
    @abstractmethod
    def close(self) -> None: ...
    @abstractmethod
    def current(self) -> AbstractContextManager[None]: ...
    @abstractmethod
    def allow_shared(self, function: int, nbytes: int) -> None: ...
    @abstractmethod
    def add_kernel_node(self, graph: int, node: KernelNode, edges: Sequence[Edge]) -> int: ...
    @abstractmethod
    def instantiate(self, graph: int, stream: int) -> int: ...

    def synchronize(self) -> None:
        self._call("synchronize")

    def allocate(self, nbytes: int) -> int:
        return self._create("allocate", nbytes)

    def free(self, address: int) -> None:
        self._call("free", address)

    def allocate_pinned(self, nbytes: int) -> int:
        return self._create("allocate_pinned", nbytes, 0)

    def free_pinned(self, address: int) -> None:
        self._call("free_pinned", address)

    def fill(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        self._call("fill", address, byte, nbytes, stream)

    def to_device(self, address: int, host: int, nbytes: int, stream: int) -> None:
        self._call("to_device", address, host, nbytes, stream)

    def to_host(self, host: int, address: int, nbytes: int, stream: int) -> None:
        self._call("to_host", host, address, nbytes, stream)

    def create_stream(self) -> int:
        return self._create("create_stream", NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        self._call("destroy_stream", stream)

    def wait_stream(self, stream: int) -> None:
        self._call("wait_stream", stream)

    def create_event(self) -> int:
        return self._create("create_event", 0)

    def destroy_event(self, event: int) -> None:
        self._call("destroy_event", event)

    def record_event(self, event: int, stream: int) -> None:
        self._call("record_event", event, stream)

    def wait_event(self, event: int) -> None:
        self._call("wait_event", event)

    def elapsed_ms(self, start: int, end: int) -> float:
        result = c_float()
        self._call("elapsed_ms", byref(result), start, end)
        return result.value

    def load_module(self, image: bytes) -> int:
        return self._create("load_module", image)

    def unload_module(self, module: int) -> None:
        self._call("unload_module", module)

    def get_function(self, module: int, symbol: str) -> int:
        return self._create("get_function", module, symbol.encode())

    def create_graph(self) -> int:
        return self._create("create_graph", 0)

    def destroy_graph(self, graph: int) -> None:
        self._call("destroy_graph", graph)

    def launch(self, executable: int, stream: int) -> None:
        self._call("launch", executable, stream)

    def destroy_executable(self, executable: int) -> None:
        self._call("destroy_executable", executable)


def pointers(params: Sequence[Any]) -> Any:
    """A C array of the addresses of ctypes values, which must outlive it."""
    return (c_void_p * len(params))(*map(ctypes.addressof, params))


def handles(nodes: Sequence[int]) -> Any:
    """A C array of handles."""
    return (c_void_p * len(nodes))(*nodes)
