"""Gluon kernels run on the CPU: their Python, with numpy arrays in place of tensors.

What a Gluon kernel computes does not depend on layouts: they say which lane holds what. So loads,
reshapes and products are taken at their word here, and layouts are ignored; that conversions are
trivial is checked when the kernel is built. Inline assembly is given by its meaning.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Mapping
from typing import Any

import amd_asm
import numpy as np
import ptx_asm
import torch
from ingot.codegen.kernel_source import map_leaves
from triton.runtime.jit import JITFunction


class Array:
    """A tensor: values, and the name of its dtype. bf16 values are f32 that bf16 can hold."""

    def __init__(self, values: Any, dtype: str) -> None:
        self.values, self.dtype = np.asarray(values), dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def _other(self, other: Any) -> Any:
        return other.values if isinstance(other, Array) else other

    def _with(self, values: Any, other: Any = None) -> Array:
        if values.dtype == bool:
            return Array(values, "i1")
        kinds = {self.dtype, getattr(other, "dtype", self.dtype)}
        order = ("f32", "bf16", "i64", "i32", "i16", "i1")
        dtype = next((k for k in order if k in kinds), self.dtype)
        return Array(_rounded(values, dtype), dtype)

    def reshape(self, shape: list[int]) -> Array:
        return Array(self.values.reshape(shape), self.dtype)

    def permute(self, *dims: int) -> Array:
        return Array(self.values.transpose(dims), self.dtype)

    def to(self, dtype: Any, bitcast: bool = False) -> Array:
        name = _name(dtype)
        if bitcast:
            return Array(_recast(self.values, self.dtype, name), name)
        return Array(_rounded(self.values, name), name)

    def __neg__(self) -> Array:
        return self._with(-self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __index__(self) -> int:
        return int(self.values)


def _binary(name: str, function: Any, swapped: bool = False) -> None:
    def method(self: Array, other: Any) -> Array:
        a, b = self.values, self._other(other)
        return self._with(function(b, a) if swapped else function(a, b), other)

    setattr(Array, name, method)


for _name_, _function in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.divide,
    "floordiv": np.floor_divide,
    "mod": np.mod,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "eq": np.equal,
    "lt": np.less,
    "gt": np.greater,
    "ge": np.greater_equal,
    "le": np.less_equal,
}.items():
    _binary(f"__{_name_}__", _function)
    if _name_ not in ("lt", "gt", "ge", "le", "eq"):
        _binary(f"__r{_name_}__", _function, swapped=True)


class Pointer:
    """Places in a flat tensor."""

    def __init__(self, memory: torch.Tensor, machine: ptx_asm.Machine, offset: Any = 0) -> None:
        self.memory, self.machine, self.offset = memory, machine, offset
        element = types.SimpleNamespace(element_ty=_DTYPES[memory.dtype])
        self.dtype = element

    def __add__(self, offset: Any) -> Pointer:
        step = offset.values if isinstance(offset, Array) else offset
        return Pointer(self.memory, self.machine, self.offset + step)

    def to(self, dtype: str) -> Any:
        """The same memory as words, or its address."""
        if dtype == "i64":
            return Array(self.machine.address(self.memory, self.offset), "i64")
        assert dtype == "i32" and np.all(self.offset == 0), (dtype, self.offset)
        return Pointer(self.memory.view(torch.int32), self.machine)


_DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_NUMPY = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.float32,
    "i16": np.int16,
    "i32": np.int32,
    "i64": np.int64,
    "u8": np.uint8,
}


def _name(dtype: Any) -> str:
    return dtype if isinstance(dtype, str) else {"fp32": "f32", "int32": "i32"}[str(dtype)]


def _recast(values: Any, source: str, target: str) -> Any:
    match source, target:
        case "i32", "f32":
            return values.view(np.float32)
        case "f32", "i32":
            return values.view(np.int32)
        case "bf16", "i16":
            return (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype(np.int16)
        case "i16", "bf16":
            return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    raise AssertionError(f"bits of {source} as {target}")


def _rounded(values: Any, dtype: str) -> Any:
    if dtype == "i1":
        return np.asarray(values, bool)
    values = np.asarray(values).astype(_NUMPY[dtype])
    if dtype == "bf16":
        values = torch.from_numpy(np.array(values)).bfloat16().float().numpy()
    return values


class _Shared:
    """Shared memory, which kernels use by its addresses."""

    def index(self, line: int) -> _Shared:
        return self

    def store(self, value: Array) -> None:
        pass

    def _keep_alive(self) -> None:
        pass


class _Language:
    """What kernels call of gl and tl."""

    float32, float16, bfloat16 = "f32", "f16", "bf16"
    int16, int32, int64 = "i16", "i32", "i64"
    constexpr = object

    def __init__(self, machine: ptx_asm.Machine) -> None:
        self.place = (0, 0, 0)
        self.machine = machine

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)

    def program_id(self, axis: int) -> Array:
        return Array(np.int32(self.place[axis]), "i32")

    def arange(self, start: int, stop: int, layout: Any = None) -> Array:
        return Array(np.arange(start, stop, dtype=np.int32), "i32")

    def zeros(self, shape: list[int], dtype: str, layout: Any = None) -> Array:
        return Array(np.zeros(shape, np.float32), dtype)

    def pointer_type(self, element: str) -> str:
        return element

    def load(
        self, at: Pointer, mask: Array | None = None, other: float = 0, volatile: bool = False
    ) -> Array:
        live = np.True_ if mask is None else mask.values
        places, live = np.broadcast_arrays(at.offset, live)
        assert np.all((places >= 0) & (places < len(at.memory)) | ~live), "outside the tensor"
        flat = at.memory.float().numpy() if at.memory.is_floating_point() else at.memory.numpy()
        found = np.where(live, flat[np.where(live, places, 0)], other)
        dtype = _DTYPES[at.memory.dtype]
        return Array(_rounded(found, dtype), dtype)

    def store(self, at: Pointer, value: Array, mask: Array) -> None:
        places, live, values = np.broadcast_arrays(at.offset, mask.values, value.values)
        found = torch.from_numpy(np.array(values[live])).to(at.memory.dtype)
        at.memory[torch.from_numpy(np.array(places[live])).long()] = found

    def expand_dims(self, x: Array, axis: int) -> Array:
        return Array(np.expand_dims(x.values, axis), x.dtype)

    def broadcast(self, x: Array, y: Array) -> tuple[Array, Array]:
        a, b = np.broadcast_arrays(x.values, y.values)
        return Array(a, x.dtype), Array(b, y.dtype)

    def convert_layout(self, x: Array, layout: Any, assert_trivial: bool = False) -> Array:
        return x

    def split(self, x: Array) -> tuple[Array, Array]:
        return Array(x.values[..., 0], x.dtype), Array(x.values[..., 1], x.dtype)

    def join(self, a: Array, b: Array) -> Array:
        return Array(np.stack((a.values, b.values), -1), a.dtype)

    def sum(self, x: Array, axis: int) -> Array:
        return Array(x.values.sum(axis), x.dtype)

    def maximum(self, x: Array, least: Any) -> Array:
        return Array(np.fmax(x.values, getattr(least, "values", least)), x.dtype)

    def exp2(self, x: Array) -> Array:
        return Array(np.exp2(x.values), "f32")

    def atomic_add(self, at: Pointer, value: Array, mask: Array, sem: str, scope: str) -> Array:
        """What was there before; one thread alone adds."""
        (threads,) = np.nonzero(mask.values)
        assert len(threads) == 1 and (sem, scope) == ("acq_rel", "gpu")
        place = int(np.broadcast_to(at.offset, mask.values.shape)[threads[0]])
        before = np.zeros(mask.values.shape, np.int32)
        before[threads] = int(at.memory[place])
        at.memory[place] += int(value.values[threads[0]])
        return Array(before, "i32")

    def minimum(self, x: Any, most: Any) -> Any:
        if isinstance(x, Array):
            return Array(np.minimum(x.values, getattr(most, "values", most)), x.dtype)
        return min(x, most)

    def where(self, condition: Array, a: Any, b: Any) -> Array:
        values = np.where(condition.values, *(getattr(v, "values", v) for v in (a, b)))
        dtype = next((v.dtype for v in (a, b) if isinstance(v, Array)), "f32")
        return Array(_rounded(values, dtype), dtype)

    def inline_asm_elementwise(
        self, asm: str, constraints: str, args: Any, dtype: Any, is_pure: bool, pack: int
    ) -> Any:
        assert pack == 1
        values = [a.values for a in args]
        if "v" in constraints:
            assert is_pure
            found = amd_asm.run(asm, constraints, values)
            return tuple(Array(v, d) for v, d in zip(found, dtype, strict=True))
        found = ptx_asm.run(self.machine, asm, constraints, values)
        if isinstance(dtype, str):
            return Array(found[0].view(_NUMPY[dtype]), dtype)
        return tuple(Array(v.view(_NUMPY[d]), d) for v, d in zip(found, dtype, strict=True))

    def allocate_shared_memory(self, dtype: str, shape: list[int], layout: Any) -> _Shared:
        assert dtype == "i32"
        self.machine.allocate(4 * math.prod(shape))
        return _Shared()

    def rsqrt(self, x: Array) -> Array:
        return Array(np.float32(1) / np.sqrt(x.values), "f32")

    def static_range(self, stop: int) -> range:
        return range(stop)

    def exp(self, x: Array) -> Array:
        return Array(np.exp(x.values), "f32")

    def erf(self, x: Array) -> Array:
        return Array(np.vectorize(math.erf)(x.values).astype(np.float32), "f32")

    def static_assert(self, condition: bool, message: str = "") -> None:
        assert condition, message


def _unpacked(codes: Array) -> tuple[Array, Array]:
    """See fragment_linear.unpacked: the four bytes of a word lie [..., byte, t, g]."""
    b = codes.values.astype(np.uint32)
    word = sum(b[..., i, :, :] << np.uint32(8 * i) for i in range(4))

    def pairs(low: Any) -> Any:
        """bf16 of a register's low and high half."""
        halves = np.stack((low & 0xFFFF, low >> 16), -3).astype(np.uint32)
        return (halves << np.uint32(16)).view(np.float32)

    mask = np.uint32(0x81C081C0)
    rotated = word >> np.uint32(6) | word << np.uint32(26)
    first = np.concatenate((pairs(word & mask), pairs(rotated & mask)), -3)
    last = (word << np.uint32(4)) & np.uint32(0x81808180)
    last |= (word >> np.uint32(4)) & np.uint32(0x00400040)
    second = np.concatenate((pairs((word << np.uint32(6)) & mask), pairs(last)), -3)
    return Array(first, "bf16"), Array(second, "bf16")


