"""GPU programs run on the CPU: every launch through Triton's interpreter, in an arena of its own.

The whole of a GPU plan but the device is exercised: selection, arguments, slices, places in the
arena, order. Memory that nothing has written yet is poison (NaN in every float type).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import amd_asm
import gluon_numpy
import numpy as np
import torch
import triton.language as tl
from ingot.codegen.kernel_backend import KernelBackend
from ingot.codegen.kernel_query import Call, Ref, dense_strides
from ingot.codegen.kernel_source import PROGRAMMATIC, KernelSource, is_aggregate, map_leaves
from ingot.compiler.torch_types import torch_dtype
from ingot.runtime.driver import Ended
from ingot.runtime.program import Buffer, Entry, Kernel, Program, Slice
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

# 0xFF everywhere is NaN in every float type, -1 in every signed one.
POISON = 0xFF


class InterpretedBackend(KernelBackend):
    """Kernels that are their own sources, called by the interpreter."""

    def kernels(self) -> Mapping[str, Kernel]:
        return {
            id_: Kernel(
                id_,
                source.function.__name__,
                _runner(source),
                args=tuple(a for _, a in source.parameters),
            )
            for id_, source in self.sources.items()
        }


def _runner(source: KernelSource) -> Callable[..., None]:
    if source.function.is_gluon():
        return lambda grid, args: gluon_numpy.run(
            source.function, grid, _without_pdl(source.function, source.bound(args))
        )
    function = interpreter.InterpretedFunction(source.function.fn)

    def run(grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        with _interpreting():
            function[grid](**_given(source.function, source.bound(args)))

    return run


@contextmanager
def programs_in_any_order(seed: int) -> Iterator[None]:
    """Programs of each launch of triton.jit run in an order that `seed` draws."""
    builder = interpreter.interpreter_builder
    plain = builder.set_grid_idx

    def drawn(x: int, y: int, z: int) -> None:
        grid = builder.grid_dim
        order = np.random.default_rng(seed).permutation(math.prod(grid))
        place = np.unravel_index(order[np.ravel_multi_index((x, y, z), grid)], grid)
        plain(*map(int, place))

    with patch.object(builder, "set_grid_idx", drawn):
        yield


def run_call(call: Call, memory: Mapping[Ref, torch.Tensor]) -> None:
    """One launch of a template, run over `memory`."""
    function = interpreter.InterpretedFunction(call.function.fn)

    def value(leaf: Any) -> Any:
        return memory[leaf] if isinstance(leaf, Ref) else getattr(leaf, "value", leaf)

    given = {n: map_leaves(a, value) for n, a in call.arguments().items()}
    with _interpreting():
        function[call.grid](**_given(call.function, given))


def _without_pdl(function: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """`args` for launches that do not overlap, whatever the target's do."""
    alone = {PROGRAMMATIC: False} if PROGRAMMATIC in function.arg_names else {}
    return {**args, **alone}


def _given(function: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """As the interpreter takes them: of aggregates it would make tensors of the constants, too."""

    def field(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return interpreter._implicit_cvt(value)
        return whole(value)

    def whole(value: Any) -> Any:
        if not is_aggregate(value):
            return value
        return SimpleNamespace(**{n: field(v) for n, v in value._asdict().items()})

    return {n: whole(a) for n, a in _without_pdl(function, args).items()}


# What sees all of the language, as kernels and its own functions (tl.sum, say) together do.
_LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


@contextmanager
def _interpreting() -> Iterator[None]:
    """Kernels call kernels, products take bf16, f32 is rounded to it, not cut, and there is inline
    assembly (AMD's): none of which the interpreter does by itself."""
    builder = interpreter.InterpreterBuilder

    def call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        # The language is patched already: once more for every call would be slower every time.
        return _rewritten(self.fn)(*args, **kwargs)

    plain_dot = builder.create_dot

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = _wide(a), _wide(b)
        if d.dtype.scalar != tl.float32:
            return plain_dot(self, a, b, d, *rest)
        # Summed in f64: BLAS has an order of its own for each shape of operands, and each way they
        # lie.
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, tl.float32)

    plain_cast = builder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            narrow = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16)
            return interpreter.TensorHandle(narrow.numpy(), tl.bfloat16)
        return plain_cast(self, source, target)

    def inline_asm(
        self: Any, asm: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int
    ) -> Any:
        assert is_pure == bool(values) and pack == 1, (is_pure, pack)
        found = amd_asm.run(asm, constraints, [v.data for v in values])
        handles = [
            interpreter.TensorHandle(data, type_.scalar)
            for data, type_ in zip(found, types, strict=True)
        ]
        return SimpleNamespace(get_result=handles.__getitem__)

    scope = interpreter._patch_lang(_LANGUAGE)
    with (
        patch.object(interpreter, "_get_np_dtype", _numpy_dtype),
        patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", _no_check),
        patch.object(builder, "cast_impl", cast),
        patch.object(JITFunction, "__call__", call),
        patch.object(builder, "create_dot", dot),
        patch.object(builder, "create_inline_asm", inline_asm),
        np.errstate(all="ignore"),
    ):
        try:
            yield
        finally:
            scope.restore()


