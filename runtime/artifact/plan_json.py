"""A GPU program as JSON and back: one value for what all entries share, one for each entry.

Kernels are named by the sha256 of their code, which lies beside. The program that is read is of
the right types throughout; whether it may run is for `check_program` to say.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from ..program import Argument, Buffer, Entry, Function, Kernel, Launch, Program, Slice, Spec
from .strict_json import (
    LARGEST,
    IngotError,
    boolean,
    each,
    fields,
    integer,
    items,
    mapping,
    one_of,
    text,
)

_KINDS = ("input", "output", "weight", "state", "scratch")
_SHA = r"[0-9a-f]{64}"
_MOST = 1 << 20  # kernels, buffers, launches
_MOST_FUNCTIONS = 64
_MOST_ENTRIES = 4096
_MOST_ARGS = 256
_MOST_DIMS = 16
# JSON has no such numbers; an argument of a kernel may be one.
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def binary_name(binary: bytes) -> str:
    """The sha256 of device code, by which the plan names it."""
    return hashlib.sha256(binary).hexdigest()


# ---- writing


def program_data(program: Program) -> dict[str, Any]:
    """What all entries of a GPU program share."""
    return {
        "kernels": {id_: _kernel_data(kernel) for id_, kernel in program.kernels.items()},
        "buffers": [_buffer_data(b) for b in program.buffers.values()],
        "functions": {name: _function_data(f) for name, f in program.functions.items()},
        "arena_bytes": program.arena_bytes,
        "meta": dict(program.meta),
    }


def entry_data(entry: Entry) -> dict[str, Any]:
    """One entry."""
    return {
        "symbols": dict(entry.symbols),
        "buffers": [_buffer_data(b) for b in entry.buffers],
        "launches": [
            {
                "kernel": launch.kernel,
                "args": [_arg_data(arg) for arg in launch.args],
                "grid": list(launch.grid),
                "label": launch.label,
            }
            for launch in entry.launches
        ],
        "dependencies": [list(pair) for pair in entry.dependencies],
    }


def _function_data(function: Function) -> dict[str, Any]:
    return {
        "symbols": {name: list(ends) for name, ends in function.symbols.items()},
        "inputs": {n: [s.dtype, list(s.shape)] for n, s in function.inputs.items()},
        "outputs": {n: [s.dtype, list(s.shape)] for n, s in function.outputs.items()},
        "state": list(function.state),
        "entries": len(function.entries),
    }


def _kernel_data(kernel: Kernel) -> dict[str, Any]:
    if not isinstance(kernel.binary, bytes):
        raise ValueError(
            f"kernel {kernel.symbol}: expected device code, found a {type(kernel.binary).__name__}"
        )
    return {
        "symbol": kernel.symbol,
        "binary": binary_name(kernel.binary),
        "num_warps": kernel.num_warps,
        "shared": kernel.shared,
        "args": [[a.kind, a.multiple] for a in kernel.args],
        "programmatic": kernel.programmatic,
        "facts": dict(kernel.facts),
    }


def _buffer_data(buffer: Buffer) -> list[Any]:
    return [
        buffer.name,
        buffer.dtype,
        list(buffer.shape),
        buffer.kind,
        buffer.nbytes,
        buffer.offset,
    ]


def _arg_data(arg: Slice | float) -> Any:
    if isinstance(arg, Slice):
        strides = None if arg.strides is None else list(arg.strides)
        return [arg.buffer, arg.dtype, list(arg.shape), arg.offset, strides]
    return str(arg) if isinstance(arg, float) and not math.isfinite(arg) else arg


# ---- reading


def read_program(
    target: str,
    shared: Any,
    entries: Mapping[str, Any],
    binary: Callable[[str], bytes],
    where: str,
) -> Program:
    """The program of `target` out of `program_data` and, by the name of its place, `entry_data`.

    `binary` gives the code of a sha256. IngotError for data of another form; `where` names its
    place in it.
    """
    data = fields(shared, where, ("kernels", "buffers", "functions", "arena_bytes", "meta"))
    kernels = {
        text(id_, f"{where}: kernels"): _kernel(id_, value, binary, f"{where}: kernel {id_[:64]}")
        for id_, value in mapping(data["kernels"], f"{where}: kernels", _MOST).items()
    }
    read = each(items(data["buffers"], f"{where}: buffers", _MOST), f"{where}: buffers", _buffer)
    buffers = {buffer.name: buffer for buffer in read}
    if len(buffers) != len(read):
        raise IngotError(f"{where}: buffers: expected names that differ, found one twice")
    places = iter(entries.items())
    functions = {
        text(name, f"{where}: functions"): _function(value, places, f"{where}: function {name:.64}")
        for name, value in mapping(
            data["functions"], f"{where}: functions", _MOST_FUNCTIONS
        ).items()
    }
    if (left := next(places, None)) is not None:
        raise IngotError(f"{left[0]}: expected an entry of a function, found more than there are")
    return Program(
        target,
        kernels,
        buffers,
        functions,
        integer(data["arena_bytes"], f"{where}: arena_bytes"),
        mapping(data["meta"], f"{where}: meta", _MOST_ARGS),
    )


def _function(value: Any, entries: Iterator[tuple[str, Any]], where: str) -> Function:
    """A function; its entries are the next of `entries`."""
    data = fields(value, where, ("symbols", "inputs", "outputs", "state", "entries"))
    count = integer(data["entries"], f"{where}: entries", 0, _MOST_ENTRIES)
    found = tuple(_entry(value, place) for place, value in islice(entries, count))
    if len(found) != count:
        raise IngotError(f"{where}: entries: expected {count}, found {len(found)}")
    symbols = mapping(data["symbols"], f"{where}: symbols", _MOST_DIMS)
    return Function(
        {text(n, where): _pair(ends, f"{where}: symbol {n:.64}") for n, ends in symbols.items()},
        _specs(data["inputs"], f"{where}: inputs"),
        _specs(data["outputs"], f"{where}: outputs"),
        each(items(data["state"], f"{where}: state", _MOST), f"{where}: state", text),
        found,
    )


def _specs(value: Any, where: str) -> dict[str, Spec]:
    return {
        text(name, where): _spec(spec, f"{where}: {name:.64}")
        for name, spec in mapping(value, where, _MOST_ARGS).items()
    }


def _spec(value: Any, where: str) -> Spec:
    dtype, shape = items(value, where, 2, 2)
    return Spec(text(dtype, where), each(items(shape, where, _MOST_DIMS), where, _dim))


def _dim(value: Any, where: str) -> int | str:
    return text(value, where) if isinstance(value, str) else integer(value, where)


def _kernel(id_: str, value: Any, binary: Callable[[str], bytes], where: str) -> Kernel:
    names = ("symbol", "binary", "num_warps", "shared", "args", "programmatic", "facts")
    data = fields(value, where, names)
    return Kernel(
        id_,
        text(data["symbol"], f"{where}: symbol", most=4096),
        binary(text(data["binary"], f"{where}: binary", _SHA)),
        integer(data["num_warps"], f"{where}: num_warps"),
        integer(data["shared"], f"{where}: shared"),
        each(items(data["args"], f"{where}: args", _MOST_ARGS), f"{where}: args", _argument),
        boolean(data["programmatic"], f"{where}: programmatic"),
        mapping(data["facts"], f"{where}: facts", _MOST_ARGS),
    )


def _argument(value: Any, where: str) -> Argument:
    kind, multiple = items(value, where, 2, 2)
    return Argument(text(kind, where), integer(multiple, where))


def _buffer(value: Any, where: str) -> Buffer:
    name, dtype, shape, kind, nbytes, offset = items(value, where, 6, 6)
    return Buffer(
        text(name, where),
        text(dtype, where),
        _sizes(shape, where),
        one_of(kind, where, _KINDS),
        integer(nbytes, where),
        None if offset is None else integer(offset, where),
    )


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    return each(items(value, where, _MOST_DIMS), where, integer)


def _stride(value: Any, where: str) -> int:
    return integer(value, where, -LARGEST, LARGEST)


def _entry(value: Any, where: str) -> Entry:
    data = fields(value, where, ("symbols", "buffers", "launches", "dependencies"))
    symbols = mapping(data["symbols"], f"{where}: symbols", _MOST_DIMS)
    launches = items(data["launches"], f"{where}: launches", _MOST)
    dependencies = items(data["dependencies"], f"{where}: dependencies", _MOST)
    return Entry(
        {text(n, where): integer(size, f"{where}: symbol {n[:64]}") for n, size in symbols.items()},
        each(items(data["buffers"], f"{where}: buffers", _MOST), f"{where}: buffers", _buffer),
        each(launches, f"{where}: launches", _launch),
        each(dependencies, f"{where}: dependencies", _pair),
    )


def _launch(value: Any, where: str) -> Launch:
    data = fields(value, where, ("kernel", "args", "grid", "label"))
    x, y, z = each(items(data["grid"], f"{where}: grid", 3, 3), f"{where}: grid", integer)
    return Launch(
        text(data["kernel"], f"{where}: kernel"),
        each(items(data["args"], f"{where}: args", _MOST_ARGS), f"{where}: args", _arg),
        (x, y, z),
        text(data["label"], f"{where}: label", most=4096),
    )


def _arg(value: Any, where: str) -> Slice | int | float:
    if isinstance(value, str):
        return _NOT_FINITE[one_of(value, where, _NOT_FINITE)]
    if isinstance(value, float):
        return value
    if not isinstance(value, list):
        return integer(value, where, -(2**63), 2**63 - 1)
    buffer, dtype, shape, offset, strides = items(value, where, 5, 5)
    return Slice(
        text(buffer, where),
        text(dtype, where),
        _sizes(shape, where),
        integer(offset, where, 0, LARGEST),
        None if strides is None else each(items(strides, where, _MOST_DIMS), where, _stride),
    )


def _pair(value: Any, where: str) -> tuple[int, int]:
    earlier, later = each(items(value, where, 2, 2), where, integer)
    return earlier, later


__all__ = ["binary_name", "entry_data", "program_data", "read_program"]