def _raised(x: Array) -> Array:
    return Array(_rounded(x.values * np.float32(2.0**64), "bf16"), "bf16")


def _times(x: Array, y: Array) -> Array:
    return Array(_rounded(x.values * y.values, "bf16"), "bf16")


def _mma(a: Array, b: Array, acc: Array) -> Array:
    return Array(acc.values + np.matmul(*(_wide(x) for x in (a, b))), "f32")


def _wide(x: Array) -> Any:
    assert x.dtype in ("bf16", "f16"), x.dtype
    return x.values.astype(np.float32)


# Functions that make layouts.
_LAYOUTS = ("_vector", "powers", "_columns_by_k", "_words", "_columns", "_repeated")


def run(kernel: JITFunction, grid: tuple[int, int, int], args: Mapping[str, Any]) -> None:
    """`kernel` over `grid`; `args` are its parameters by name, memory as torch tensors."""
    machine = ptx_asm.Machine()
    language = _Language(machine)
    meanings = {
        "unpacked": _unpacked,
        "raised": _raised,
        "times": _times,
        "mma_v2": _mma,
        "mfma": _mma,
        "gl": language,
        "tl": language,
    }
    scope: dict[str, Any] = {}
    for module in _modules(kernel.fn.__module__, {}).values():
        for name, value in vars(module).items():
            if isinstance(value, JITFunction):
                scope[name] = types.FunctionType(value.fn.__code__, scope, name)
            else:
                scope[name] = getattr(value, "value", value)
    scope.update(meanings)
    scope |= {n: (lambda *a: []) for n in _LAYOUTS}

    def value(leaf: Any) -> Any:
        return Pointer(_flat(leaf), machine) if isinstance(leaf, torch.Tensor) else leaf

    given = {n: map_leaves(v, value) for n, v in args.items()}
    with np.errstate(all="ignore"):
        for x in range(grid[0]):
            for y in range(grid[1]):
                for z in range(grid[2]):
                    language.place = (x, y, z)
                    scope[kernel.__name__](**given)


def _modules(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The module called `name` and those of all functions that it calls, itself last."""
    if name not in found:
        module = found.setdefault(name, sys.modules[name])
        for value in vars(module).values():
            if isinstance(value, JITFunction) and value.fn.__module__.startswith("ingot."):
                _modules(value.fn.__module__, found)
    return {**{n: m for n, m in found.items() if n != name}, name: found[name]}


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All that lies from the tensor's first element to its last."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,))
