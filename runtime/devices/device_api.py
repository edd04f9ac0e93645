"""`DeviceApi`: the GPU driver functions that Ingot uses (memory, copies, modules, graphs)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol


class DriverMissingError(Exception):
    """The driver's library, or a required function of it, is not on this machine."""


class DeviceError(Exception):
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


class DeviceApi(Protocol):
    """One device. Handles and addresses are ints, sizes bytes; every call may raise DeviceError.

    All but the two fields, `open` and `close` need the device to be current on the calling thread:
    inside `with api.current():`. Copies are asynchronous and their host side is pinned memory.
    """

    info: DeviceInfo
    has_programmatic_edges: bool

    def open(self) -> None:
        """Retain the device's primary context; once, before other calls."""
        ...

    def close(self) -> None:
        """Release the context. Outside of `current`."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """Make the device current on this thread within the context."""
        ...

    def synchronize(self) -> None:
        """Wait for all work on the device, of other users in this process too."""
        ...

    def allocate(self, nbytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def allocate_pinned(self, nbytes: int) -> int: ...
    def free_pinned(self, address: int) -> None: ...
    def fill(self, address: int, byte: int, nbytes: int, stream: int) -> None: ...
    def to_device(self, address: int, host: int, nbytes: int, stream: int) -> None: ...
    def to_host(self, host: int, address: int, nbytes: int, stream: int) -> None: ...

    def create_stream(self) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def wait_stream(self, stream: int) -> None: ...

    def create_event(self) -> int: ...
    def destroy_event(self, event: int) -> None: ...
    def record_event(self, event: int, stream: int) -> None: ...
    def wait_event(self, event: int) -> None: ...
    def elapsed_ms(self, start: int, end: int) -> float: ...

    def load_module(self, image: bytes) -> int: ...
    def unload_module(self, module: int) -> None: ...
    def get_function(self, module: int, symbol: str) -> int: ...
    def allow_shared(self, function: int, nbytes: int) -> None:
        """Let `function` be launched with `nbytes` of dynamic shared memory."""
        ...

    def create_graph(self) -> int: ...
    def destroy_graph(self, graph: int) -> None: ...
    def add_kernel_node(self, graph: int, node: KernelNode, edges: Sequence[Edge]) -> int:
        """Add a launch that depends on `edges` in the same graph; parameters are copied."""
        ...

    def instantiate(self, graph: int, stream: int) -> int:
        """Make `graph` executable and upload it; `graph` may be destroyed then."""
        ...

    def launch(self, executable: int, stream: int) -> None: ...
    def destroy_executable(self, executable: int) -> None: ...
