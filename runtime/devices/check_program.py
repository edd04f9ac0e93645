"""Validation of a GPU program before it is loaded.

Buffers are within their memory and slices within their buffers; arguments have the kinds and
alignments that kernels expect; launches are within the limits of the target; those that may run at
once have no counter in common; dependencies are acyclic; code is for the target. A caller with a
device passes its limits and checks addresses. Whether device code stays within its arguments, and
leaves counters zero, cannot be checked here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from ...compiler.dtypes import DTYPES, READABLE, dense_bytes
from ...compiler.target import GPUS, Target
from ..program import Argument, Buffer, Entry, Function, Kernel, Launch, Program, Slice
from .device_api import DeviceInfo
from .elf import code_target

# Alignment in bytes of driver allocations, and so of the arena.
BASE_ALIGNMENT = 256
# The largest size, offset or count: sums of a few of them stay far below 2^64.
_LARGEST = 2**48
_MAX_RANK = 16
# Dtypes that kernels take by value.
_NUMBERS = [name for name, dtype in DTYPES.items() if dtype.ctypes]
_SYMBOL = re.compile(r"[A-Za-z_.$][\w.$]{0,4095}", re.ASCII)


class ProgramError(ValueError):
    """An invalid program: which part, what was expected, what was found."""


# Limits of one launch: of a target, or of a device.
Limits = Target | DeviceInfo


def check_program(program: Program, limits: Limits | None = None) -> None:
    """ProgramError, in one line, for the first defect of a GPU program.

    `limits` are those of a device; by default those of the program's target.
    """
    if program.target not in GPUS:
        raise ProgramError(f"target: expected one of {', '.join(GPUS)}; found {program.target}")
    limits = limits or GPUS[program.target]
    _within("arena_bytes", program.arena_bytes, 0, _LARGEST)
    for id_, kernel in program.kernels.items():
        if id_ != kernel.id:
            raise ProgramError(f"kernel {id_}: expected its own id, found {kernel.id}")
        _check_kernel(kernel, program.target, limits)
    for name, buffer in program.buffers.items():
        if name != buffer.name:
            raise ProgramError(f"buffer {name}: expected its own name, found {buffer.name}")
        _check_buffer(buffer)
        if buffer.kind not in ("weight", "state", "counter") or buffer.offset is not None:
            raise ProgramError(
                f"buffer {name}: expected a weight, state or counters without an offset, "
                f"found {buffer.kind} at {buffer.offset}"
            )
    if not program.functions:
        raise ProgramError("functions: expected at least one, found none")
    for name, function in program.functions.items():
        _check_function(name, function, program, limits)


def launch_place(program: Program, entry: Entry, index: int) -> str:
    """A launch in messages: entry, number, label and kernel function."""
    launch = entry.launches[index]
    label = f" ({launch.label[:80]})" if launch.label else ""
    kernel = program.kernels.get(launch.kernel)
    name = kernel.symbol if kernel else launch.kernel
    return f"entry {entry.name}, launch {index}{label} of kernel {name[:80]}"


def check_address(where: str, address: int, taken: Argument) -> None:
    """ProgramError for a pointer that lacks the alignment of `taken`, at least its element size."""
    multiple = math.lcm(taken.multiple, max(DTYPES[taken.kind[1:]].bits // 8, 1))
    if address % multiple:
        raise ProgramError(f"{where}: expected an address that {multiple} divides, found {address}")


def byte_range(part: Slice) -> tuple[int, int]:
    """First byte and end of the range of its buffer that `part` touches; equal when it is empty."""
    if 0 in part.shape:
        return part.offset, part.offset
    if part.strides is None:
        return part.offset, part.offset + dense_bytes(part.dtype, part.shape)
    bits = DTYPES[part.dtype].bits
    steps = [(n - 1) * stride for n, stride in zip(part.shape, part.strides, strict=True)]
    first, last = sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps)
    return part.offset + first * bits // 8, part.offset - (-(last + 1) * bits // 8)


def _within(where: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ProgramError(f"{where}: expected an integer from {least} to {most}, found {value!r}")


def _check_kernel(kernel: Kernel, target: str, limits: Limits) -> None:
    where = f"kernel {kernel.symbol[:80]}"
    if not _SYMBOL.fullmatch(kernel.symbol):
        raise ProgramError(
            f"{where}: expected the name of a function, found {kernel.symbol[:80]!r}"
        )
    if not isinstance(kernel.binary, bytes):
        raise ProgramError(f"{where}: expected device code, found a {type(kernel.binary).__name__}")
    if (found := code_target(kernel.binary)) != target:
        raise ProgramError(f"{where}: expected code for {target}, found {found}")
    _within(
        f"{where}: warps on {limits.name}", kernel.num_warps, 1, limits.max_threads // limits.warp
    )
    _within(f"{where}: bytes shared on {limits.name}", kernel.shared, 0, limits.shared_bytes)
    for i, argument in enumerate(kernel.args):
        _check_argument(f"{where}: argument {i}", argument)


def _check_argument(where: str, argument: Argument) -> None:
    kind = argument.kind
    known = kind[1:] in DTYPES if kind.startswith("*") else kind in _NUMBERS
    if not known:
        raise ProgramError(f"{where}: expected *dtype, i32, i64 or f32, found {kind[:40]!r}")
    _within(f"{where}: multiple", argument.multiple, 1, BASE_ALIGNMENT)
    if kind == "f32" and argument.multiple != 1:
        raise ProgramError(f"{where}: expected no multiple of an f32, found {argument.multiple}")


def _check_buffer(buffer: Buffer) -> None:
    where = f"buffer {buffer.name}"
    _check_shape(where, buffer.dtype, buffer.shape)
    if buffer.nbytes != (expected := dense_bytes(buffer.dtype, buffer.shape)):
        raise ProgramError(
            f"{where}: expected {expected} bytes for {buffer.dtype}{list(buffer.shape)}, "
            f"found {buffer.nbytes}"
        )


def _check_shape(where: str, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype not in DTYPES:
        raise ProgramError(f"{where}: expected one of {', '.join(DTYPES)}; found {dtype[:40]!r}")
    if len(shape) > _MAX_RANK:
        raise ProgramError(f"{where}: expected at most {_MAX_RANK} dims, found {len(shape)}")
    for size in shape:
        _within(f"{where}: dim", size, 0, _LARGEST)
    _within(f"{where}: elements", math.prod(shape), 0, _LARGEST)


def _check_function(name: str, function: Function, program: Program, limits: Limits) -> None:
    where = f"function {name}"
    state = {buffer.name for buffer in program.buffers.values() if buffer.kind == "state"}
    if unknown := set(function.state) - state:
        raise ProgramError(f"{where}: expected state of the program, found {min(unknown)!r:.80}")
    for symbol, (first, last) in function.symbols.items():
        _within(f"{where}: first {symbol}", first, 0, _LARGEST)
        _within(f"{where}: last {symbol}", last, first, _LARGEST)
    if unknown := set(function.fed) - function.inputs.keys():
        raise ProgramError(f"{where}: expected to feed inputs, found {min(unknown)!r:.80}")
    if not function.entries:
        raise ProgramError(f"{where}: expected at least one entry, found none")
    bindings = Counter(tuple(sorted(entry.symbols.items())) for entry in function.entries)
    if twice := next((binding for binding, times in bindings.items() if times > 1), None):
        raise ProgramError(f"{where}: expected each entry once, found {dict(twice)} twice")
    hidden = state - set(function.state)
    shared = {name: b for name, b in program.buffers.items() if name not in hidden}
    for entry in function.entries:
        if entry.symbols.keys() != function.symbols.keys():
            raise ProgramError(
                f"{where}: expected entries for {sorted(function.symbols)}, "
                f"found one for {sorted(entry.symbols)}"
            )
        for symbol, size in entry.symbols.items():
            _within(f"entry {entry.name}: symbol {symbol}", size, *function.symbols[symbol])
        _check_entry(entry, program, shared, limits)
        _check_signature(f"entry {entry.name}", function, entry)
        if function.fed:
            _check_lasting(f"entry {entry.name}", entry)


def _check_lasting(where: str, entry: Entry) -> None:
    """Check that nothing else lies where inputs lie, which a run leaves for the next."""
    lasting, latest = (0, ""), (0, "")  # the furthest end, of inputs and of all, and whose it is
    for buffer in sorted(entry.buffers, key=lambda b: (b.offset or 0, b.nbytes)):
        start, is_input = buffer.offset or 0, buffer.kind == "input"
        end, other = latest if is_input else lasting
        if buffer.nbytes and start < end:
            raise ProgramError(
                f"{where}, buffer {buffer.name}: expected memory that a fed entry's inputs have "
                f"alone, found {other} at the same place"
            )
        latest = max(latest, (start + buffer.nbytes, buffer.name))
        if is_input:
            lasting = max(lasting, (start + buffer.nbytes, buffer.name))


def _check_signature(where: str, function: Function, entry: Entry) -> None:
    """Check that an entry's inputs and outputs are its function's with symbols bound."""
    for kind, specs in (("input", function.inputs), ("output", function.outputs)):
        found = {b.name: b for b in entry.buffers if b.kind == kind}
        if found.keys() != specs.keys():
            raise ProgramError(f"{where}: expected {kind}s {sorted(specs)}, found {sorted(found)}")
        for name, buffer in found.items():
            if not specs[name].fits(buffer.dtype, buffer.shape, entry.symbols):
                raise ProgramError(
                    f"{where}, buffer {name}: expected {specs[name]}, "
                    f"found {buffer.dtype}{list(buffer.shape)}"
                )


def _check_entry(
    entry: Entry, program: Program, shared: Mapping[str, Buffer], limits: Limits
) -> None:
    """Check one entry; `shared` are the program's buffers."""
    where = f"entry {entry.name}"
    local: dict[str, Buffer] = {}
    for buffer in entry.buffers:
        place = f"{where}, buffer {buffer.name}"
        if buffer.name in local or buffer.name in program.buffers:
            raise ProgramError(f"{place}: expected a name of its own, found it twice")
        _check_buffer(buffer)
        if buffer.kind not in ("input", "output", "scratch"):
            raise ProgramError(f"{place}: expected input, output or scratch, found {buffer.kind}")
        if buffer.kind == "output" and buffer.dtype not in READABLE:
            raise ProgramError(
                f"{place}: expected an output of {', '.join(sorted(READABLE))}, "
                f"found {buffer.dtype}"
            )
        if buffer.offset is None:
            raise ProgramError(f"{place}: expected an offset in the arena, found none")
        _within(f"{place}: offset", buffer.offset, 0, _LARGEST)
        if (end := buffer.offset + buffer.nbytes) > program.arena_bytes:
            raise ProgramError(
                f"{place}: expected an end within the arena of {program.arena_bytes} bytes, "
                f"found {end}"
            )
        local[buffer.name] = buffer
    memory = {**shared, **local}
    for i, launch in enumerate(entry.launches):
        _check_launch(launch_place(program, entry, i), launch, program, memory, limits)
    _check_order(where, entry)
    _check_counters(program, entry)


