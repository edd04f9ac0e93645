"""Static inspection of a GPU program: launches by layer, and resource usage of kernels.

Everything is derived from the program, just compiled or loaded from an ingot; nothing runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..compiler.target import TARGETS
from ..runtime.program import Entry, Kernel, Program, Slice
from .layers import layer_path
from .show import show_numbers

if TYPE_CHECKING:
    from ..codegen.entries import Choice

# Instruction counts in `Kernel.facts`: matrix instructions and conversions.
_COUNTED = ("wgmma", "mma", "tcgen05", "mfma", "scaled_conversions")
_NOT_RUN = (
    "code for AMD is built and checked statically: no kernel of Ingot has been executed on AMD "
    "hardware"
)
# Groups of launches outside layers; BODY for a program without layers.
BODY, BEFORE, AFTER = "all launches", "before the layers", "after the layers"
_OUTSIDE = (BODY, BEFORE, AFTER)


@dataclass(frozen=True)
class LaunchSummary:
    """One launch: its op, path within the layer, kernel, grid, and the reason if known.

    `seconds` is the estimate for the whole op, on its first launch, and `runner_up` what would have
    been second, with its estimate.
    """

    op: str
    place: str
    kernel: str
    grid: tuple[int, int, int]
    why: str | None = None
    seconds: float | None = None
    runner_up: str | None = None


@dataclass(frozen=True)
class LaunchSection:
    """The launches of one layer, or those before or after the layers.

    `layers` are the numbers of all layers with the same launches, none outside the layers.
    """

    title: str
    layers: tuple[int, ...]
    launches: tuple[LaunchSummary, ...]


@dataclass(frozen=True)
class PlannedEntry:
    """One entry of a program, with the kernel choice behind each launch if known."""

    program: Program
    entry: Entry
    choices: tuple[Choice, ...] = ()

    @classmethod
    def of(cls, program: Program, name: str | None, choices: Iterable[Choice] = ()) -> PlannedEntry:
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
    """The entry called `name`, or for that many tokens ("T=8", "8"); the first for None.

    ValueError lists the names.
    """
    if name is None:
        return names[0]
    wanted = f"T={name}" if name.isdecimal() else name
    found = next((n for n in names if n == wanted or n.startswith(f"{wanted},")), None)
    if found is None:
        raise ValueError(f"entry {name!r}: expected one of {', '.join(names)}")
    return found


def sections(step: PlannedEntry) -> tuple[LaunchSection, ...]:
    """The launches of a step: before the layers, each distinct kind of layer once, and after.

    Layers are the same if they launch the same kernels over the same grids for the same ops.
    """
    groups = _groups(step.program, step.entry)
    lines: dict[str, list[LaunchSummary]] = {}
    kinds: dict[str, list[object]] = {}
    for i, launch in enumerate(step.entry.launches):
        op, place = op_and_place(launch.label)
        inside = place.removeprefix(groups[i]).lstrip(".")
        line = LaunchSummary(op, inside, step.program.kernels[launch.kernel].symbol, launch.grid)
        if step.choices:
            choice = step.choices[i]
            line = replace(line, why=choice.reason)
            if i == 0 or choice is not step.choices[i - 1]:
                line = replace(line, seconds=choice.seconds, runner_up=choice.runner_up or None)
        lines.setdefault(groups[i], []).append(line)
        kinds.setdefault(groups[i], []).append((op, inside, launch.kernel, launch.grid))
    found: dict[object, list[str]] = {}
    for group, kind in kinds.items():
        alone = group if group in _OUTSIDE else ""
        found.setdefault((alone, tuple(kind)), []).append(group)
    return tuple(_section(groups, lines[groups[0]]) for groups in found.values())


def _section(groups: Sequence[str], lines: Sequence[LaunchSummary]) -> LaunchSection:
    if groups[0] in _OUTSIDE:
        return LaunchSection(groups[0], (), tuple(lines))
    numbers = tuple(int(group.rpartition(".")[2]) for group in groups)
    many = "s" if len(numbers) > 1 else ""
    return LaunchSection(f"layer{many} {show_numbers(numbers)}", numbers, tuple(lines))


def op_and_place(label: str) -> tuple[str, str]:
    """The op of a launch and the module path of its node."""
    op, _, source = label.partition(" ")
    return op, source.split(" @")[0]


def _groups(program: Program, entry: Entry) -> list[str]:
    """The group of each launch: its layer's path, or one of BODY, BEFORE and AFTER.

    Values that several layers read and no activation reaches (rotary tables) are in no layer.
    """
    buffers = {*program.buffers, *(b.name for b in entry.buffers)}
    scratch = {b.name for b in entry.buffers if b.kind == "scratch"}
    places = [op_and_place(launch.label)[1] for launch in entry.launches]
    groups = ["" if place in buffers else layer_path(place) for place in places]
    touched = [
        {a.buffer for a in launch.args if isinstance(a, Slice)} & scratch
        for launch in entry.launches
    ]
    shared = _shared_launches(groups, touched)
    groups = ["" if i in shared else group for i, group in enumerate(groups)]
    first = next((i for i, group in enumerate(groups) if group), None)
    if first is None:
        return [BODY] * len(groups)
    return [
        group or (BEFORE if i < first or i in shared else AFTER) for i, group in enumerate(groups)
    ]


def _shared_launches(groups: Sequence[str], touched: Sequence[Set[str]]) -> set[int]:
    """Launches in a layer that read no results of others, and whose results other layers read."""
    seen: dict[str, int] = {}  # scratch memory -> the free launch that made it, -1 for another
    free: dict[int, set[str]] = {}
    for i, (group, names) in enumerate(zip(groups, touched, strict=True)):
        if group and names and all(name not in seen or seen[name] in free for name in names):
            free[i] = {group}
        for name in names:
            seen.setdefault(name, i if i in free else -1)
            if seen[name] in free:
                free[seen[name]].add(group)
    return {i for i, users in free.items() if len(users) > 1}


# ---- kernels as they were built


@dataclass(frozen=True)
class BuiltKernel:
    """Resource usage of a compiled kernel; None for what the compiler did not report.

    `spills` are registers (hip) or bytes of stack per thread (cuda), `scalar_spills` scalar
    registers (hip only), `matrix` counts matrix instructions and conversions by name.
    """

    symbol: str
    ops: tuple[str, ...]
    launches: int
    num_warps: int
    registers: int | None
    spills: int | None
    scalar_spills: int | None
    shared: int
    code_bytes: int
    matrix: Mapping[str, int]


@dataclass(frozen=True)
class StaticReport:
    """Resource usage of the kernels of some entries, against the limits of the target.

    `ok` unless a kernel spills, may spill, or uses more shared memory than a block may have.
    `verdict` is one line: spills, and the largest use of shared memory and registers; `note` the
    caveat for code that was never executed on its hardware.
    """

    target: str
    shared_limit: int
    kernels: tuple[BuiltKernel, ...]
    ok: bool
    verdict: str
    note: str | None


def spilled(spills: int | None, scalar_spills: int | None, target: str) -> str:
    """The spills of a kernel as text."""
    if spills is None:
        return "unknown"
    unit = "registers" if target.startswith("hip") else "bytes"
    parts = [f"{spills} {unit}"] if spills else []
    parts += [f"{scalar_spills} scalars"] if scalar_spills else []
    return " and ".join(parts) or "0"


def static_report(program: Program, entries: Iterable[Entry]) -> StaticReport:
    """The kernels that `entries` launch, most launched first."""
    used: Counter[str] = Counter()
    ops: dict[str, dict[str, None]] = {}
    for entry in entries:
        for launch in entry.launches:
            used[launch.kernel] += 1
            ops.setdefault(launch.kernel, {})[op_and_place(launch.label)[0]] = None
    kernels = tuple(
        _built(program.kernels[id_], tuple(ops[id_]), count) for id_, count in used.most_common()
    )
    target, limit = program.target, TARGETS[program.target].shared_bytes
    amd = target.startswith("hip")
    spilling = [
        f"{k.symbol} {spilled(k.spills, k.scalar_spills, target)}"
        for k in kernels
        if k.spills or k.scalar_spills
    ]
    unknown = [k.symbol for k in kernels if k.spills is None]
    over = [k.symbol for k in kernels if k.shared > limit]
    most = max((k.shared for k in kernels), default=0)
    registers = max((k.registers or 0 for k in kernels), default=0)
    parts = [f"SPILLS: {', '.join(spilling)}"] if spilling else []
    parts += [f"spills unknown of {', '.join(unknown)}"] if unknown else []
    parts = parts or ["0 spills"]
    shared = f"at most {most:,} of {limit:,} bytes of {'LDS' if amd else 'shared memory'}"
    parts.append(f"OVER THE LIMIT: {', '.join(over)}: {shared}" if over else shared)
    parts.append(f"at most {registers} registers a thread")
    ok, note = not (spilling or unknown or over), _NOT_RUN if amd else None
    return StaticReport(target, limit, kernels, ok, "; ".join(parts), note)


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
