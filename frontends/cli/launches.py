"""What a step of a GPU program is: its launches layer by layer, and its kernels as they were built.

All of it is read off the program, so that it is the same for one that was just compiled and for one
out of an ingot. Nothing here runs anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...compiler.target import TARGETS
from ...runtime.program import Entry, Kernel, Launch, Program, Slice
from .inspect_view import layer_path, show_numbers

if TYPE_CHECKING:
    from ...codegen.entries import Choice

# Figures of `Kernel.facts` that count instructions: products on matrix units, and conversions.
_COUNTED = ("wgmma", "mma", "tcgen05", "mfma", "scaled_conversions")
# What stands in no layer: a program without any is one body.
BODY, BEFORE, AFTER = "all launches", "before the layers", "after the layers"
_OUTSIDE = (BODY, BEFORE, AFTER)


@dataclass(frozen=True)
class Line:
    """One launch: the op it is part of, where in its layer, its kernel; why, if that is known.

    `seconds` is the estimate for the whole op, with its first launch.
    """

    op: str
    place: str
    kernel: str
    grid: tuple[int, int, int]
    why: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Section:
    """The launches of one layer, or of what stands before or after the layers.

    `layers` are the numbers of all layers whose launches are these, of none outside the layers.
    """

    title: str
    layers: tuple[int, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Step:
    """One entry of a program, and the choice behind each of its launches where those are known."""

    program: Program
    entry: Entry
    choices: tuple[Choice, ...] = ()

    @classmethod
    def of(cls, program: Program, name: str | None, choices: Iterable[Choice] = ()) -> Step:
        """The entry called `name` as chosen_entry has it; `choices` may be those of all entries.

        ValueError where they are not one for each launch.
        """
        names = [e.name for e in program.entries]
        entry = program.entries[names.index(chosen_entry(names, name))]
        # A choice is for as many launches as it has kernels.
        mine = tuple(c for c in choices if c.entry == entry.name for _ in c.kernels)
        if mine and len(mine) != len(entry.launches):
            raise ValueError(
                f"entry {entry.name}: expected a choice for each of {len(entry.launches)} "
                f"launches, found {len(mine)}"
            )
        return cls(program, entry, mine)

    @property
    def others(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.program.entries if e is not self.entry)


def chosen_entry(names: Sequence[str], name: str | None) -> str:
    """The one of `names` that is `name`, or is for so many tokens ("T=8", "8"); the first for None.

    ValueError lists those there are.
    """
    if name is None:
        return names[0]
    wanted = f"T={name}" if name.isdecimal() else name
    found = next((n for n in names if n == wanted or n.startswith(f"{wanted},")), None)
    if found is None:
        raise ValueError(f"entry {name!r}: expected one of {', '.join(names)}")
    return found


def sections(step: Step) -> tuple[Section, ...]:
    """The launches of a step: before the layers, each distinct kind of layer once, and after.

    Layers are of a kind if they launch the same kernels over the same grids for the same ops.
    """
    homes = _homes(step.program, step.entry)
    lines: dict[str, list[Line]] = {}
    kinds: dict[str, list[object]] = {}
    for i, launch in enumerate(step.entry.launches):
        op, place = _split(launch)
        inside = place.removeprefix(homes[i]).lstrip(".")
        choice = step.choices[i] if step.choices else None
        begins = i == 0 or choice is None or choice is not step.choices[i - 1]
        line = Line(
            op,
            inside,
            step.program.kernels[launch.kernel].symbol,
            launch.grid,
            choice.reason if choice else None,
            choice.seconds if choice and begins else None,
        )
        lines.setdefault(homes[i], []).append(line)
        kinds.setdefault(homes[i], []).append((op, inside, launch.kernel, launch.grid))
    found: dict[object, list[str]] = {}
    for home, kind in kinds.items():
        alone = home if home in _OUTSIDE else ""
        found.setdefault((alone, tuple(kind)), []).append(home)
    return tuple(_section(homes, lines[homes[0]]) for homes in found.values())


def _section(homes: Sequence[str], lines: Sequence[Line]) -> Section:
    if homes[0] in _OUTSIDE:
        return Section(homes[0], (), tuple(lines))
    numbers = tuple(int(home.rpartition(".")[2]) for home in homes)
    many = "s" if len(numbers) > 1 else ""
    return Section(f"layer{many} {show_numbers(numbers)}", numbers, tuple(lines))


def _split(launch: Launch) -> tuple[str, str]:
    """The op of a launch and the module path of its node."""
    op, _, source = launch.label.partition(" ")
    return op, source.split(" @")[0]


def _homes(program: Program, entry: Entry) -> list[str]:
    """Of each launch its layer's path, or which of BODY, BEFORE and AFTER it is in.

    What several layers read and no activation reaches (rotary tables) belongs to none of them,
    whichever it is named after.
    """
    buffers = {*program.buffers, *(b.name for b in entry.buffers)}
    scratch = {b.name for b in entry.buffers if b.kind == "scratch"}
    places = [_split(launch)[1] for launch in entry.launches]
    homes = ["" if place in buffers else layer_path(place) for place in places]
    touched = [
        {a.buffer for a in launch.args if isinstance(a, Slice)} & scratch
        for launch in entry.launches
    ]
    shared = _shared(homes, touched)
    homes = ["" if i in shared else home for i, home in enumerate(homes)]
    first = next((i for i, home in enumerate(homes) if home), None)
    if first is None:
        return [BODY] * len(homes)
    return [home or (BEFORE if i < first or i in shared else AFTER) for i, home in enumerate(homes)]


def _shared(homes: Sequence[str], touched: Sequence[Set[str]]) -> set[int]:
    """Launches in a layer that take nothing computed by others, and that other layers use."""
    seen: dict[str, int] = {}  # scratch memory -> the free launch that made it, -1 for another
    free: dict[int, set[str]] = {}
    for i, (home, names) in enumerate(zip(homes, touched, strict=True)):
        if home and names and all(name not in seen or seen[name] in free for name in names):
            free[i] = {home}
        for name in names:
            seen.setdefault(name, i if i in free else -1)
            if seen[name] in free:
                free[seen[name]].add(home)
    return {i for i, users in free.items() if len(users) > 1}


# ---- kernels as they were built


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel as it was built. What the compiler did not tell of it is None.

    `spills` are registers (hip) or bytes of stack a thread (cuda), `scalar_spills` scalar
    registers (hip only), `matrix` the matrix instructions and conversions in its code by name.
    """

    symbol: str
    ops: tuple[str, ...]
    launches: int
    num_warps: int
    registers: int | None
    spills: int | None
    scalar_spills: int | None
    shared: int
    code_bytes: int = 0
    matrix: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class StaticReport:
    """The kernels of some entries of a program, and what its target allows."""

    target: str
    shared_limit: int
    kernels: tuple[BuiltKernel, ...]

    @property
    def spilling(self) -> tuple[BuiltKernel, ...]:
        return tuple(k for k in self.kernels if (k.spills or 0) + (k.scalar_spills or 0))

    @property
    def over(self) -> tuple[BuiltKernel, ...]:
        """Kernels that want more shared memory than a block may have."""
        return tuple(k for k in self.kernels if k.shared > self.shared_limit)

    @property
    def untold(self) -> tuple[BuiltKernel, ...]:
        """Kernels of which it is not known whether they spill."""
        return tuple(k for k in self.kernels if k.spills is None)

    @property
    def ok(self) -> bool:
        return not (self.spilling or self.over or self.untold)

    @property
    def verdict(self) -> str:
        """In a line: what is spilled, and the most shared memory of any kernel."""
        unit = "LDS" if self.target.startswith("hip") else "shared memory"
        most = max((k.shared for k in self.kernels), default=0)
        registers = max((k.registers or 0 for k in self.kernels), default=0)
        spills = [f"{k.symbol} {spilled(k, self.target)}" for k in self.spilling]
        parts = [f"SPILLS: {', '.join(spills)}"] if spills else []
        if self.untold:
            parts.append(f"spills unknown of {', '.join(k.symbol for k in self.untold)}")
        over = f"OVER THE LIMIT: {', '.join(k.symbol for k in self.over)}: " if self.over else ""
        return "; ".join(
            [
                *(parts or ["0 spills"]),
                f"{over}at most {most:,} of {self.shared_limit:,} bytes of {unit}",
                f"at most {registers} registers a thread",
            ]
        )