def _check_counters(program: Program, entry: Entry) -> None:
    """Check that launches have counters of their own, or the very same after one another."""
    holders: dict[tuple[str, int, int], list[int]] = {}
    for i, launch in enumerate(entry.launches):
        for arg in launch.args:
            held = program.buffers.get(arg.buffer) if isinstance(arg, Slice) else None
            if isinstance(arg, Slice) and held and held.kind == "counter":
                holders.setdefault((arg.buffer, *byte_range(arg)), []).append(i)
    for (name, start, end), (other, first, _) in pairwise(sorted(holders)):
        if name == other and first < end:
            raise ProgramError(
                f"{launch_place(program, entry, holders[name, start, end][0])}: expected counters "
                f"of its own, found bytes {start} to {end} of {name}, and another's from {first}"
            )
    for (name, start, end), launches in holders.items():
        for earlier, later in pairwise(launches):
            if earlier not in _awaited(entry, later):
                raise ProgramError(
                    f"{launch_place(program, entry, later)}: expected counters of its own, found "
                    f"bytes {start} to {end} of {name}, as launch {earlier} has, not waited for"
                )


def _awaited(entry: Entry, launch: int) -> set[int]:
    """The launch and all that it waits for."""
    seen = {launch}
    for earlier, later in sorted(entry.dependencies, key=lambda pair: pair[1], reverse=True):
        if later in seen:
            seen.add(earlier)
    return seen


