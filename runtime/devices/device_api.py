"""`DeviceApi`: the GPU driver functions that Ingot uses (memory, copies, modules, graphs).

CUDA and HIP have most of them in common, under different names.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from ..driver import DeviceFailedError

HANDLE = POINTER(c_void_p)
NON_BLOCKING = 1  # a stream that does not wait for the default stream, in CUDA and in HIP


class DriverMissingError(Exception):
    """The driver's library, or a required function of it, is not on this machine."""


class DeviceError(DeviceFailedError):
    """A call to the driver failed.

    `call` is the C function, `code` its result, `text` the driver's message. After a `sticky` error
    every further call in this process fails.
    """

    def __init__(self, call: str, code: int, text: str, *, sticky: bool) -> None:
        advice = "; the device is lost to this process: restart it" if sticky else ""
        super().__init__(f"{call} failed with {code} ({text}){advice}")
        self.call = call
        self.code = code
        self.text = text
        self.sticky = sticky


@dataclass(frozen=True)
class DeviceInfo:
    """One device. `target` as in `Program.target`; `shared_bytes` is the limit of one block."""

    ordinal: int
    name: str
    target: str
    warp: int
    memory_bytes: int
    shared_bytes: int
    max_threads: int
    max_grid: tuple[int, int, int]


@dataclass(frozen=True)
class KernelNode:
    """One launch of a graph: `threads` per block, `shared` bytes of shared memory per block.

    `params` are ctypes values in the order of the kernel's parameters. `programmatic` kernels wait
    for their programmatic predecessors themselves (PDL).
    """

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    params: tuple[Any, ...]
    programmatic: bool = False


@dataclass(frozen=True)
class Edge:
    """A dependency on `node`; a `programmatic` one lets the later kernel start before its end."""

    node: int
    programmatic: bool = False


@dataclass(frozen=True)
class Call:
    """A C function of both interfaces, which is a method where it stands in a DeviceApi.

    The method takes `arguments`; behind them the function gets `flags`, unsigned integers. One that
    `creates` stores a handle through its first argument, which the method returns.
    """

    cuda: str
    hip: str
    arguments: tuple[Any, ...] = ()
    creates: bool = False
    flags: tuple[int, ...] = ()

    @property
    def signature(self) -> tuple[Any, ...]:
        return (HANDLE,) * self.creates + self.arguments + (c_uint,) * len(self.flags)

    def name(self, vendor: str) -> str:
        """What the function is called in an interface."""
        return self.cuda if vendor == "cuda" else self.hip

    def __get__(self, api: DeviceApi, owner: type) -> Callable[..., int]:
        return partial(self._run, api)

    def _run(self, api: DeviceApi, *args: Any) -> int:
        name = self.name(api.vendor)
        if self.creates:
            return api.create(name, *args, *self.flags)
        api.call(name, *args, *self.flags)
        return 0


