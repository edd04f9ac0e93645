"""Measure the GEMM kernels that a model could use, over its own buffers, for tables of prices."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ...codegen.entries import Choice
from ...codegen.price_table import Launched, Point
from ...compiler.target import target_of
from ...runtime.devices.graph_executable import GpuDriver
from ...runtime.program import STEP, Entry, Program
from ...runtime.serving.abi import ServingMeta
from ..compilation import ALL, lower_language_model
from ..options import CompileOptions
from ..progress import Progress
from .parts import parts_of, with_own_integers, with_parts
from .random_weights import RandomWeights
from .workload import Workload, step_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REPLAYS = 20


def tune(
    source: str | Path | PreTrainedModel,
    options: CompileOptions,
    driver: GpuDriver,
    progress: Progress,
    known: Collection[Launched] = (),
) -> list[Point]:
    """A point for every kernel that could compute a product of a model, at every bucket of tokens,
    but for those that are `known`.

    Of a directory the config.json is read. The model is planned once for each kernel, which is
    taken wherever it can be, and its launches are timed in chains over random weights.
    """
    found: dict[Launched, Point] = {}
    kernels: dict[str, None] = {"": None}
    done: set[str] = set()
    while waiting := [kernel for kernel in kernels if kernel not in done]:
        done.add(waiting[0])
        planned = lower_language_model(
            source,
            options,
            target_of(driver.target),
            progress,
            plan_only=True,
            entry=ALL,
            prefer=waiting[0],
        )
        (lowered,) = planned.ranks
        kernels |= {k: None for choice in lowered.choices for k in choice.offered}
        for point in _timed(lowered.program, lowered.choices, driver, {*found, *known}):
            found[point.of] = point
    return sorted(found.values())


def _timed(
    program: Program, choices: Sequence[Choice], driver: GpuDriver, known: Container[Launched]
) -> Iterator[Point]:
    """The launches of a program that are priced, without those that are `known`."""
    # Loading replays every part, also of what chooses by indices that another launch writes.
    program = with_own_integers(program)
    step, meta = program.functions[STEP], ServingMeta.of(program.meta)
    by_entry = {name: [*of] for name, of in groupby(choices, key=lambda choice: choice.entry)}
    executable = driver.load(with_parts(program, step.entries, None), RandomWeights(program))
    try:
        for entry in step.entries:
            priced = _priced(entry, by_entry[entry.name])
            # No price is of attention: one sequence, and what it has no positions for is padding.
            work = Workload(1, min(entry.symbols["T"], meta.max_tokens_per_sequence), 0)
            inputs = step_inputs(step, meta, entry.symbols, work)
            for part in parts_of(program, entry):
                of = priced[part.launches[0]]
                if of is None or of in known:
                    continue
                executable.run(part.function, entry.symbols, inputs, ())
                times = executable.measure(part.function, entry.symbols, inputs, _REPLAYS)
                yield Point(*of, 1e3 * median(times) / part.chained)
    finally:
        executable.close()


def _priced(entry: Entry, choices: list[Choice]) -> list[Launched | None]:
    """Under what each launch of `entry` is priced."""
    found = [priced for choice in choices for priced in choice.priced]
    assert len(found) == len(entry.launches), entry.name
    return found
