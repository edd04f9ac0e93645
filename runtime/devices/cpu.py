"""The cpu driver: an arena in host memory, and kernels that are Python callables over it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...compiler.dtypes import DTYPES
from ..driver import Array, WeightLoader
from ..program import Buffer, Entry, Program, Slice

# An entry that touches fewer bytes than this runs on one thread: waking the others costs more than
# they do, by far when other programs keep the cores busy.
_SHARED_BYTES = 256 << 20


@dataclass(frozen=True)
class _Plan:
    """One entry with every argument bound to memory."""

    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    threads: int
    calls: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...]


class CpuExecutable:
    """A program whose entries run one launch after another."""

    def __init__(self, program: Program, weights: WeightLoader) -> None:
        self._program = program
        self._arena = torch.zeros(program.arena_bytes, dtype=torch.uint8)
        self._memory: dict[str, torch.Tensor] = {}
        for buffer in program.buffers.values():
            self._memory[buffer.name] = _own_memory(buffer, weights)
        self._plans = {
            (name, entry.name): self._bind(entry)
            for name, function in program.functions.items()
            for entry in function.entries
        }

    def run(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Array],
        outputs: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """See Executable.run. ValueError for unknown names and for inputs that do not fit."""
        plan = self._plans[function, self._program.functions[function].entry(symbols).name]
        if inputs.keys() != plan.inputs.keys():
            raise ValueError(f"expected inputs {sorted(plan.inputs)}, found {sorted(inputs)}")
        wanted = plan.outputs.keys() if outputs is None else outputs
        if unknown := sorted(set(wanted) - plan.outputs.keys()):
            raise ValueError(f"expected outputs among {sorted(plan.outputs)}, found {unknown}")
        for name, target in plan.inputs.items():
            source = _to_device(inputs[name])
            if source.shape != target.shape or source.dtype != target.dtype:
                raise ValueError(
                    f"input {name}: expected {target.dtype}{list(target.shape)}, "
                    f"found {source.dtype}{list(source.shape)}"
                )
            target.copy_(source)
        threads = torch.get_num_threads()
        torch.set_num_threads(min(plan.threads, threads))
        try:
            with torch.inference_mode():
                for run, args in plan.calls:
                    run(*args)
        finally:
            torch.set_num_threads(threads)
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
        slices = [a for launch in entry.launches for a in launch.args if isinstance(a, Slice)]
        touched = sum(bound(s).nbytes for s in slices if not self._is_state(s))
        threads = torch.get_num_threads() if touched >= _SHARED_BYTES else 1
        return _Plan(inputs, outputs, threads, tuple(calls))

    def _is_state(self, part: Slice) -> bool:
        """Whether a slice is of state, of which an entry touches a few rows."""
        buffer = self._program.buffers.get(part.buffer)
        return buffer is not None and buffer.kind == "state"

    def _in_arena(self, buffer: Buffer) -> torch.Tensor:
        assert buffer.offset is not None
        raw = self._arena[buffer.offset : buffer.offset + buffer.nbytes]
        return raw.view(_torch_dtype(buffer)).view(buffer.shape)


class CpuDriver:
    """Runs programs of target cpu in this process."""

    target = "cpu"

    def load(self, program: Program, weights: WeightLoader) -> CpuExecutable:
        """See Driver.load."""
        if program.target != self.target:
            raise ValueError(f"this driver runs programs for cpu, not for {program.target}")
        return CpuExecutable(program, weights)


def _torch_dtype(buffer: Buffer) -> torch.dtype:
    return getattr(torch, DTYPES[buffer.dtype].torch)


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
