"""What a graph runtime asks of a GPU driver: memory, copies, modules, graphs. Nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol


class DriverMissingError(Exception):
    """The driver's library, or a function of it that is needed, is not on this machine."""


class DeviceError(Exception):
    """A call to the driver failed.

    `call` is the C function, `code` its number, `text` the driver's own words. After a `sticky`
    error the driver refuses everything else in this process: only a new process helps.
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
    """One device. Programs for it name `target`; `shared_bytes` is what one block may use."""

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
    """One launch of a graph: `threads` a block, `shared` bytes a block.

    `params` are ctypes values in the order of the kernel's parameters. `programmatic` says that the
    kernel waits for its programmatic predecessors itself.
    """

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    params: tuple[Any, ...]
    programmatic: bool = False


@dataclass(frozen=True)
class Edge:
    """A dependency on `node`; `programmatic` when the later kernel may start before its end."""

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
        """Hold on to the device's context; once, before anything else."""
        ...

    def close(self) -> None:
        """Let go of what `open` took. Outside of `current`."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """Make the device current on this thread for a while."""
        ...

    def synchronize(self) -> None:
        """Wait for everything on the device, also what others in this process started."""
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
        """Add a launch behind `edges`, nodes of the same graph; parameters are copied."""
        ...

    def instantiate(self, graph: int, stream: int) -> int:
        """Make `graph` launchable, on the device's side too; it may be destroyed then."""
        ...

    def launch(self, executable: int, stream: int) -> None: ...
    def destroy_executable(self, executable: int) -> None: ...