class DeviceApi(ABC):
    """One device. Handles and addresses are ints, sizes bytes; every call may raise DeviceError.

    All but the fields, `open` and `close` need the device to be current on the calling thread:
    inside `with api.current():`. Copies are asynchronous and their host side is pinned memory.
    """

    info: DeviceInfo

    vendor: ClassVar[Literal["cuda", "hip"]]
    has_programmatic_edges: ClassVar[bool]
    libraries: ClassVar[Sequence[str]]  # names by default
    # Functions that only this interface has: argument types, by name.
    own_signatures: ClassVar[Mapping[str, tuple[Any, ...]]]
    sticky: ClassVar[frozenset[int]]  # codes of errors

    init = Call("cuInit", "hipInit", flags=(0,))
    # Waits for all work on the device, of other users in this process too.
    synchronize = Call("cuCtxSynchronize", "hipDeviceSynchronize")

    allocate = Call("cuMemAlloc_v2", "hipMalloc", (c_size_t,), creates=True)
    free = Call("cuMemFree_v2", "hipFree", (c_void_p,))
    allocate_pinned = Call("cuMemHostAlloc", "hipHostMalloc", (c_size_t,), creates=True, flags=(0,))
    free_pinned = Call("cuMemFreeHost", "hipHostFree", (c_void_p,))
    # (address, byte, nbytes, stream)
    fill = Call("cuMemsetD8Async", "hipMemsetAsync", (c_void_p, c_int, c_size_t, c_void_p))
    # (to, from, nbytes, stream)
    _copy = (c_void_p, c_void_p, c_size_t, c_void_p)
    to_device = Call("cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync", _copy)
    to_host = Call("cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync", _copy)

    create_stream = Call(
        "cuStreamCreate", "hipStreamCreateWithFlags", creates=True, flags=(NON_BLOCKING,)
    )
    destroy_stream = Call("cuStreamDestroy_v2", "hipStreamDestroy", (c_void_p,))
    wait_stream = Call("cuStreamSynchronize", "hipStreamSynchronize", (c_void_p,))

    create_event = Call("cuEventCreate", "hipEventCreateWithFlags", creates=True, flags=(0,))
    # An event without a time, which is sooner waited for.
    create_mark = Call("cuEventCreate", "hipEventCreateWithFlags", creates=True, flags=(2,))
    destroy_event = Call("cuEventDestroy_v2", "hipEventDestroy", (c_void_p,))
    record_event = Call("cuEventRecord", "hipEventRecord", (c_void_p, c_void_p))  # event, stream
    wait_event = Call("cuEventSynchronize", "hipEventSynchronize", (c_void_p,))
    _elapsed = Call(
        "cuEventElapsedTime", "hipEventElapsedTime", (POINTER(c_float), c_void_p, c_void_p)
    )

    load_module = Call("cuModuleLoadData", "hipModuleLoadData", (c_char_p,), creates=True)
    unload_module = Call("cuModuleUnload", "hipModuleUnload", (c_void_p,))
    # (module, symbol in bytes)
    get_function = Call(
        "cuModuleGetFunction", "hipModuleGetFunction", (c_void_p, c_char_p), creates=True
    )

    create_graph = Call("cuGraphCreate", "hipGraphCreate", creates=True, flags=(0,))
    destroy_graph = Call("cuGraphDestroy", "hipGraphDestroy", (c_void_p,))
    launch = Call("cuGraphLaunch", "hipGraphLaunch", (c_void_p, c_void_p))  # executable, stream
    destroy_executable = Call("cuGraphExecDestroy", "hipGraphExecDestroy", (c_void_p,))

    def __init__(self, ordinal: int = 0, libraries: Sequence[str] | None = None) -> None:
        """Load the first of `libraries` that exists and bind its functions.

        DriverMissingError for a missing library or function. Subclasses fill `info` of device
        `ordinal`; DeviceError when there is no such device.
        """
        library = open_library(libraries or self.libraries)
        self._library, self._ordinal = library, ordinal
        signatures = self.signatures()
        lacking = [name for name in signatures if not hasattr(library, name)]
        if lacking:
            raise DriverMissingError(
                f"{library._name} lacks {', '.join(lacking)}: a newer driver is needed"
            )
        self._functions: dict[str, Callable[..., int]] = {
            name: self._bind(name, signature) for name, signature in signatures.items()
        }

    @classmethod
    def signatures(cls) -> dict[str, tuple[Any, ...]]:
        """The argument types of every function that is needed, by its name in C."""
        calls = [value for value in vars(DeviceApi).values() if isinstance(value, Call)]
        return {call.name(cls.vendor): call.signature for call in calls} | {**cls.own_signatures}

    def _bind(self, name: str, signature: tuple[Any, ...], result: Any = c_int) -> Any:
        function = getattr(self._library, name)
        function.argtypes, function.restype = signature, result
        return function

    def call(self, name: str, *args: Any) -> None:
        """Call a C function; DeviceError unless it returns 0."""
        code = self._functions[name](*args)
        if code:
            raise DeviceError(name, code, self._error_text(code), sticky=code in self.sticky)

    def create(self, name: str, *args: Any) -> int:
        """Call a C function that stores a handle through its first argument."""
        handle = c_void_p()
        self.call(name, byref(handle), *args)
        return handle.value or 0

    @contextmanager
    def current(self) -> Generator[None]:
        """Make the device current on this thread within the context."""
        name, *args = self._enter()
        try:
            yield
        except BaseException:
            self._functions[name](*args)  # the first of two errors is the cause
            raise
        self.call(name, *args)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two recorded events."""
        result = c_float()
        self._elapsed(byref(result), start, end)
        return result.value

    @abstractmethod
    def _error_text(self, code: int) -> str:
        """The driver's name and message of error `code`."""

    @abstractmethod
    def _enter(self) -> tuple[Any, ...]:
        """Make the device current; gives the function, and its arguments, that ends that."""

    def open(self) -> None:  # noqa: B027
        """Retain the device's primary context, where there is one; once, before other calls."""

    def close(self) -> None:  # noqa: B027
        """Release the context. Outside of `current`."""

    def allow_shared(self, function: int, nbytes: int) -> None:  # noqa: B027
        """Let `function` be launched with `nbytes` of dynamic shared memory."""

    @abstractmethod
    def add_kernel_node(self, graph: int, node: KernelNode, edges: Sequence[Edge]) -> int:
        """Add a launch that depends on `edges` in the same graph; parameters are copied."""

    @abstractmethod
    def instantiate(self, graph: int, stream: int) -> int:
        """Make `graph` executable and upload it; `graph` may be destroyed then."""


def open_library(names: Sequence[str]) -> ctypes.CDLL:
    """The first library of `names` that can be loaded; DriverMissingError says what was tried."""
    failures: list[str] = []
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            failures.append(f"{name} ({error})")
    raise DriverMissingError(f"no GPU driver library: looked for {'; '.join(failures)}")


def pointers(params: Sequence[Any]) -> Any:
    """A C array of the addresses of ctypes values, which must outlive it."""
    return (c_void_p * len(params))(*map(ctypes.addressof, params))


def handles(nodes: Sequence[int]) -> Any:
    """A C array of handles."""
    return (c_void_p * len(nodes))(*nodes)