def spilled(kernel: BuiltKernel, target: str) -> str:
    """What a kernel spills, in words."""
    if kernel.spills is None:
        return "unknown"
    unit = "registers" if target.startswith("hip") else "bytes"
    parts = [f"{kernel.spills} {unit}"] if kernel.spills else []
    parts += [f"{kernel.scalar_spills} scalars"] if kernel.scalar_spills else []
    return " and ".join(parts) or "0"


def static_report(program: Program, entries: Iterable[Entry]) -> StaticReport:
    """The kernels that `entries` launch, those launched most first."""
    used: Counter[str] = Counter()
    ops: dict[str, dict[str, None]] = {}
    for entry in entries:
        for launch in entry.launches:
            used[launch.kernel] += 1
            ops.setdefault(launch.kernel, {})[_split(launch)[0]] = None
    kernels = [
        _built(program.kernels[id_], tuple(ops[id_]), count) for id_, count in used.most_common()
    ]
    return StaticReport(program.target, TARGETS[program.target].shared_bytes, tuple(kernels))


def _built(kernel: Kernel, ops: tuple[str, ...], launches: int) -> BuiltKernel:
    counts = {n: v for n, v in kernel.facts.items() if isinstance(v, int)}
    return BuiltKernel(
        kernel.symbol,
        ops,
        launches,
        kernel.num_warps,
        counts.get("registers"),
        counts.get("spills"),
        counts.get("scalar_spills"),
        kernel.shared,
        len(kernel.binary) if isinstance(kernel.binary, bytes) else 0,
        {n: counts[n] for n in _COUNTED if n in counts},
    )


__all__ = [
    "BuiltKernel",
    "Line",
    "Section",
    "StaticReport",
    "Step",
    "chosen_entry",
    "sections",
    "spilled",
    "static_report",
]
