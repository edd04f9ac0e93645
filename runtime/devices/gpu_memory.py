"""Device memory of a GPU program: allocation, buffer addresses, and upload of weights."""

from __future__ import annotations

import secrets
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..driver import WeightLoader
from ..program import Buffer, Program
from .check_program import BASE_ALIGNMENT
from .device_api import DeviceApi, DeviceError
from .host_arrays import Bytes, check_tensor, host_array, is_torch_tensor, memory_view

# Weights are uploaded through double-buffered pinned memory of at most this size.
UPLOAD_BYTES = 64 << 20
PROBE_BYTES = 1 << 16


class SelfTestError(Exception):
    """Data read back from the device, or the result of a second replay, differs."""


@dataclass
class GpuMemory:
    """The arena, state and weights of one program; addresses are ints.

    `borrowed` holds the tensors whose memory is used in place.
    """

    arena: int = 0
    addresses: dict[str, int] = field(default_factory=dict[str, int])
    state: list[Buffer] = field(default_factory=list[Buffer])
    counters: list[Buffer] = field(default_factory=list[Buffer])
    borrowed: list[Any] = field(default_factory=list[Any])

    def address_of(self, buffer: Buffer) -> int:
        """The address of `buffer`, in the arena or in its own allocation."""
        return self.addresses[buffer.name] if buffer.offset is None else self.arena + buffer.offset

    def clear_state(self, api: DeviceApi, stream: int) -> None:
        """Queue zeros for all state."""
        for buffer in self.state:
            if buffer.nbytes:
                api.fill(self.addresses[buffer.name], 0, buffer.nbytes, stream)


@contextmanager
def borrowed(api: DeviceApi, stream: int) -> Generator[ExitStack]:
    """A stack of temporary resources, freed when the stream has finished using them.

    Of several errors the first, which is the cause, is raised.
    """
    taken = ExitStack()
    try:
        yield taken
    except BaseException:
        taken.callback(api.wait_stream, stream)
        with suppress(DeviceError):
            taken.close()
        raise
    taken.callback(api.wait_stream, stream)
    taken.close()


def allocate_memory(api: DeviceApi, program: Program, stream: int, owned: ExitStack) -> GpuMemory:
    """Arena, state and counters, zeroed; `owned` frees them.

    Zeros in the arena make unwritten memory the same in every run.
    """
    memory = GpuMemory(arena=_allocate(api, owned, "the arena", program.arena_bytes))
    api.fill(memory.arena, 0, max(program.arena_bytes, 1), stream)
    for buffer in program.buffers.values():
        if buffer.kind in ("state", "counter"):
            what = f"{buffer.kind} {buffer.name}"
            memory.addresses[buffer.name] = _allocate(api, owned, what, buffer.nbytes)
            held = memory.state if buffer.kind == "state" else memory.counters
            held.append(buffer)
    memory.clear_state(api, stream)
    for buffer in memory.counters:
        if buffer.nbytes:
            api.fill(memory.addresses[buffer.name], 0, buffer.nbytes, stream)
    return memory


def upload_weights(
    api: DeviceApi,
    program: Program,
    weights: WeightLoader,
    memory: GpuMemory,
    stream: int,
    owned: ExitStack,
) -> None:
    """Copy every weight to the device, one at a time, and wait for the copies.

    A contiguous, aligned torch tensor on this device is used in place, after synchronizing with
    the streams that write it. ValueError for another dtype, shape or device.
    """
    buffers = [buffer for buffer in program.buffers.values() if buffer.kind == "weight"]
    largest = max((buffer.nbytes for buffer in buffers), default=0)
    with borrowed(api, stream) as scratch:
        uploader = _Uploader(api, stream, min(UPLOAD_BYTES, 2 * largest), scratch)
        for buffer in buffers:
            what = f"weight {buffer.name}"
            value = weights(buffer.name)
            if is_torch_tensor(value) and value.is_cuda:
                tensor = _in_place(api, what, value, buffer)
                memory.addresses[buffer.name] = int(tensor.data_ptr())
                memory.borrowed.append(tensor)
                continue
            source = host_array(what, value, buffer.dtype, buffer.shape)
            address = _allocate(api, owned, what, buffer.nbytes)
            memory.addresses[buffer.name] = address
            uploader.send(address, source)
        api.synchronize()


def check_copies(api: DeviceApi, stream: int) -> None:
    """Write random bytes to the device and read them back; SelfTestError when they differ."""
    with borrowed(api, stream) as scratch:
        device = _allocate(api, scratch, "the probe", PROBE_BYTES)
        host = api.allocate_pinned(2 * PROBE_BYTES)
        scratch.callback(api.free_pinned, host)
        view = memory_view(host, 2 * PROBE_BYTES)
        written, read = view[:PROBE_BYTES], view[PROBE_BYTES:]
        # Twice: a copy that returns stale bytes could pass once.
        for _ in range(2):
            written[:] = np.frombuffer(secrets.token_bytes(PROBE_BYTES), np.uint8)
            read[:] = ~written
            api.to_device(device, host, PROBE_BYTES, stream)
            api.to_host(host + PROBE_BYTES, device, PROBE_BYTES, stream)
            api.wait_stream(stream)
            wrong = int(np.count_nonzero(read != written))
            if wrong:
                raise SelfTestError(
                    f"{api.info.name}: of {PROBE_BYTES} bytes written to the device {wrong} came "
                    "back changed; its driver or its memory is at fault"
                )


class _Uploader:
    """Copies host bytes to the device through two halves of pinned memory."""

    def __init__(self, api: DeviceApi, stream: int, nbytes: int, scratch: ExitStack) -> None:
        self._api, self._stream = api, stream
        self._half = max(nbytes // 2, 1)
        self._host = api.allocate_pinned(2 * self._half)
        scratch.callback(api.free_pinned, self._host)
        self._view = memory_view(self._host, 2 * self._half)
        self._events = (api.create_event(), api.create_event())
        for event in self._events:
            scratch.callback(api.destroy_event, event)
            api.record_event(event, stream)
        self._current = 0

    def send(self, address: int, source: Bytes) -> None:
        """Queue a copy of `source` to `address`; `source` may change after this returns."""
        for start in range(0, source.nbytes, self._half):
            part = source[start : start + self._half]
            at, event = self._current * self._half, self._events[self._current]
            self._api.wait_event(event)
            self._view[at : at + part.nbytes] = part
            self._api.to_device(address + start, self._host + at, part.nbytes, self._stream)
            self._api.record_event(event, self._stream)
            self._current = 1 - self._current


def _allocate(api: DeviceApi, owned: ExitStack, what: str, nbytes: int) -> int:
    # Drivers reject 0 bytes, but an empty buffer needs an address.
    try:
        address = api.allocate(max(nbytes, 1))
    except DeviceError as error:
        error.add_note(f"while allocating {nbytes} bytes for {what} on {api.info.name}")
        raise
    owned.callback(api.free, address)
    return address


def _in_place(api: DeviceApi, what: str, value: Any, buffer: Buffer) -> Any:
    """A contiguous, aligned tensor of `value`, which is on this device: its own memory or a copy.

    It keeps the memory alive when a parameter is moved (`module.cpu()`).
    """
    check_tensor(what, value, buffer.dtype, buffer.shape)
    if value.device.index != api.info.ordinal:
        raise ValueError(f"{what}: expected device {api.info.ordinal}, found {value.device}")
    tensor = value.detach().resolve_conj().resolve_neg().contiguous()
    return tensor if tensor.data_ptr() % BASE_ALIGNMENT == 0 else tensor.clone()
