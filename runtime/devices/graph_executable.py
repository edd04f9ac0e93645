"""`GpuExecutable`: a GPU program in device memory, one CUDA or HIP graph per entry."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Generator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import numpy as np

from ...compiler.dtypes import DTYPES
from ..driver import LAUNCHES, Array, DeviceFailedError, WeightLoader
from ..program import Buffer, Entry, Program, Slice
from .check_program import ProgramError, check_address, check_program, launch_place
from .device_api import (
    DeviceApi,
    DeviceError,
    DeviceInfo,
    DriverMissingError,
    Edge,
    KernelNode,
)
from .gpu_memory import (
    GpuMemory,
    SelfTestError,
    allocate_memory,
    borrowed,
    check_copies,
    upload_weights,
)
from .host_arrays import Bytes, host_array, to_array
from .staging import Layout, Staging, lay_out, most_bytes

_NUMBERS: dict[str, Any] = {
    name: getattr(ctypes, dtype.ctypes) for name, dtype in DTYPES.items() if dtype.ctypes
}


@dataclass(frozen=True)
class _Plan:
    """One entry on the device: its executable graph, and the copies of its inputs and outputs."""

    graph: int
    inputs: Layout
    outputs: Layout
    fed: bool  # inputs that are not given are what the last replay left
    parts: dict[frozenset[str], Layout] = field(default_factory=dict[frozenset[str], Layout])

    def some_outputs(self, names: frozenset[str]) -> Layout:
        """The copies of the outputs `names`; ValueError for an unknown one."""
        if names not in self.parts:
            buffers = {f.buffer.name: f.buffer for f in self.outputs.fields}
            if unknown := names - buffers.keys():
                raise ValueError(f"expected outputs of {sorted(buffers)}, found {sorted(unknown)}")
            self.parts[names] = lay_out(buffers[name] for name in names)
        return self.parts[names]

    def some_inputs(self, names: Set[str], left: bool) -> Layout:
        """The copies of the inputs `names`, which are all but where others are `left`; ValueError
        otherwise."""
        known = {f.buffer.name: f.buffer for f in self.inputs.fields}
        if names == known.keys():
            return self.inputs
        if not self.fed or not names <= known.keys():
            raise ValueError(f"expected inputs {sorted(known)}, found {sorted(names)}")
        if not left:
            raise ValueError(
                f"expected inputs {sorted(known)}, since another replay came before, "
                f"found {sorted(names)}"
            )
        return lay_out((known[name] for name in names), gap=0)


@dataclass(frozen=True)
class _Running:
    """A launch, and where its outputs come to lie; see driver.Running."""

    executable: GpuExecutable
    staging: Staging
    number: int
    outputs: Layout

    def wait(self) -> dict[str, Array]:
        return self.executable.results(self)


class GpuExecutable:
    """Implements driver.Executable with one graph per entry. Not thread-safe.

    Launches follow each other in one stream, each with an event behind the copies of its outputs:
    while the host waits for one, the next is queued. After loading nothing is allocated on the
    device. After a device error or `close` every call but `close` raises DeviceFailedError.
    """

    def __init__(self, program: Program, api: DeviceApi, weights: WeightLoader) -> None:
        """Check `program`, load it and test that two replays are bitwise equal.

        ProgramError for a program that the device cannot run or a misaligned argument; ValueError
        for a weight of another type; DeviceError; SelfTestError for wrong copies or replays.
        """
        _check(program, api.info)
        self._api = api
        self._program = program
        self._plans: dict[tuple[str, str], _Plan] = {}  # by names of function and entry
        self._failure: DeviceError | None = None
        self._staging: list[Staging] = []
        self._launches = 0
        self._left: _Plan | None = None  # whose inputs are as its last replay left them
        self._open = False
        self._owned = ExitStack()
        self._memory = GpuMemory()
        self._stream = 0
        api.open()
        self._open = True
        try:
            with self._device():
                self._load(program, weights)
        except BaseException:
            self.close()
            raise

    def run(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """See Executable.run, and `launch`."""
        return self.launch(function, symbols, inputs, outputs).wait()

    def launch(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> _Running:
        """See Executable.launch. ValueError for an unknown function, entry or output, or inputs
        that do not fit.

        Inputs and outputs go through the host; an input may also be a torch tensor on the CPU.
        """
        plan = self._plan(function, symbols)
        given = plan.some_inputs(inputs.keys(), plan is self._left)
        wanted = plan.outputs if outputs is None else plan.some_outputs(frozenset(outputs))
        staging = self._staging[self._launches % LAUNCHES]
        self._left = None
        with self._device():
            self._await(staging)
            self._stage(staging, given, inputs)
            self._replay(plan, given, wanted, staging)
        self._launches += 1
        self._left = plan
        return _Running(self, staging, staging.launches, wanted)

    def results(self, running: _Running) -> dict[str, Array]:
        """What `running` gave, after it has ended."""
        self._check_usable()
        staging = running.staging
        if staging.launches != running.number:
            raise RuntimeError(
                f"expected to be asked for outputs before {LAUNCHES} more launches; they are gone"
            )
        with self._device():
            self._await(staging)
        found: dict[str, Array] = {}
        for place in running.outputs.fields:
            buffer = place.buffer
            data = staging.bytes[place.at : place.at + buffer.nbytes]
            found[buffer.name] = to_array(data, buffer.dtype, buffer.shape)
        return found

    def measure(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        replays: int,
    ) -> list[float]:
        """Milliseconds on the device of each of `replays` replays over `inputs`, without copies.

        State advances with each replay, as in as many runs.
        """
        plan = self._plan(function, symbols)
        self._left = None
        start, end = self._events
        staging = self._staging[0]
        times: list[float] = []
        with self._device():
            self._await(staging)
            self._stage(staging, plan.some_inputs(inputs.keys(), left=False), inputs)
            for _ in range(replays):
                staging.busy = True
                self._copy_in(staging, plan.inputs)
                self._api.record_event(start, self._stream)
                self._api.launch(plan.graph, self._stream)
                self._api.record_event(end, self._stream)
                self._await(staging)
                times.append(self._api.elapsed_ms(start, end))
        return times

    def close(self) -> None:
        """Free the device memory; idempotent.

        DeviceError when that fails, unless the device had failed before: that error was raised, and
        the process end frees the memory.
        """
        if not self._open:
            return
        self._open = False
        self._plans = {}
        try:
            with ExitStack() as last:
                last.callback(self._api.close)
                last.enter_context(self._api.current())
                last.enter_context(self._owned)
                if self._stream:
                    # First: wait for queued work before freeing its memory.
                    self._owned.callback(self._settle)
        except DeviceError:
            if self._failure is None:
                raise
        finally:
            self._memory = GpuMemory()

    def __del__(self) -> None:
        """Free the device memory if `close` was not called: other processes need it."""
        if getattr(self, "_open", False):
            with suppress(DeviceError):  # no caller to raise it to
                self.close()

    # ---- loading

    def _load(self, program: Program, weights: WeightLoader) -> None:
        api, owned = self._api, self._owned
        self._stream = api.create_stream()
        owned.callback(api.destroy_stream, self._stream)
        self._events = (api.create_event(), api.create_event())
        for event in self._events:
            owned.callback(api.destroy_event, event)
        check_copies(api, self._stream)
        self._memory = allocate_memory(api, program, self._stream, owned)
        upload_weights(api, program, weights, self._memory, self._stream, owned)
        kernels = self._load_kernels()
        rooms = [1, *(buffer.nbytes for buffer in self._memory.counters)]
        for name, function in program.functions.items():
            for entry in function.entries:
                graph = self._build_graph(entry, kernels)
                owned.callback(api.destroy_executable, graph)
                self._plans[name, entry.name] = _Plan(graph, *_layouts(entry), bool(function.fed))
                rooms += (most_bytes(b for b in entry.buffers if b.kind == kind) for kind in _HOST)
        for _ in range(LAUNCHES):
            address = api.allocate_pinned(max(rooms))
            owned.callback(api.free_pinned, address)
            event = api.create_mark()
            owned.callback(api.destroy_event, event)
            self._staging.append(Staging(address, max(rooms), event))
        self._settle()
        for name, function in program.functions.items():
            self._check_replay(name, function.entries)

    def _load_kernels(self) -> dict[str, int]:
        """Functions by kernel id; kernels of one binary share a module, and its functions."""
        modules: dict[bytes, int] = {}
        functions: dict[str, int] = {}
        shared: dict[tuple[bytes, str], int] = {}
        for kernel in self._program.kernels.values():
            image = kernel.binary
            assert isinstance(image, bytes)
            if image not in modules:
                modules[image] = self._api.load_module(image)
                self._owned.callback(self._api.unload_module, modules[image])
            functions[kernel.id] = self._api.get_function(modules[image], kernel.symbol.encode())
            # What is allowed is of the function, not of a launch.
            of = image, kernel.symbol
            shared[of] = max(kernel.shared, shared.get(of, 0))
            self._api.allow_shared(functions[kernel.id], shared[of])
        return functions

    def _build_graph(self, entry: Entry, functions: Mapping[str, int]) -> int:
        """An executable graph with one node per launch and one edge per dependency.

        Programmatic edges order like full ones, transitively, because every programmatic kernel
        waits before it accesses memory that launches write: see codegen/templates/pdl.py.
        """
        api = self._api
        known = {**self._program.buffers, **{buffer.name: buffer for buffer in entry.buffers}}
        before: list[list[int]] = [[] for _ in entry.launches]
        for earlier, later in entry.dependencies:
            before[later].append(earlier)
        with borrowed(api, self._stream) as scratch:
            graph = api.create_graph()
            scratch.callback(api.destroy_graph, graph)
            nodes: list[KernelNode] = []
            made: list[int] = []
            for index in range(len(entry.launches)):
                node = self._node(entry, index, functions, known)
                edges = [
                    Edge(made[i], nodes[i].programmatic and node.programmatic)
                    for i in before[index]
                ]
                made.append(api.add_kernel_node(graph, node, edges))
                nodes.append(node)
            return api.instantiate(graph, self._stream)

    def _node(
        self,
        entry: Entry,
        index: int,
        functions: Mapping[str, int],
        known: Mapping[str, Buffer],
    ) -> KernelNode:
        launch = entry.launches[index]
        kernel = self._program.kernels[launch.kernel]
        where = launch_place(self._program, entry, index)
        params: list[Any] = []
        for number, (argument, value) in enumerate(zip(kernel.args, launch.args, strict=True)):
            if not isinstance(value, Slice):
                params.append(_NUMBERS[argument.kind](value))
                continue
            address = self._memory.address_of(known[value.buffer]) + value.offset
            at = f"{where}, argument {number}, the address of {value.buffer}"
            check_address(at, address, argument)
            params.append(ctypes.c_void_p(address))
        # Triton's kernels take two more pointers, to scratch memory that ours do not use.
        params += [ctypes.c_void_p(), ctypes.c_void_p()]
        return KernelNode(
            function=functions[kernel.id],
            grid=launch.grid,
            threads=kernel.num_warps * self._api.info.warp,
            shared=kernel.shared,
            params=tuple(params),
            programmatic=kernel.programmatic and self._api.has_programmatic_edges,
        )

    # ---- replaying

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise DeviceFailedError(
                f"this executable is unusable: the device failed before: {self._failure}"
            )
        if not self._open:
            raise DeviceFailedError("this executable was closed")

    def _plan(self, function: str, symbols: Mapping[str, int]) -> _Plan:
        self._check_usable()
        functions = self._program.functions
        if function not in functions:
            raise ValueError(f"no function {function!r}; there are {', '.join(functions)}")
        return self._plans[function, functions[function].entry(symbols).name]

    @contextmanager
    def _device(self) -> Generator[None]:
        """Make the device current on this thread; record its first failure."""
        try:
            with self._api.current():
                yield
        except DeviceError as error:
            self._failure = error
            raise

    def _settle(self) -> None:
        """Wait for the stream."""
        self._api.wait_stream(self._stream)

    def _await(self, staging: Staging) -> None:
        """Wait for the launch that uses `staging`, if there is one.

        A KeyboardInterrupt may have kept it from recording its event.
        """
        if not staging.busy:
            return
        if staging.recorded:
            self._api.wait_event(staging.event)
        else:
            self._settle()
        staging.busy = False

    def _stage(self, staging: Staging, given: Layout, inputs: Mapping[str, Array]) -> None:
        """Bring inputs into memory that no launch uses."""
        staging.recorded = False
        staging.launches += 1
        for place in given.fields:
            buffer = place.buffer
            staging.bytes[place.at : place.at + buffer.nbytes] = host_array(
                f"input {buffer.name}", inputs[buffer.name], buffer.dtype, buffer.shape
            )

    def _copy_in(self, staging: Staging, inputs: Layout) -> None:
        for copy in inputs.copies:
            to, at = self._memory.arena + copy.offset, staging.address + copy.at
            self._api.to_device(to, at, copy.nbytes, self._stream)

    def _replay(self, plan: _Plan, inputs: Layout, outputs: Layout, staging: Staging) -> None:
        """Queue a replay between copies of what is staged and of `outputs`, and its event."""
        staging.busy = True
        self._copy_in(staging, inputs)
        self._api.launch(plan.graph, self._stream)
        for copy in outputs.copies:
            to, at = staging.address + copy.at, self._memory.arena + copy.offset
            self._api.to_host(to, at, copy.nbytes, self._stream)
        self._api.record_event(staging.event, self._stream)
        staging.recorded = True

    def _check_replay(self, function: str, entries: Sequence[Entry]) -> None:
        """Replay the smallest entry twice on zeros, from zeroed state, and compare all bytes; its
        launches must leave all counters zero."""
        smallest = min(entries, key=lambda e: (prod(e.symbols.values()), len(e.launches)))
        plan = self._plans[function, smallest.name]
        seen: list[Bytes] = []
        staging = self._staging[0]
        for _ in range(2):
            self._memory.clear_state(self._api, self._stream)
            self._settle()
            staging.bytes[:], staging.recorded = 0, False
            self._replay(plan, plan.inputs, plan.outputs, staging)
            self._await(staging)
            seen.append(staging.bytes[: plan.outputs.nbytes].copy())
        self._memory.clear_state(self._api, self._stream)
        self._settle()
        self._check_counters(smallest.name, staging)
        for place in plan.outputs.fields:
            buffer = place.buffer
            first, second = (s[place.at : place.at + buffer.nbytes] for s in seen)
            wrong = int(np.count_nonzero(first != second))
            if wrong:
                raise SelfTestError(
                    f"{self._api.info.name}: entry {smallest.name}, replayed twice on the same "
                    f"inputs, gave output {buffer.name} with {wrong} of "
                    f"{buffer.nbytes} bytes different"
                )

    def _check_counters(self, entry: str, staging: Staging) -> None:
        for buffer in self._memory.counters:
            address = self._memory.address_of(buffer)
            self._api.to_host(staging.address, address, buffer.nbytes, self._stream)
            self._settle()
            if wrong := int(np.count_nonzero(staging.bytes[: buffer.nbytes])):
                raise SelfTestError(
                    f"{self._api.info.name}: entry {entry} was replayed, and of the "
                    f"{buffer.nbytes} bytes of {buffer.name}, expected to be 0, {wrong} are not"
                )


def _check(program: Program, device: DeviceInfo) -> None:
    """ProgramError for the first part of `program` that `device` cannot run."""
    if program.target != device.target:
        raise ProgramError(
            f"the program was built for {program.target}, and the device is {device.target} "
            f"({device.name})"
        )
    check_program(program, device)


# Kinds of buffers that use staging memory, one after the other.
_HOST = ("input", "output")


def _layouts(entry: Entry) -> tuple[Layout, Layout]:
    """Inputs and outputs of an entry."""
    inputs, outputs = (
        lay_out(buffer for buffer in entry.buffers if buffer.kind == kind) for kind in _HOST
    )
    return inputs, outputs


class GpuDriver:
    """Implements driver.Driver for one GPU, through the C interface `api`."""

    api: ClassVar[type[DeviceApi]]

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
