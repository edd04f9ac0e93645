"""Whether a GPU program can run on a device: all that can be told before memory is allocated."""

from __future__ import annotations

from collections.abc import Mapping

from .device_api import DeviceInfo
from .device_code import code_target
from .host_arrays import DTYPE_BITS, has_host_form, nbytes_of
from .program import Argument, Buffer, Entry, Kernel, Launch, Program, Slice

NUMBER_KINDS = ("i32", "i64", "f32")
# gridX × blockX must stay below it in HIP. CUDA allows more, and no plan comes near.
MAX_THREADS_OF_LAUNCH = 1 << 32
_INTEGER_BITS = {"i32": 32, "i64": 64}


def check_program(program: Program, device: DeviceInfo) -> None:
    """ValueError for the first thing of `program` that `device` cannot run, with its place."""
    if program.target != device.target:
        raise ValueError(
            f"the program was built for {program.target}, and the device is {device.target} "
            f"({device.name})"
        )
    for kernel in program.kernels.values():
        _check_kernel(kernel, device)
    for buffer in program.buffers.values():
        _check_buffer("program", buffer, ("weight", "state"))
    for entry in program.entries:
        _check_entry(program, entry, device)


def place_of(entry: Entry, index: int) -> str:
    """How messages name a launch."""
    launch = entry.launches[index]
    label = f" ({launch.label})" if launch.label else ""
    return f"entry {entry.name}, launch {index}{label} of kernel {launch.kernel}"


