"""The memory planner's oracle: programs of the cpu target that are planned as a GPU's are.

Every node is its reference, a Python function over tensor views of the arena, outputs last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ingot.codegen.entries import Bound, Choice, EntryBuilder
from ingot.codegen.lower import Lowered, lower
from ingot.compiler.ir import Graph, Node, Value, show_attr
from ingot.compiler.ops.shape import view
from ingot.compiler.target import CPU
from ingot.compiler.torch_types import torch_dtype
from ingot.compiler.types import TensorType
from ingot.compiler.weights import Weights
from ingot.runtime.driver import Array, Ended, WeightLoader
from ingot.runtime.program import Buffer, Entry, Kernel, Launch, Program, Slice
from msgspec.structs import replace


class ReferenceBackend:
    """Launches of references: one a node."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []
        self._kernels: dict[str, Kernel] = {}

    def kernels(self) -> Mapping[str, Kernel]:
        """See Backend.kernels."""
        return self._kernels

    def packed(self, node: Node, position: int) -> tuple[Value, Value] | None:
        """References compute with numbers: no packed weight is read as it is."""
        return None

    def view(self, bound: Bound) -> Slice | None:
        """See Backend.view."""
        source = bound.args[0] if bound.node.op is view else None
        shape: Any = bound.types[0].shape
        return replace(source, shape=shape) if isinstance(source, Slice) else None

    def emit(self, bound: Bound, builder: EntryBuilder, results: tuple[Any, ...]) -> None:
        """See Backend.emit."""
        node, args = bound.node, bound.args
        types: list[Any] = [a.type.bind(builder.binding) for a in node.args]
        id_ = kernel_id(node, types, bound.attrs, bound.in_place)
        if id_ not in self._kernels:
            run = reference_kernel(node, bound.attrs, bound.in_place)
            self._kernels[id_] = Kernel(id_, node.op.name, run)
        given: tuple[Any, ...] = args if bound.in_place else (*args, *results)
        label = f"{node.op.name} {node.source}".strip()
        reads = [a for a in args if isinstance(a, Slice)]
        builder.launch(Launch(id_, given, label=label), reads, results)

    def copy(self, source: Slice, target: Slice, builder: EntryBuilder) -> None:
        """See Backend.copy."""
        kernel = self._kernels.setdefault("copy", Kernel("copy", "copy", as_code(_copy)))
        launch = Launch(kernel.id, (source, target), label=f"copy {target.buffer}")
        builder.launch(launch, [source], [target])


def kernel_id(
    node: Node, types: Sequence[TensorType], attrs: Mapping[str, Any], in_place: bool
) -> str:
    """The content hash of what a node computes and where to: equal kernels are one kernel."""
    shown = ", ".join(f"{k}={show_attr(v)}" for k, v in sorted(attrs.items()))
    required, optional = node.taken([str(t) for t in types])
    operands = ", ".join([*required, *(f"{name}={type_}" for name, type_ in optional.items())])
    text = f"{node.op.name}({operands}; {shown}) in place: {in_place}"
    return hashlib.sha256(text.encode()).hexdigest()


def reference_kernel(node: Node, attrs: Mapping[str, Any], in_place: bool) -> Any:
    """A callable over tensor views, outputs last, that computes a node by its reference."""
    op, count = node.op, len(node.args)

    def run(*args: Any) -> None:
        required, optional = node.taken(args[:count])
        results = op.reference(*required, **optional, **attrs)
        for out, result in zip(args[count:], results, strict=True):
            out.copy_(result)

    def run_in_place(*args: Any) -> None:
        assert op.inplace
        op.inplace(*args, **attrs)

    return run_in_place if in_place else run


def as_code(function: Any) -> Any:
    """A Python function in the place of device code."""
    return function


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


@dataclass(frozen=True)
class _Plan:
    """One entry with every argument bound to memory."""

    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    calls: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...]


