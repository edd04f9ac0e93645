"""A program on the device that is here: each step of a workload, its launches, and serving."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np

from ...compiler.ir import Graph
from ...runtime.devices.graph_executable import GpuDriver, GpuExecutable
from ...runtime.driver import Array, WeightLoader
from ...runtime.program import STEP, BufferKind, Entry, Launch, Program, Slice
from ...runtime.serving.abi import ServingAbi
from ...runtime.serving.sequence import Sequence
from ...runtime.serving.session import Session
from ..launches import PlannedEntry, op_and_place, sections
from ..speculate import Speculation, SpeculationReport, open_session
from .parts import Part, parts_of, prefix_name, with_own_integers, with_parts
from .traffic import NOTHING, Traffic, traffic_by_label
from .workload import Workload, step_inputs, symbols_for

_SERVED_TOKENS, _SERVED_RUNS = 128, 3


@dataclass(frozen=True)
class Rates:
    """What the device reached at best in this run: bytes read and GEMM flops, a second."""

    bytes_per_second: float
    flops_per_second: float | None


@dataclass(frozen=True)
class LaunchFigures:
    """Launches of one kind in a step, timed as a chain of their own.

    `microseconds` is for one of them, `bytes` what all of them must read, `of_limit` the share of
    the time that reading these would take at best, and `share` that of their time in the sum over
    all kinds. Of several launches of an op the one that is given its weight has its bytes.
    """

    op: str
    place: str
    kernel: str
    grid: tuple[int, int, int]
    count: int
    microseconds: float
    bytes: int
    of_limit: float
    share: float


@dataclass(frozen=True)
class Span:
    """A launch on the timeline of a step, in microseconds from its start: overlap counts once."""

    label: str
    start: float
    end: float

    @property
    def op(self) -> str:
        return op_and_place(self.label)[0]


@dataclass(frozen=True)
class StepFigures:
    """One workload. `milliseconds` is a replay on the device; the limit is the larger of its bytes
    at the read bandwidth and its flops at the GEMM rate (where that is known)."""

    workload: str
    batch: int
    new: int
    context: int
    entry: str
    milliseconds: float
    tokens_per_second: float
    traffic: Traffic
    limit_milliseconds: float
    of_limit: float
    of_gemm_rate: float | None
    launches: int
    launches_by_layer: Mapping[str, int]
    parts: tuple[LaunchFigures, ...]
    timeline: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Serving:
    """A session that is given `batch` prompts at once, host included: when the first token of any
    comes, and the rate while all of them decode (None where one ends before another begins).

    `speculation` is there where it drafts: what came of it, measured beside steps without drafts.
    """

    batch: int
    prompt: int
    first_token_milliseconds: float
    tokens_per_second: float | None
    speculation: SpeculationReport | None = None


@dataclass(frozen=True)
class Measured:
    """All figures of one program."""

    load_seconds: float
    steps: tuple[StepFigures, ...]
    serving: tuple[Serving, ...]


def measure(
    program: Program,
    graph: Graph,
    driver: GpuDriver,
    weights: WeightLoader,
    works: Collection[Workload],
    rates: Rates,
    *,
    replays: int,
    timeline: bool,
    speculation: Speculation | None = None,
) -> Measured:
    """Load `program`, whose step is `graph`, and time every workload, the first on a timeline.

    A step is the median of `replays`, its parts that of a fifth of them. Each batch is served as
    well, at its smallest context, with drafts where `speculation` says how. ValueError for a
    workload that the program cannot take.
    """
    program = with_own_integers(program)
    abi = ServingAbi(program)
    step = program.functions[STEP]
    entries = [step.entry(symbols_for(abi, work)) for work in works]
    inputs = [
        step_inputs(step, abi.meta, entry.symbols, work)
        for work, entry in zip(works, entries, strict=True)
    ]
    watched = entries[0] if timeline else None
    begin = perf_counter()
    executable = driver.load(
        with_parts(program, {e.name: e for e in entries}.values(), watched), weights
    )
    loaded = perf_counter() - begin
    timer = _Timer(executable, max(1, replays // 5))
    figures: list[StepFigures] = []
    with closing(executable):
        for work, entry, given in zip(works, entries, inputs, strict=True):
            planned = PlannedEntry(program, entry)
            traffic = traffic_by_label(graph, work)
            spans = timer.timeline(entry, given) if watched and not figures else ()
            parts = _parts(timer, planned, given, traffic, rates)
            milliseconds = timer.milliseconds(STEP, entry, given, replays)
            figures.append(_step(work, planned, milliseconds, traffic, rates, parts, spans))
        decoded = {w.batch: w for w in sorted(works, key=lambda w: -w.context) if w.decodes}
        served = tuple(
            _served(open_session(program, executable, speculation), abi, work)
            for _, work in sorted(decoded.items())
        )
    return Measured(loaded, tuple(figures), served)


@dataclass(frozen=True)
class _Timer:
    """Medians of replays on the device, by default of `replays`."""

    executable: GpuExecutable
    replays: int

    def milliseconds(
        self, function: str, entry: Entry, inputs: Mapping[str, Array], replays: int | None = None
    ) -> float:
        self.executable.run(function, entry.symbols, inputs, ())
        replays = replays or self.replays
        return median(self.executable.measure(function, entry.symbols, inputs, replays))

    def timeline(self, entry: Entry, inputs: Mapping[str, Array]) -> tuple[Span, ...]:
        """When each launch of a step has ended, at the earliest when the one before has."""
        found: list[Span] = []
        end = 0.0
        for count, launch in enumerate(entry.launches, 1):
            name = prefix_name(entry, count)
            until = 1e3 * self.milliseconds(name, entry, inputs)
            found.append(Span(launch.label, end, end := max(end, until)))
        return tuple(found)


def _parts(
    timer: _Timer,
    planned: PlannedEntry,
    inputs: Mapping[str, Array],
    traffic: Mapping[str, Traffic],
    rates: Rates,
) -> tuple[LaunchFigures, ...]:
    entry = planned.entry
    timed: list[tuple[Part, float]] = []
    timer.milliseconds(STEP, entry, inputs, 1)  # indices that parts read are those of a step
    for part in parts_of(planned.program, entry):
        chain = timer.milliseconds(part.function, entry, inputs)
        timed.append((part, 1e3 * chain / part.chained))
    total = sum(each * len(part.launches) for part, each in timed)
    moving = bytes_by_launch(planned.program, entry, traffic)
    found: list[LaunchFigures] = []
    for part, each in timed:
        moved = round(sum(moving[i] for i in part.launches))
        time = each * len(part.launches)
        found.append(
            LaunchFigures(
                op=part.op,
                place=part.place,
                kernel=part.kernel,
                grid=part.grid,
                count=len(part.launches),
                microseconds=each,
                bytes=moved,
                of_limit=1e6 * moved / rates.bytes_per_second / time,
                share=time / total,
            )
        )
    return tuple(found)


def bytes_by_launch(
    program: Program, entry: Entry, traffic: Mapping[str, Traffic]
) -> dict[int, float]:
    """What each launch moves of the traffic of its op.

    It reads the weights that it is given or, of experts, such a part of them as all of the op's
    launches do. The rest is of the launch that is given most of the caches, or else of the weights.
    """
    by_label: dict[str, list[int]] = {}
    for i, launch in enumerate(entry.launches):
        by_label.setdefault(launch.label, []).append(i)
    found: dict[int, float] = {}
    for label, launches in by_label.items():
        total = traffic.get(label, NOTHING).bytes
        held = {i: _held(program, entry.launches[i], "weight") for i in launches}
        part = min(1.0, total / (sum(held.values()) or 1))
        found |= {i: part * nbytes for i, nbytes in held.items()}
        caches = {i: _held(program, entry.launches[i], "state") for i in launches}
        rest = max(launches, key=lambda i: (caches[i], held[i], -i))
        found[rest] += total - sum(found[i] for i in launches)
    return found


def _held(program: Program, launch: Launch, kind: BufferKind) -> int:
    """Bytes of the buffers of a kind that a launch is given."""
    given = {arg.buffer for arg in launch.args if isinstance(arg, Slice)}
    buffers = [program.buffers[name] for name in given if name in program.buffers]
    return sum(buffer.nbytes for buffer in buffers if buffer.kind == kind)


def _step(
    work: Workload,
    planned: PlannedEntry,
    milliseconds: float,
    by_label: Mapping[str, Traffic],
    rates: Rates,
    parts: tuple[LaunchFigures, ...],
    timeline: tuple[Span, ...],
) -> StepFigures:
    traffic = sum(by_label.values(), NOTHING)
    limit = traffic.bytes / rates.bytes_per_second
    of_gemm_rate = None
    if rates.flops_per_second is not None:
        limit = max(limit, traffic.flops / rates.flops_per_second)
        of_gemm_rate = traffic.flops / (1e-3 * milliseconds) / rates.flops_per_second
    return StepFigures(
        workload=str(work),
        batch=work.batch,
        new=work.new,
        context=work.context,
        entry=planned.entry.name,
        milliseconds=milliseconds,
        tokens_per_second=1e3 * work.tokens / milliseconds,
        traffic=traffic,
        limit_milliseconds=1e3 * limit,
        of_limit=1e3 * limit / milliseconds,
        of_gemm_rate=of_gemm_rate,
        launches=len(planned.entry.launches),
        launches_by_layer={s.title: len(s.launches) for s in sections(planned)},
        parts=parts,
        timeline=timeline,
    )


def _served(session: Session, abi: ServingAbi, work: Workload) -> Serving:
    """`work.batch` prompts of `work.context` tokens, and what follows, greedily."""
    draw = np.random.default_rng(0)
    meta = session.meta
    # Those whose prompts were read first decode while the other prompts are read.
    steps = -(-work.batch * work.context // abi.tokens) + _SERVED_TOKENS
    new = min(steps, meta.max_tokens_per_sequence - work.context)
    firsts: list[float] = []
    rates: list[float | None] = []
    for _ in range(1 + _SERVED_RUNS):  # the first use of anything is not what is measured
        prompts = draw.integers(0, meta.vocab_size, (work.batch, work.context)).tolist()
        begin = perf_counter()
        times: dict[Sequence, list[float]] = {}
        for event in session.stream(prompts, max_new_tokens=new):
            if event.finish_reason == "error":
                raise RuntimeError(f"serving {work}: {event.message}")
            times.setdefault(event.sequence, []).append(perf_counter() - begin)
        firsts.append(min(of[0] for of in times.values()))
        rates.append(decode_rate([*times.values()]))
    rated = [rate for rate in rates[1:] if rate is not None]
    first = 1e3 * median(firsts[1:])
    rate = median(rated) if rated else None
    return Serving(work.batch, work.context, first, rate, SpeculationReport.of(session))


def decode_rate(times: Collection[list[float]]) -> float | None:
    """Tokens a second of all sequences while all decode, by when the tokens of each came.

    Counted in steps of the sequence that begins last, until the first one ends; None where it ends
    before.
    """
    last = max(times, key=lambda of: of[0])
    end = min(of[-1] for of in times)
    steps = sum(last[0] < time <= end for time in last)
    return len(times) * steps / (last[steps] - last[0]) if steps else None