@cache
def _rewritten(function: Callable[..., Any]) -> Callable[..., Any]:
    return interpreter.InterpretedFunction(function).rewrite()


_of_scalar = cache(interpreter._get_np_dtype)


def _numpy_dtype(dtype: Any) -> np.dtype:
    """As Triton's own, which fills a table at each call."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _of_scalar(scalar)


def _no_check(*_: Any) -> None:
    """In the place of Triton's check that integers do not overflow: a third of a kernel's time, for
    an assertion that the interpreter, which is not in debug mode, does not make."""


def _wide(handle: Any) -> Any:
    """A bf16 operand in f32, which holds it exactly."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


class InterpretedExecutable:
    """A GPU program in host memory; see runtime.driver.Executable."""

    def __init__(self, program: Program, weights: Callable[[str], Any]) -> None:
        self.program = program
        self.arena = torch.full((max(program.arena_bytes, 1),), POISON, dtype=torch.uint8)
        self.memory: dict[str, torch.Tensor] = {}
        self.left: Any = None  # what the last run was of
        for buffer in program.buffers.values():
            raw = torch.zeros(buffer.nbytes, dtype=torch.uint8)
            if buffer.kind == "weight":
                tensor = weights(buffer.name)
                assert tuple(tensor.shape) == buffer.shape, buffer
                assert tensor.dtype == torch_dtype(buffer.dtype), buffer
                raw = tensor.contiguous().clone().view(-1).view(torch.uint8)
            self.memory[buffer.name] = raw

    def launch(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Any],
        outputs: Collection[str] | None = None,
    ) -> Ended:
        """See Executable.launch: it has ended when this returns."""
        return Ended(self.run(function, symbols, inputs, outputs))

    def run(
        self,
        function: str,
        symbols: Mapping[str, int],
        inputs: Mapping[str, Any],
        outputs: Collection[str] | None = None,
    ) -> dict[str, Any]:
        found = self.program.functions[function].entry(symbols)
        local = {b.name: b for b in found.buffers}
        known = {b.name: b for b in found.buffers if b.kind == "input"}
        left = {}
        if inputs.keys() != known.keys():
            assert self.left == (function, dict(symbols)) and inputs.keys() < known.keys()
            left = {
                b.name: self._view(Slice(b.name, b.dtype, b.shape), local).clone()
                for b in known.values()
            }
        self.left = function, dict(symbols)
        self.arena.fill_(POISON)
        inputs = {**left, **inputs}
        for name, value in inputs.items():
            b = local[name]
            self._view(Slice(name, b.dtype, b.shape), local).copy_(torch.as_tensor(value))
        for launch in found.launches:
            kernel = self.program.kernels[launch.kernel]
            args = tuple(self._view(a, local) if isinstance(a, Slice) else a for a in launch.args)
            for argument, given, slice_ in zip(kernel.args, args, launch.args, strict=True):
                _check(argument, given, slice_)
            kernel.binary(launch.grid, args)
        for buffer in self.program.buffers.values():
            # What the next replay begins with.
            assert buffer.kind != "counter" or not self.memory[buffer.name].any(), buffer
        return {
            n: _to_host(self._view(Slice(n, b.dtype, b.shape), local))
            for n, b in local.items()
            if b.kind == "output" and (outputs is None or n in outputs)
        }

    def close(self) -> None:
        self.memory = {}

    def _view(self, part: Slice, local: Mapping[str, Buffer]) -> torch.Tensor:
        buffer = local.get(part.buffer)
        if buffer is None:
            raw = self.memory[part.buffer]
        else:
            assert buffer.offset is not None
            raw = self.arena[buffer.offset : buffer.offset + buffer.nbytes]
        strides = part.strides or dense_strides(part.shape)
        typed = raw[part.offset :].view(torch_dtype(part.dtype))
        extent = 1 + sum((n - 1) * s for n, s in zip(part.shape, strides, strict=True))
        assert not math.prod(part.shape) or extent <= typed.numel(), part
        return typed.as_strided(part.shape, strides)


def _check(argument: Any, given: Any, slice_: Any) -> None:
    if argument.kind.startswith("*"):
        assert argument.kind == f"*{slice_.dtype}", (argument, slice_)
        assert slice_.offset % argument.multiple == 0, (argument, slice_)
    else:
        assert isinstance(given, float if argument.kind == "f32" else int), (argument, given)


def _to_host(value: torch.Tensor) -> Any:
    narrow = value.dtype in (torch.bfloat16, torch.float16)
    return value.float().numpy() if narrow else value.clone().numpy()


class InterpretedDriver:
    """Runs programs of any GPU target in this process."""

    def __init__(self, target: str) -> None:
        self.target = target

    def load(self, program: Program, weights: Callable[[str], Any]) -> InterpretedExecutable:
        assert program.target == self.target
        return InterpretedExecutable(program, weights)


def entry_named(program: Program, name: str) -> Entry:
    return next(entry for entry in program.entries if entry.name == name)