def _check_order(where: str, entry: Entry) -> None:
    """Check that every dependency goes forward, so that there is no cycle."""
    count, seen = len(entry.launches), set[tuple[int, int]]()
    for pair in entry.dependencies:
        earlier, later = pair
        if not 0 <= earlier < later < count:
            raise ProgramError(
                f"{where}: expected dependencies (earlier, later) of {count} launches, "
                f"found {list(pair)}"
            )
        if pair in seen:
            raise ProgramError(f"{where}: expected each dependency once, found {list(pair)} twice")
        seen.add(pair)


def _check_launch(
    where: str, launch: Launch, program: Program, memory: Mapping[str, Buffer], limits: Limits
) -> None:
    kernel = program.kernels.get(launch.kernel)
    if kernel is None:
        raise ProgramError(f"{where}: expected a kernel of the program, found no such")
    if len(launch.grid) != 3:
        raise ProgramError(f"{where}: expected a grid of 3, found {len(launch.grid)}")
    for axis, size, most in zip("xyz", launch.grid, limits.max_grid, strict=True):
        _within(f"{where}: grid {axis} on {limits.name}", size, 1, most)
    threads = launch.grid[0] * kernel.num_warps * limits.warp
    if program.target.startswith("hip") and threads >= 2**32:
        raise ProgramError(f"{where}: expected fewer than 2^32 threads along x, found {threads}")
    if len(launch.args) != len(kernel.args):
        raise ProgramError(
            f"{where}: expected {len(kernel.args)} arguments, found {len(launch.args)}"
        )
    for i, (given, taken) in enumerate(zip(launch.args, kernel.args, strict=True)):
        place = f"{where}, argument {i}"
        if isinstance(given, Slice):
            _check_slice(place, given, taken, memory)
        else:
            _check_number(place, given, taken)


