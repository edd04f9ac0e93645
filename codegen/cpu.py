"""The cpu target: a program's functions are graphs, and its driver interprets them.

Nothing is planned: a function runs at any values of its symbols. What depends on weights alone is
folded when they are loaded, and state is written in place where ops can. Ranks are threads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ..compiler.ambient import default_torch
from ..compiler.interpret import Interpreter
from ..compiler.ir import Graph, Node
from ..compiler.ops.collective import Communicator
from ..compiler.ops.leaf import constant
from ..compiler.ranks import RankThreads
from ..compiler.text import parse
from ..compiler.torch_types import dtype_name, torch_dtype, type_of
from ..compiler.types import TensorType
from ..runtime.driver import Array, DeviceFailedError, Ended, WeightLoader
from ..runtime.host_memory import check_host_memory
from ..runtime.program import STEP, Buffer, Function, Program
from .entries import buffer_of, signature

CPU = "cpu"
# A run that touches fewer bytes than this has one thread: waking the others costs more than they
# do, by far when other programs keep the cores busy.
_SHARED_BYTES = 256 << 20


def cpu_program(
    graph: Graph,
    symbols: Mapping[str, tuple[int, int]],
    outputs: Sequence[str],
    meta: Mapping[str, Any],
) -> Program:
    """A program whose one function, `step`, is `graph`, for symbols within their first and last.

    Its constants are weights alone, as `constants.folded_graph` leaves them. The arena is what its
    values take at most, though nobody allocates it as one.
    """
    state = {name: buffer_of(name, graph.param(name).type, {}, "state") for name in graph.state}
    weights: dict[str, Buffer] = {}
    for node in graph.nodes():
        if node.op is constant:
            name = _buffer_name(node)
            weights[name] = buffer_of(name, node.types[0], {}, "weight")
    largest = {name: last for name, (_, last) in symbols.items()}
    step = signature(graph, symbols, outputs, text=str(graph))
    peak = Interpreter(graph).peak_bytes(largest)
    return Program(CPU, {}, {**state, **weights}, {STEP: step}, peak, dict(meta))


def check_memory(programs: Sequence[Program], what: str, *, mapped: bool) -> None:
    """NotEnoughMemory where the state, scratch and weights of all ranks do not fit into this host.

    Weights that are `mapped` files do not count. `what` begins the error.
    """
    kinds = ("state",) if mapped else ("state", "weight")
    buffers = (b for program in programs for b in program.buffers.values() if b.kind in kinds)
    needed = sum(b.nbytes for b in buffers) + sum(p.arena_bytes for p in programs)
    check_host_memory(
        needed,
        f"{what}: state and scratch" if mapped else f"{what}: weights, state and scratch",
        "allow fewer or shorter sequences" if mapped else _MEND,
    )


_MEND = "allow fewer or shorter sequences, or compile into an ingot, whose weights are mapped"


def _buffer_name(node: Node) -> str:
    return f"@{node.attrs['name']}"


class CpuDriver:
    """Interprets programs of target cpu in this process."""

    target = CPU

    def load(self, program: Program, weights: WeightLoader) -> CpuExecutable:
        """See Driver.load."""
        return CpuExecutable([(program, weights)])

    def load_ranks(
        self, programs: Sequence[Program], weights: Sequence[WeightLoader]
    ) -> CpuExecutable:
        """One program a rank, each with its weights: ranks are threads that run together."""
        return CpuExecutable(list(zip(programs, weights, strict=True)))


class CpuExecutable:
    """The ranks of a program; inputs go to all of them, and outputs, which are equal, are those of
    the first. What is launched has ended when `launch` returns. See driver.Executable."""

    @default_torch()
    def __init__(self, ranks: Sequence[tuple[Program, WeightLoader]]) -> None:
        self._ranks = [_Rank(program, weights) for program, weights in ranks]
        self._threads = RankThreads(len(ranks)) if len(ranks) > 1 else None

    def launch(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> Ended:
        """See Executable.launch, and `run`."""
        return Ended(self.run(function, symbols, inputs, outputs))

    @default_torch()
    def run(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """See Executable.run. ValueError for unknown names and for inputs that do not fit."""
        if not self._ranks:
            raise DeviceFailedError("this executable was closed")
        threads = torch.get_num_threads()
        try:
            if self._threads is None:
                (rank,) = self._ranks
                return rank.run(function, symbols, inputs, outputs, threads)
            each = max(threads // len(self._ranks), 1)
            jobs = [
                partial(rank.run, function, symbols, inputs, outputs, each) for rank in self._ranks
            ]
            return self._threads.run(jobs)[0]
        finally:
            torch.set_num_threads(threads)

    def close(self) -> None:
        """Drop the memory."""
        self._ranks = []
        if self._threads is not None:
            self._threads.close()


class _Rank:
    """One program in memory: its graphs, weights and state."""

    def __init__(self, program: Program, weights: WeightLoader) -> None:
        if program.target != CPU:
            raise ValueError(f"this driver runs programs for cpu, not for {program.target}")
        self._functions = program.functions
        self._graphs = {n: Interpreter(parse(f.graph)) for n, f in program.functions.items()}
        self._state: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}
        # What the last run left for the next of the same function and symbols.
        self._left: tuple[Any, dict[str, torch.Tensor]] = None, {}
        for buffer in program.buffers.values():
            if buffer.kind == "state":
                dtype = torch_dtype(buffer.dtype)
                self._state[buffer.name] = torch.zeros(buffer.shape, dtype=dtype)
            else:
                self._weights[buffer.name] = _loaded(buffer, weights)

    def run(
        self,
        name: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None,
        threads: int,
        communicator: Communicator | None = None,
    ) -> dict[str, Array]:
        """As CpuExecutable.run, on at most `threads` threads."""
        if name not in self._functions:
            raise ValueError(f"no function {name!r}; there are {', '.join(self._functions)}")
        function, graph = self._functions[name], self._graphs[name]
        of, left = self._left
        self._left = None, {}
        given = left if of == (name, symbols) else {}
        given = given | {n: _to_device(value) for n, value in inputs.items()}
        _check_call(function, symbols, given, outputs)
        torch.set_num_threads(threads if graph.touched_bytes(symbols) >= _SHARED_BYTES else 1)
        with torch.inference_mode():
            results = graph.run(
                {**given, **{n: self._state[n] for n in function.state}},
                lambda node: self._weights[_buffer_name(node)],
                symbols,
                communicator,
                in_place=True,
            )
            # Copies: what becomes state may be part of other state, of an input or of a weight.
            kept = {
                n: x.clone(memory_format=torch.contiguous_format)
                for n, x in results.updates.items()
                if x is not self._state.get(n)
            }
            self._state |= {n: x for n, x in kept.items() if n in self._state}
            found = dict(zip(function.outputs, results.outputs, strict=True))
            outs = {n: _to_host(found[n]) for n in (found if outputs is None else outputs)}
        if function.fed:
            fed = {n: kept[n] for n in function.fed}
            others = {n: x.clone() if n in inputs else x for n, x in given.items()}
            self._left = (name, dict(symbols)), {**others, **fed}
        return outs


def _check_call(
    function: Function,
    symbols: Mapping[str, int],
    inputs: Mapping[str, torch.Tensor],
    outputs: Collection[str] | None,
) -> None:
    if symbols.keys() != function.symbols.keys() or any(
        not first <= symbols[name] <= last for name, (first, last) in function.symbols.items()
    ):
        raise ValueError(f"expected symbols {dict(function.symbols)}, found {dict(symbols)}")
    if inputs.keys() != function.inputs.keys():
        raise ValueError(f"expected inputs {sorted(function.inputs)}, found {sorted(inputs)}")
    for name, spec in function.inputs.items():
        x = inputs[name]
        if not spec.fits(dtype_name(x.dtype), x.shape, symbols):
            raise ValueError(f"input {name}: expected {spec}, found {type_of(x)}")
    if unknown := sorted(set(outputs or ()) - function.outputs.keys()):
        raise ValueError(f"expected outputs among {sorted(function.outputs)}, found {unknown}")


def _loaded(buffer: Buffer, weights: WeightLoader) -> torch.Tensor:
    tensor: torch.Tensor = weights(buffer.name)
    expected = TensorType(buffer.dtype, buffer.shape)
    if type_of(tensor) != expected:
        raise ValueError(f"weight {buffer.name}: expected {expected}, found {type_of(tensor)}")
    return tensor.contiguous()


def _to_device(value: Any) -> torch.Tensor:
    """`value` as a tensor; torch warns of memory that it may not write, though nobody does."""
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        value = value.copy()
    return torch.as_tensor(value)


def _to_host(value: Any) -> Array:
    value = torch.as_tensor(value)
    narrow = value.dtype in (torch.bfloat16, torch.float16)
    return value.float().numpy() if narrow else value.clone().numpy()


__all__ = ["CpuDriver", "CpuExecutable", "check_memory", "cpu_program"]
