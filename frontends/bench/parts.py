"""The launches of a step as functions of their own, so that a device can time them.

A part is a chain of all launches of one kind, one after the other as in the step: the same kernel
on the same grid for the same op, over the weights of every layer in turn, which are cold where
they exceed the device's cache. A prefix is a step up to some launch; what a launch adds to a step
is the difference of two, overlap included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from ...codegen.memory import aligned
from ...compiler.dtypes import INTEGERS
from ...runtime.program import STEP, Buffer, Entry, Program
from ..launches import op_and_place

# A chain of fewer launches is repeated: the start of a graph would be most of what is measured.
_SHORTEST = 16


@dataclass(frozen=True)
class Part:
    """Launches of one kind: their places in the step's entry, and what they are."""

    function: str
    launches: tuple[int, ...]
    op: str
    place: str
    kernel: str
    grid: tuple[int, int, int]
    chained: int


def parts_of(program: Program, entry: Entry) -> tuple[Part, ...]:
    """Every kind of launch of an entry of the step, in the order of the first."""
    kinds: dict[tuple[str, str, tuple[int, int, int]], list[int]] = {}
    for i, launch in enumerate(entry.launches):
        kinds.setdefault((op_and_place(launch.label)[0], launch.kernel, launch.grid), []).append(i)
    return tuple(
        Part(
            f"part {n} of {entry.name}",
            tuple(launches),
            op,
            ", ".join(dict.fromkeys(place_of(entry.launches[i].label) for i in launches)),
            program.kernels[kernel].symbol,
            grid,
            len(launches) * -(-_SHORTEST // len(launches)),
        )
        for n, ((op, kernel, grid), launches) in enumerate(kinds.items())
    )


def with_own_integers(program: Program) -> Program:
    """`program`, whose entries have memory of their own for integers: tokens, places, experts.

    A launch that is timed by itself finds there what the last whole step left, which is an index
    into something, and not what another launch has written over it.
    """
    sizes: dict[str, int] = {}
    functions = program.functions.values()
    for buffer in (b for f in functions for e in f.entries for b in e.buffers if _is_integer(b)):
        sizes[buffer.name] = max(buffer.nbytes, sizes.get(buffer.name, 0))
    at: dict[str, int] = {}
    end = aligned(program.arena_bytes)
    for name, nbytes in sizes.items():
        at[name], end = end, end + aligned(nbytes)

    def moved(entry: Entry) -> Entry:
        buffers = tuple(
            replace(b, offset=at[b.name]) if _is_integer(b) else b for b in entry.buffers
        )
        return replace(entry, buffers=buffers)

    made = {
        name: replace(function, entries=tuple(map(moved, function.entries)))
        for name, function in program.functions.items()
    }
    return replace(program, functions=made, arena_bytes=end)


def _is_integer(buffer: Buffer) -> bool:
    return buffer.offset is not None and buffer.dtype in INTEGERS


def prefix_name(entry: Entry, end: int) -> str:
    """The function that is the first `end` launches of the step."""
    return f"first {end} of {entry.name}"


def with_parts(program: Program, entries: Iterable[Entry], timeline: Entry | None) -> Program:
    """`program` and, as functions, the parts of `entries` and every prefix of `timeline`."""
    step = program.functions[STEP]
    made = {part.function: chain for e in entries for part, chain in _chains(program, e)}
    if timeline is not None:
        for end in range(1, len(timeline.launches) + 1):
            made[prefix_name(timeline, end)] = _prefix(timeline, end)
    functions = {name: replace(step, entries=(entry,)) for name, entry in made.items()}
    return replace(program, functions={**program.functions, **functions})


def _chains(program: Program, entry: Entry) -> Iterator[tuple[Part, Entry]]:
    for part in parts_of(program, entry):
        launches = [entry.launches[i] for i in part.launches]
        launches *= part.chained // len(launches)
        order = tuple((i, i + 1) for i in range(len(launches) - 1))
        yield part, replace(entry, launches=tuple(launches), dependencies=order)


def _prefix(entry: Entry, end: int) -> Entry:
    kept = tuple(pair for pair in entry.dependencies if max(pair) < end)
    return replace(entry, launches=entry.launches[:end], dependencies=kept)


def place_of(label: str) -> str:
    """The module of a launch, the same in every layer: `model.layers.*.mlp`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", op_and_place(label)[1])