def _check_number(where: str, given: float, taken: Argument) -> None:
    if taken.kind.startswith("*"):
        raise ProgramError(f"{where}: expected {taken.kind}, found the number {given!r}")
    if taken.kind == "f32":
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise ProgramError(f"{where}: expected a number for f32, found {given!r}")
        if isinstance(given, int):
            _within(where, given, -(2**63), 2**63 - 1)
        return
    bits = DTYPES[taken.kind].bits
    if not isinstance(given, int):
        raise ProgramError(f"{where}: expected an integer for {taken.kind}, found {given!r}")
    _within(where, given, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if given % taken.multiple:
        raise ProgramError(f"{where}: expected a multiple of {taken.multiple}, found {given}")


def _check_slice(where: str, given: Slice, taken: Argument, memory: Mapping[str, Buffer]) -> None:
    if taken.kind != f"*{given.dtype}":
        raise ProgramError(f"{where}: expected {taken.kind}, found a slice of {given.dtype[:40]}")
    buffer = memory.get(given.buffer)
    if buffer is None:
        raise ProgramError(f"{where}: expected a buffer of this entry, found {given.buffer[:80]!r}")
    _check_shape(where, given.dtype, given.shape)
    _within(f"{where}: offset", given.offset, 0, _LARGEST)
    for stride in given.strides or ():
        _within(f"{where}: stride", stride, -_LARGEST, _LARGEST)
    if given.strides is not None and len(given.strides) != len(given.shape):
        raise ProgramError(
            f"{where}: expected {len(given.shape)} strides, found {len(given.strides)}"
        )
    low, high = byte_range(given)
    if low < 0 or high > buffer.nbytes:
        raise ProgramError(
            f"{where}: expected bytes within the {buffer.nbytes} bytes of {buffer.name}, "
            f"found {low} to {high}"
        )
    check_address(where, (buffer.offset or 0) + given.offset, taken)
