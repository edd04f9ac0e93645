"""From the final graph to a program: every symbol bound, every buffer placed, every launch listed.

The cpu target runs the graph itself. For a GPU one entry is made for each bucket of the symbols.
Values are dense buffers; views are the same bytes under another type; an op with an in-place form
writes into memory that is donated to it; what depends on weights alone is folded when the program
is loaded, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..compiler.ir import Graph
from ..compiler.target import Target
from ..compiler.weights import Weights
from ..runtime.program import STEP, Buffer, Entry, Program
from .constants import ConstantMaker, Observer, folded, folded_graph
from .cpu import cpu_program
from .entries import COUNTERS, Backend, Choice, EntryBuilder, buffer_of, signature


class UnsupportedTarget(Exception):
    """The target cannot do what is asked of it in this version."""


@dataclass(frozen=True)
class Lowered:
    """A program, the function that makes the content of each weight buffer, and what was chosen."""

    program: Program
    load_weight: Callable[[str], torch.Tensor]
    choices: Sequence[Choice] = ()


def lower(
    graph: Graph,
    weights: Weights,
    target: Target,
    bindings: Sequence[Mapping[str, int]],
    outputs: Sequence[str],
    meta: Mapping[str, Any] | None = None,
    observe: Observer | None = None,
    backend: Backend | None = None,
) -> Lowered:
    """A program whose one function, `step`, is `graph`: an entry for each of `bindings`.

    `outputs` names its outputs. `observe` sees every op on weights when it is computed, which is
    when a weight is loaded. Parameters that `graph.state` names are state; the others are inputs,
    of which a run leaves those in `graph.fed` for the next. A GPU needs its `backend`
    (kernel_backend: it needs triton, which the cpu target does without): NoKernelError where no
    template computes a node, BuildError. On the cpu there are no entries: the function runs at any
    values of its symbols up to the largest of `bindings`.
    """
    symbols = {
        name: (min(b[name] for b in bindings), max(b[name] for b in bindings))
        for name in dict.fromkeys(name for binding in bindings for name in binding)
    }
    for name, ends in symbols.items():
        if outside := [size for size in ends if size not in graph.symbols[name]]:
            raise ValueError(f"{name}={outside[0]} is outside the ranges of {graph.symbols}")
    if backend is None:
        if target.is_gpu:
            raise ValueError(f"{target.name}: expected a KernelBackend, found none")
        symbols = {name: (graph.symbols[name].start, last) for name, (_, last) in symbols.items()}
        program = cpu_program(folded_graph(graph), symbols, outputs, meta or {})
        names = folded(graph)
        return Lowered(program, ConstantMaker(names, weights, observe))
    names = folded(graph, backend.packed)
    state = {name: buffer_of(name, graph.param(name).type, {}, "state") for name in graph.state}
    constants = {name: buffer_of(name, v.type, {}, "weight") for v, name in names.items()}
    entries: list[Entry] = []
    arena = counter_bytes = 0
    for binding in bindings:
        builder = EntryBuilder(graph, names, outputs, dict(binding), backend)
        entry, size = builder.build()
        entries.append(entry)
        arena = max(arena, size)
        counter_bytes = max(counter_bytes, builder.counter_bytes)
    step = signature(graph, symbols, outputs, entries)
    buffers = {**state, **constants}
    if counter_bytes:
        buffers[COUNTERS] = Buffer(COUNTERS, "i32", (counter_bytes // 4,), "counter", counter_bytes)
    program = Program(
        target.name, backend.kernels(), buffers, {STEP: step}, arena, dict(meta or {})
    )
    return Lowered(program, ConstantMaker(names, weights, observe), backend.choices)


def serving_bindings(
    max_sequences: int, max_tokens: int, largest: int = 2048, *, rows: int | None = None
) -> list[dict[str, int]]:
    """Buckets of T tokens and L result rows: powers of two up to `largest` or `max_tokens`.

    The largest bucket takes a whole chunk of prefill. `rows` bounds L; None is a row a sequence.
    Verification of drafts takes one more row for each token that is drafted.
    """
    rows = max_sequences if rows is None else rows
    top = max(min(largest, max_tokens), max_sequences)
    sizes = [1]
    while sizes[-1] < top:
        sizes.append(min(sizes[-1] * 2, top))
    return [{"T": t, "L": min(t, rows)} for t in sizes]
