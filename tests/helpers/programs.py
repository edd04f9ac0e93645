"""Programs of one function, `step`, made and changed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ingot.runtime.program import STEP, Buffer, Entry, Function, Program, Spec
from msgspec.structs import replace


def function_of(entry: Entry) -> Function:
    """One that has `entry` alone: a symbol has one value, the state is for `with_entries`."""
    specs = {
        kind: {b.name: Spec(b.dtype, b.shape) for b in entry.buffers if b.kind == kind}
        for kind in ("input", "output")
    }
    symbols = {name: (size, size) for name, size in entry.symbols.items()}
    return Function(symbols, specs["input"], specs["output"], (), (entry,))


def program_of(
    target: str,
    kernels: Mapping[str, Any],
    buffers: Mapping[str, Buffer],
    entry: Entry,
    arena_bytes: int,
    meta: Mapping[str, Any] | None = None,
) -> Program:
    """A program of `entry` alone, which sees all state."""
    state = tuple(b.name for b in buffers.values() if b.kind == "state")
    step = replace(function_of(entry), state=state)
    return Program(target, kernels, buffers, {STEP: step}, arena_bytes, meta or {})


def with_entries(program: Program, entries: Iterable[Entry]) -> Program:
    """`program` with other entries of `step`."""
    step = replace(program.functions[STEP], entries=tuple(entries))
    return replace(program, functions={**program.functions, STEP: step})


def with_step(program: Program, **changes: Any) -> Program:
    """`program` with a `step` that is another in `changes`."""
    step = replace(program.functions[STEP], **changes)
    return replace(program, functions={**program.functions, STEP: step})
