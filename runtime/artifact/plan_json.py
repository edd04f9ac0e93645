"""Serializes a GPU program as JSON: one file for the shared part, one for each entry.

Kernels refer to their code by its SHA-256. Reading checks types and bounds; `check_program`
validates the program.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any, TypeVar, get_args

from msgspec import Meta, Struct, convert, structs, to_builtins

from ..program import Argument, Buffer, BufferKind, Entry, Function, Kernel, Program, Slice, Spec
from .strict_json import (
    LARGEST,
    IngotError,
    LongText,
    Sha256,
    Size,
    Strict,
    Text,
    typed,
    write_json,
)

T = TypeVar("T")
_Most = Meta(max_length=1 << 20)  # kernels, buffers, launches
_MostArgs = Meta(max_length=256)
_MostDims = Meta(max_length=16)
_Shape = Annotated[tuple[Size, ...], _MostDims]
_Strides = Annotated[tuple[Annotated[int, Meta(ge=-LARGEST, le=LARGEST)], ...], _MostDims]
_Kind = Annotated[str, Meta(pattern=rf"^({'|'.join(get_args(BufferKind))})\Z")]
# JSON has no such numbers; an argument of a kernel may be one.
_NotFinite = Annotated[str, Meta(pattern=r"^(-?inf|nan)\Z")]
_Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class _Row(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A struct encoded as a list of its fields."""


class _Argument(_Row, frozen=True):
    kind: Text
    multiple: Size


class _Buffer(_Row, frozen=True):
    name: Text
    dtype: Text
    shape: _Shape
    kind: _Kind
    nbytes: Size
    offset: Size | None


class _Slice(_Row, frozen=True):
    buffer: Text
    dtype: Text
    shape: _Shape
    offset: Size
    strides: _Strides | None


class _Kernel(Strict, frozen=True):
    id: Text
    symbol: LongText
    binary: Sha256
    num_warps: Size
    shared: Size
    args: Annotated[tuple[_Argument, ...], _MostArgs]
    programmatic: bool
    facts: Annotated[dict[Text, Any], _MostArgs]


class _Launch(Strict, frozen=True):
    kernel: Text
    args: Annotated[tuple[_Slice | _Integer | float | _NotFinite, ...], _MostArgs]
    grid: tuple[Size, Size, Size]
    label: LongText


class _Entry(Strict, frozen=True):
    symbols: Annotated[dict[Text, Size], _MostDims]
    buffers: Annotated[tuple[_Buffer, ...], _Most]
    launches: Annotated[tuple[_Launch, ...], _Most]
    dependencies: Annotated[tuple[tuple[Size, Size], ...], _Most]


class _Spec(_Row, frozen=True):
    dtype: Text
    shape: Annotated[tuple[Size | Text, ...], _MostDims]


class _Function(Strict, frozen=True):
    symbols: Annotated[dict[Text, tuple[Size, Size]], _MostDims]
    inputs: Annotated[dict[Text, _Spec], _MostArgs]
    outputs: Annotated[dict[Text, _Spec], _MostArgs]
    state: Annotated[tuple[Text, ...], _Most]
    entries: Annotated[int, Meta(ge=0, le=4096)]  # how many


class _Program(Strict, frozen=True):
    kernels: Annotated[tuple[_Kernel, ...], _Most]
    buffers: Annotated[tuple[_Buffer, ...], _Most]
    functions: Annotated[dict[Text, _Function], Meta(max_length=64)]
    arena_bytes: Size
    meta: Annotated[dict[Text, Any], _MostArgs]


def binary_name(binary: bytes) -> str:
    """The SHA-256 of device code, its name in the plan."""
    return hashlib.sha256(binary).hexdigest()


# ---- writing


def program_json(program: Program) -> bytes:
    """The part of a GPU program that its entries share, as JSON."""
    kernels: list[Kernel] = []
    for kernel in program.kernels.values():
        if not isinstance(kernel.binary, bytes):
            found = type(kernel.binary).__name__
            raise ValueError(f"kernel {kernel.symbol}: expected device code, found a {found}")
        kernels.append(replace(kernel, binary=binary_name(kernel.binary)))
    buffers = tuple(program.buffers.values())
    functions = {n: replace(f, entries=len(f.entries)) for n, f in program.functions.items()}
    return _json(replace(program, kernels=kernels, buffers=buffers, functions=functions), _Program)


def entry_json(entry: Entry) -> bytes:
    """One entry as JSON."""

    def written(arg: Slice | float) -> Slice | float | str:
        return str(arg) if isinstance(arg, float) and not math.isfinite(arg) else arg

    launches = [replace(step, args=tuple(map(written, step.args))) for step in entry.launches]
    return _json(replace(entry, launches=launches), _Entry)


def _json(value: object, kind: type[Struct]) -> bytes:
    return write_json(to_builtins(convert(value, kind, from_attributes=True)))


# ---- reading


def read_program(
    target: str,
    shared: Any,
    entries: Mapping[str, Any],
    binary: Callable[[str], bytes],
    where: str,
) -> Program:
    """The program of `target` out of the JSON of `program_json` and, by the name of its place,
    `entry_json`.

    `binary` gives the code of a sha256. IngotError for data of another form; `where` names its
    place in it.
    """
    data = typed(shared, _Program, where)
    kernels = {
        kernel.id: Kernel(
            kernel.id,
            kernel.symbol,
            binary(kernel.binary),
            kernel.num_warps,
            kernel.shared,
            _as(kernel.args, tuple[Argument, ...]),
            kernel.programmatic,
            kernel.facts,
        )
        for kernel in data.kernels
    }
    buffers = {b.name: b for b in _as(data.buffers, tuple[Buffer, ...])}
    for what, found, given in (
        ("kernels", kernels, data.kernels),
        ("buffers", buffers, data.buffers),
    ):
        if len(found) != len(given):
            raise IngotError(f"{where}: {what}: expected names that differ, found one twice")
    expected = sum(function.entries for function in data.functions.values())
    if expected != len(entries):
        raise IngotError(f"{where}: functions: expected {len(entries)} entries, found {expected}")
    plans = iter([_entry(typed(value, _Entry, place)) for place, value in entries.items()])
    functions = {
        name: Function(
            function.symbols,
            _as(function.inputs, dict[str, Spec]),
            _as(function.outputs, dict[str, Spec]),
            function.state,
            tuple(islice(plans, function.entries)),
        )
        for name, function in data.functions.items()
    }
    return Program(target, kernels, buffers, functions, data.arena_bytes, data.meta)


def _entry(entry: _Entry) -> Entry:
    def read(arg: _Slice | float | str) -> _Slice | float:
        return float(arg) if isinstance(arg, str) else arg

    launches = tuple(structs.replace(s, args=tuple(map(read, s.args))) for s in entry.launches)
    return _as(structs.replace(entry, launches=launches), Entry)


def _as(value: object, kind: type[T]) -> T:
    """Convert a checked struct to the dataclass of `program` with the same fields."""
    return convert(value, kind, from_attributes=True)