class PlannedExecutable:
    """A program whose entries run one launch after another."""

    def __init__(self, program: Program, weights: WeightLoader) -> None:
        self._program = program
        self._arena = torch.zeros(program.arena_bytes, dtype=torch.uint8)
        self._memory: dict[str, torch.Tensor] = {}
        for buffer in program.buffers.values():
            self._memory[buffer.name] = _own_memory(buffer, weights)
        self._left: _Plan | None = None  # whose inputs are those of the next run
        self._plans = {
            (name, entry.name): self._bind(entry)
            for name, function in program.functions.items()
            for entry in function.entries
        }

    def launch(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> Ended:
        """See Executable.launch: it has ended when this returns."""
        return Ended(self.run(function, symbols, inputs, outputs))

    def run(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """See Executable.run. ValueError for unknown names and for inputs that do not fit."""
        plan = self._plans[function, self._program.functions[function].entry(symbols).name]
        fed, self._left = self._left is plan, None
        if inputs.keys() != plan.inputs.keys() and not (fed and inputs.keys() < plan.inputs.keys()):
            raise ValueError(f"expected inputs {sorted(plan.inputs)}, found {sorted(inputs)}")
        wanted = plan.outputs.keys() if outputs is None else outputs
        if unknown := sorted(set(wanted) - plan.outputs.keys()):
            raise ValueError(f"expected outputs among {sorted(plan.outputs)}, found {unknown}")
        for name, value in inputs.items():
            source, target = _to_device(value), plan.inputs[name]
            if source.shape != target.shape or source.dtype != target.dtype:
                raise ValueError(
                    f"input {name}: expected {target.dtype}{list(target.shape)}, "
                    f"found {source.dtype}{list(source.shape)}"
                )
            target.copy_(source)
        with torch.inference_mode():
            for run, args in plan.calls:
                run(*args)
        if self._program.functions[function].fed:
            self._left = plan
        return {name: _to_host(plan.outputs[name]) for name in wanted}

    def close(self) -> None:
        """Drop the memory."""
        self._plans, self._memory = {}, {}
        self._arena = torch.zeros(0, dtype=torch.uint8)

    def _bind(self, entry: Entry) -> _Plan:
        local = {b.name: self._in_arena(b) for b in entry.buffers}

        def bound(arg: Any) -> Any:
            if not isinstance(arg, Slice):
                return arg
            memory = local.get(arg.buffer, self._memory.get(arg.buffer))
            assert memory is not None, arg.buffer
            return memory.view(arg.shape)

        calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        for launch in entry.launches:
            run = self._program.kernels[launch.kernel].binary
            assert callable(run)
            calls.append((run, tuple(map(bound, launch.args))))
        named = {b.name: b.kind for b in entry.buffers}
        inputs = {n: local[n] for n, kind in named.items() if kind == "input"}
        outputs = {n: local[n] for n, kind in named.items() if kind == "output"}
        return _Plan(inputs, outputs, tuple(calls))

    def _in_arena(self, buffer: Buffer) -> torch.Tensor:
        assert buffer.offset is not None
        raw = self._arena[buffer.offset : buffer.offset + buffer.nbytes]
        return raw.view(_torch_dtype(buffer)).view(buffer.shape)


def planned(
    graph: Graph,
    weights: Weights,
    bindings: Sequence[Mapping[str, int]],
    outputs: Sequence[str],
) -> Lowered:
    """`graph` planned for references."""
    return lower(graph, weights, CPU, bindings, outputs, backend=ReferenceBackend())


class PlannedDriver:
    """Runs programs whose kernels are Python, over an arena as the planner made it."""

    target = "cpu"

    def load(self, program: Program, weights: WeightLoader) -> PlannedExecutable:
        """See Driver.load."""
        if program.target != self.target:
            raise ValueError(f"this driver runs programs for cpu, not for {program.target}")
        return PlannedExecutable(program, weights)


def _torch_dtype(buffer: Buffer) -> torch.dtype:
    return torch_dtype(buffer.dtype)


def _own_memory(buffer: Buffer, weights: WeightLoader) -> torch.Tensor:
    if buffer.kind == "state":
        return torch.zeros(buffer.shape, dtype=_torch_dtype(buffer))
    tensor: torch.Tensor = weights(buffer.name)
    if tensor.dtype != _torch_dtype(buffer) or tuple(tensor.shape) != buffer.shape:
        raise ValueError(
            f"weight {buffer.name}: expected {buffer.dtype}{list(buffer.shape)}, "
            f"found {tensor.dtype}{list(tensor.shape)}"
        )
    return tensor.contiguous()


def _to_device(value: Any) -> torch.Tensor:
    """`value` as a tensor; torch warns of memory that it may not write, though nobody does."""
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        value = value.copy()
    return torch.as_tensor(value)


def _to_host(value: torch.Tensor) -> Array:
    narrow = value.dtype in (torch.bfloat16, torch.float16)
    return value.float().numpy() if narrow else value.clone().numpy()