def check_number(where: str, argument: Argument, value: object) -> int | float:
    """`value` as what `argument` takes; ValueError for another type, range or a broken promise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: expected {argument.kind}, found {value!r}")
    if argument.kind == "f32":
        return float(value)
    if not isinstance(value, int):
        raise ValueError(f"{where}: expected {argument.kind}, found {value!r}")
    half = 1 << _INTEGER_BITS[argument.kind] - 1
    if not -half <= value < half:
        raise ValueError(f"{where}: {value} does not fit {argument.kind}")
    check_multiple(where, argument, value)
    return value


def check_multiple(where: str, argument: Argument, value: int) -> None:
    """ValueError when `value` is not the multiple that the kernel was promised."""
    if value % argument.multiple:
        raise ValueError(
            f"{where}: the kernel was promised a multiple of {argument.multiple}, found {value}"
        )


def byte_range(part: Slice) -> tuple[int, int]:
    """First byte and end of what `part` covers of its buffer; equal when it is empty."""
    bits = DTYPE_BITS[part.dtype]
    if 0 in part.shape:
        return part.offset, part.offset
    if part.strides is None:
        return part.offset, part.offset + nbytes_of(part.dtype, part.shape)
    steps = [(size - 1) * stride for size, stride in zip(part.shape, part.strides, strict=True)]
    low, high = sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps)
    return part.offset + low * bits // 8, part.offset - (-(high + 1) * bits // 8)


def _check_kernel(kernel: Kernel, device: DeviceInfo) -> None:
    where = f"kernel {kernel.id}"
    if not isinstance(kernel.binary, bytes):
        raise ValueError(f"{where}: expected device code, found a Python callable")
    try:
        target = code_target(kernel.binary)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if target != device.target:
        raise ValueError(
            f"{where}: expected code for {device.target}, found code for {target} in its ELF header"
        )
    threads = kernel.num_warps * device.warp
    if not 1 <= threads <= device.max_threads:
        raise ValueError(
            f"{where}: expected a block of 1 to {device.max_threads} threads, found "
            f"{kernel.num_warps} warps of {device.warp}"
        )
    if not 0 <= kernel.shared <= device.shared_bytes:
        raise ValueError(
            f"{where}: expected at most {device.shared_bytes} bytes of shared memory on "
            f"{device.name}, found {kernel.shared}"
        )
    for index, argument in enumerate(kernel.args):
        pointed = argument.kind.removeprefix("*")
        known = pointed in DTYPE_BITS if argument.kind[:1] == "*" else pointed in NUMBER_KINDS
        if not known:
            raise ValueError(f"{where}, argument {index}: unknown kind {argument.kind!r}")
        if argument.multiple < 1 or (argument.kind == "f32" and argument.multiple != 1):
            raise ValueError(
                f"{where}, argument {index}: {argument.kind} cannot be promised as a multiple of "
                f"{argument.multiple}"
            )


def _check_buffer(where: str, buffer: Buffer, kinds: tuple[str, ...]) -> None:
    where = f"{where}, buffer {buffer.name}"
    if buffer.kind not in kinds:
        raise ValueError(f"{where}: expected {' or '.join(kinds)}, found {buffer.kind}")
    if buffer.dtype not in DTYPE_BITS:
        raise ValueError(f"{where}: unknown dtype {buffer.dtype!r}")
    nbytes = nbytes_of(buffer.dtype, buffer.shape)
    if buffer.nbytes != nbytes:
        raise ValueError(
            f"{where}: {buffer.dtype}{list(buffer.shape)} is {nbytes} bytes, found {buffer.nbytes}"
        )


def _check_entry(program: Program, entry: Entry, device: DeviceInfo) -> None:
    where = f"entry {entry.name}"
    known = dict(program.buffers)
    for buffer in entry.buffers:
        _check_buffer(where, buffer, ("input", "output", "scratch"))
        if buffer.name in known:
            raise ValueError(f"{where}: there are two buffers {buffer.name}")
        known[buffer.name] = buffer
        if buffer.offset is None or not 0 <= buffer.offset <= program.arena_bytes - buffer.nbytes:
            raise ValueError(
                f"{where}, buffer {buffer.name}: {buffer.nbytes} bytes at {buffer.offset} are "
                f"outside the arena of {program.arena_bytes} bytes"
            )
        if buffer.kind == "output" and not has_host_form(buffer.dtype):
            raise ValueError(f"{where}, output {buffer.name}: the host cannot read {buffer.dtype}")
    for index, launch in enumerate(entry.launches):
        _check_launch(place_of(entry, index), program, launch, known, device)
    for earlier, later in entry.dependencies:
        if not 0 <= earlier < later < len(entry.launches):
            raise ValueError(
                f"{where}: expected dependencies on earlier of {len(entry.launches)} launches, "
                f"found {(earlier, later)}"
            )
    if len(set(entry.dependencies)) != len(entry.dependencies):
        raise ValueError(f"{where}: a dependency stands there twice")


def _check_launch(
    where: str,
    program: Program,
    launch: Launch,
    known: Mapping[str, Buffer],
    device: DeviceInfo,
) -> None:
    if launch.kernel not in program.kernels:
        raise ValueError(f"{where}: the program has no such kernel")
    kernel = program.kernels[launch.kernel]
    _check_grid(where, launch, kernel.num_warps * device.warp, device)
    if len(launch.args) != len(kernel.args):
        raise ValueError(
            f"{where}: expected {len(kernel.args)} arguments, found {len(launch.args)}"
        )
    for index, (argument, value) in enumerate(zip(kernel.args, launch.args, strict=True)):
        at = f"{where}, argument {index}"
        if argument.kind[:1] != "*":
            check_number(at, argument, value)
            continue
        if not isinstance(value, Slice):
            raise ValueError(f"{at}: expected a slice of {argument.kind[1:]}, found {value!r}")
        _check_slice(at, argument.kind[1:], value, known)


def _check_grid(where: str, launch: Launch, threads: int, device: DeviceInfo) -> None:
    fits = all(1 <= n <= most for n, most in zip(launch.grid, device.max_grid, strict=True))
    if not fits or launch.grid[0] * threads >= MAX_THREADS_OF_LAUNCH:
        raise ValueError(
            f"{where}: expected a grid of 1 to {device.max_grid} blocks with fewer than 2³² "
            f"threads along x, found {launch.grid} blocks of {threads}"
        )


def _check_slice(where: str, dtype: str, part: Slice, known: Mapping[str, Buffer]) -> None:
    if part.buffer not in known:
        raise ValueError(f"{where}: there is no buffer {part.buffer}")
    if part.dtype != dtype:
        raise ValueError(f"{where}: expected a slice of {dtype}, found one of {part.dtype}")
    if any(size < 0 for size in part.shape):
        raise ValueError(f"{where}: expected a shape, found {list(part.shape)}")
    if part.strides is not None and len(part.strides) != len(part.shape):
        raise ValueError(f"{where}: expected {len(part.shape)} strides, found {list(part.strides)}")
    low, high = byte_range(part)
    nbytes = known[part.buffer].nbytes
    if not 0 <= low <= high <= nbytes:
        raise ValueError(
            f"{where}: bytes {low} to {high} are outside buffer {part.buffer} of {nbytes} bytes"
        )
