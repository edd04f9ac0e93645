"""Serializes a GPU program as JSON: one file for the shared part, one for each entry.

Instead of their code kernels have its SHA-256. Reading checks types and bounds; `check_program`
validates the program.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any

from msgspec import to_builtins
from msgspec.structs import replace

from ..program import Entry, Program
from .strict_json import IngotError, typed, write_json

_NOT_FINITE = ("inf", "-inf", "nan")  # JSON has no such numbers; an argument of a kernel may be one


def program_json(program: Program) -> bytes:
    """The part of a GPU program that its entries share, as JSON."""
    for kernel in program.kernels.values():
        if not isinstance(kernel.binary, bytes):
            found = type(kernel.binary).__name__
            raise ValueError(f"kernel {kernel.symbol}: expected device code, found a {found}")
    kernels = {
        name: replace(kernel, binary=sha256(kernel.binary).digest())
        for name, kernel in program.kernels.items()
    }
    functions = {name: replace(f, entries=()) for name, f in program.functions.items()}
    return write_json(to_builtins(replace(program, kernels=kernels, functions=functions)))


def entry_json(entry: Entry) -> bytes:
    """One entry as JSON."""
    data: Any = to_builtins(entry)
    for launch in data["launches"]:
        launch["args"] = [
            str(arg) if isinstance(arg, float) and not math.isfinite(arg) else arg
            for arg in launch["args"]
        ]
    return write_json(data)


def read_program(
    shared: Any,
    entries: Iterable[tuple[str, str, Any]],
    binary: Callable[[str], bytes],
    where: str,
) -> Program:
    """The program out of the JSON of `program_json` and, for each entry, the name of its function,
    its place and its JSON.

    `binary` gives the code of a sha256. IngotError for data of another form; `where` names its
    place in it.
    """
    program = typed(shared, Program, where)
    for name, kernel in program.kernels.items():
        if len(kernel.binary) != sha256().digest_size:
            raise IngotError(
                f"{where}: kernels: {name[:80]!r}: expected a SHA-256 of "
                f"{sha256().digest_size} bytes, found {len(kernel.binary)}"
            )
    plans: defaultdict[str, list[Entry]] = defaultdict(list)
    for function, place, value in entries:
        if function not in program.functions:
            raise IngotError(f"{where}: functions: expected {function!r}, found none of that name")
        plans[function].append(typed(_with_numbers(value), Entry, place))
    return replace(
        program,
        kernels={n: replace(k, binary=binary(k.binary.hex())) for n, k in program.kernels.items()},
        functions={n: replace(f, entries=tuple(plans[n])) for n, f in program.functions.items()},
    )


def _with_numbers(entry: Any) -> Any:
    """The JSON of an entry, in which text for an argument that is not finite becomes that."""
    launches = entry.get("launches") if isinstance(entry, dict) else None
    for launch in launches if isinstance(launches, list) else ():
        if isinstance(launch, dict) and isinstance(args := launch.get("args"), list):
            launch["args"] = [float(arg) if arg in _NOT_FINITE else arg for arg in args]
    return entry
