"""NVIDIA's inline assembly by its documented meaning (PTX ISA), over all threads of a program.

A thread's registers are elements of numpy arrays; threads go in step. Shared memory is bytes.
Copies (cp.async) arrive as late as they may: when their group is waited for. A thread that reads
what another wrote since the last barrier is an error, as it would be a race.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

# What shared memory holds before anything is written: as bf16 or f32 it is NaN.
POISON = 0xFF
_NOBODY = -1
_PREDICATED = re.compile(r"@(!?)(\w+)\s+(.*)", re.DOTALL)
_ADDRESS = re.compile(r"\[\s*(\$?\w+)\s*(?:\+\s*(\d+))?\s*\]")
_SPACE = 40  # bits of an address within a tensor


class Machine:
    """The memory of one program, and of the device as far as it has asked for addresses."""

    def __init__(self) -> None:
        self.shared = np.zeros(0, np.uint8)
        self.writer = np.zeros(0, np.int64)
        self.tensors: list[torch.Tensor] = []
        self.groups: list[list[Callable[[], None]]] = []
        self.pending: list[Callable[[], None]] = []

    def allocate(self, size: int) -> None:
        self.shared = np.full(size, POISON, np.uint8)
        self.writer = np.full(size, _NOBODY, np.int64)

    def address(self, tensor: torch.Tensor, element: Any) -> Any:
        """Addresses of elements of a flat tensor."""
        same = [t.data_ptr() == tensor.data_ptr() for t in self.tensors]
        if True not in same:
            same.append(True)
            self.tensors.append(tensor)
        start = np.int64((same.index(True) + 1) << _SPACE)
        return start + np.asarray(element, np.int64) * tensor.element_size()

    def _global(self, address: Any, size: int) -> Any:
        """u8 [threads, size] at addresses, which must be aligned and within a tensor."""
        memory, places = self._places(address, size)
        return memory[places]

    def _places(self, address: Any, size: int) -> tuple[Any, Any]:
        numbers = (address >> _SPACE) - 1
        assert len(np.unique(numbers)) == 1, "one access to two tensors"
        memory = self.tensors[int(numbers[0])].view(torch.uint8).numpy()
        at = address & ((1 << _SPACE) - 1)
        assert np.all(at % size == 0) and np.all(at + size <= len(memory)), "outside the tensor"
        return memory, at[:, None] + np.arange(size)

    def load(self, address: Any, size: int) -> Any:
        """u8 [threads, size] of global memory, which no copy is on its way to."""
        return self._global(address, size)

    def store(self, address: Any, data: Any) -> None:
        """u8 [threads, size] to global memory."""
        memory, places = self._places(address, data.shape[1])
        memory[places] = data

    def read(self, at: Any, size: int) -> Any:
        """u8 [threads, size] of shared memory."""
        assert np.all(at % size == 0), "not aligned"
        places = at[:, None].astype(np.int64) + np.arange(size)
        writer, mine = self.writer[places], np.arange(len(at))[:, None]
        # What a barrier ordered has no writer; of a broadcast within a quad one lane alone uses it.
        raced = (writer != _NOBODY) & (writer != mine) & (writer // 4 != mine // 4)
        assert not raced.any(), "read before a barrier"
        return self.shared[places]

    def write(self, at: Any, data: Any, threads: Any) -> None:
        places = at[:, None].astype(np.int64) + np.arange(data.shape[1])
        assert np.all(at % data.shape[1] == 0), "not aligned"
        self.shared[places] = data
        self.writer[places] = threads[:, None]

    def barrier(self) -> None:
        self.writer[:] = _NOBODY

    def copy(self, to: Any, source: Any, size: int, live: Any, ignored: Any) -> None:
        threads = np.flatnonzero(live)
        if not len(threads):
            return
        data = np.zeros((len(threads), size), np.uint8)
        reads = ~ignored[threads]
        if reads.any():
            data[reads] = self._global(source[threads][reads], size)
        places = to[threads]
        self.pending.append(lambda: self.write(places, data, threads))

    def commit(self) -> None:
        self.groups.append(self.pending)
        self.pending = []

    def wait(self, left: int) -> None:
        while len(self.groups) > left:
            for arrives in self.groups.pop(0):
                arrives()


def run(machine: Machine, asm: str, constraints: str, args: Sequence[Any]) -> list[Any]:
    """The outputs of `asm` as u32 [threads], of inputs i32, i64 or f32 [threads]."""
    kinds = constraints.replace("=", "").replace("&", "").split(",")
    count = len(kinds) - len(args)
    values = np.broadcast_arrays(*args)
    threads = len(values[0])
    registers: dict[str, Any] = {f"${i}": np.zeros(threads, np.uint32) for i in range(count)}
    early = all("&" in c for c in constraints.split(",")[:count])
    for i, (kind, value) in enumerate(zip(kinds[count:], values, strict=True)):
        width = {"r": np.int32, "f": np.float32, "l": np.int64}[kind]
        assert value.dtype == width, (kind, value.dtype)
        registers[f"${count + i}"] = np.array(value).view(np.int64 if kind == "l" else np.uint32)
    text = asm.strip()
    if text.startswith("{"):
        text = text[1 : text.rindex("}")]
    statements = [s for s in (" ".join(part.split()) for part in text.split(";")) if s]
    written = False
    for statement in statements:
        if statement.startswith(".reg"):
            continue
        match = _PREDICATED.fullmatch(statement)
        live = registers[match[2]] ^ bool(match[1]) if match else np.ones(threads, bool)
        name, _, rest = (match[3] if match else statement).partition(" ")
        if written and not early:
            # An output may have the register of an input that is read later, unless it is marked.
            used = {int(i) for i in re.findall(r"\$(\d+)", rest)}
            assert all(i < count for i in used), f"{statement}: an input after an output"
        _instruction(machine, name, rest, registers, live)
        written |= (to := re.match(r"\{?\$(\d+)", rest)) is not None and int(to[1]) < count
    return [registers[f"${i}"] for i in range(count)]


def _instruction(machine: Machine, name: str, rest: str, registers: Any, live: Any) -> None:
    if name.startswith("mma.sync.aligned.m16n8k16"):
        groups = [[r.strip() for r in g.split(",")] for g in re.findall(r"\{([^}]*)\}", rest)]
        to, a, b, c = groups
        found = _mma(*([registers[r] for r in g] for g in (a, b, c)))
        registers.update(zip(to, found, strict=True))
        return
    vector = re.match(r"\{([^}]*)\}\s*,\s*(.*)", rest)
    operands = [o.strip() for o in (vector[2] if vector else rest).split(",")]

    def value(operand: str) -> Any:
        if operand in registers:
            return registers[operand]
        return np.full(len(live), int(operand, 0), np.uint32)

    def place(operand: str) -> Any:
        found = _ADDRESS.fullmatch(operand)
        assert found, operand
        at = registers[found[1]]
        return at.astype(np.int64) + int(found[2] or 0)

    match name.split("."):
        case ["setp", "ne" | "eq" as relation, _]:
            equal = value(operands[1]) == value(operands[2])
            registers[operands[0]] = equal if relation == "eq" else ~equal
        case ["and" | "or" as kind, "b32"]:
            a, b = value(operands[1]), value(operands[2])
            registers[operands[0]] = a & b if kind == "and" else a | b
        case ["shl" | "shr" as kind, "b32"]:
            a, b = value(operands[1]), value(operands[2])
            registers[operands[0]] = a << b if kind == "shl" else a >> b
        case ["shf", "r", "wrap", "b32"]:
            low, high, by = (value(o) for o in operands[1:])
            both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
            shifted = both >> (by & np.uint32(31)).astype(np.uint64)
            registers[operands[0]] = shifted.astype(np.uint32)
        case ["mov", "b32"]:
            registers[operands[0]] = value(operands[1].replace("global_smem", "0"))
        case ["add" | "max" as kind, "f32"]:
            a, b = (value(o).view(np.float32) for o in operands[1:])
            found = a + b if kind == "add" else np.fmax(a, b)
            registers[operands[0]] = found.view(np.uint32)
        case ["cvt", "rn", "bf16x2", "f32"]:
            high, low = (torch.from_numpy(value(o).view(np.float32)) for o in operands[1:])
            halves = torch.stack((low, high), -1).bfloat16().view(torch.int16).numpy()
            registers[operands[0]] = np.ascontiguousarray(halves).view(np.uint32)[:, 0]
        case ["prmt", "b32"]:
            low, high = (value(o).astype(np.uint64) for o in operands[1:3])
            both = low | high << np.uint64(32)
            found = np.zeros(len(live), np.uint64)
            for i in range(4):
                chosen = np.uint64(8 * (int(operands[3], 16) >> 4 * i & 7))
                found |= (both >> chosen & np.uint64(0xFF)) << np.uint64(8 * i)
            registers[operands[0]] = found.astype(np.uint32)
        case ["movmatrix", "sync", "aligned", "m8n8", "trans", "b16"]:
            halves = np.ascontiguousarray(value(operands[1])).view(np.uint16).reshape(-1, 8, 8)
            turned = np.ascontiguousarray(halves.transpose(0, 2, 1))
            registers[operands[0]] = turned.view(np.uint32).reshape(-1)
        case ["mul", "rn", "bf16x2"]:
            a, b = (_halves(value(o)).astype(np.float32) for o in operands[1:])
            rounded = torch.from_numpy(a * b).bfloat16().view(torch.int16).numpy()
            registers[operands[0]] = np.ascontiguousarray(rounded).view(np.uint32)[:, 0]
        case ["shfl", "sync", "bfly" | "idx" as kind, "b32"]:
            assert operands[3:] == [{"bfly": "31", "idx": "0x1c1f"}[kind], "0xffffffff"]
            lanes, by = np.arange(len(live)), value(operands[2]).astype(np.int64)
            source = lanes ^ by if kind == "bfly" else lanes // 4 * 4 + by % 4
            registers[operands[0]] = value(operands[1])[source]
        case ["cp", "async", "cg" | "ca", "shared", "global"]:
            ignored = registers[operands[3]] if len(operands) > 3 else ~live
            machine.copy(place(operands[0]), place(operands[1]), int(operands[2]), live, ignored)
        case ["cp", "async", "commit_group"]:
            machine.commit()
        case ["cp", "async", "wait_group"]:
            machine.wait(int(operands[0]))
        case ["ld", "shared", *_]:
            to = [r.strip() for r in vector[1].split(",")] if vector else [operands[0]]
            read = machine.read(place(operands[-1]), 4 * len(to))
            words = np.ascontiguousarray(read).view(np.uint32)
            registers.update({r: words[:, i].copy() for i, r in enumerate(to)})
        case ["ld", "global", "cg", *_]:
            to = [r.strip() for r in vector[1].split(",")] if vector else [operands[0]]
            threads = np.flatnonzero(live)
            if len(threads):
                read = machine.load(place(operands[-1])[threads], 4 * len(to))
                words = np.ascontiguousarray(read).view(np.uint32)
                for i, name in enumerate(to):
                    registers[name] = registers[name].copy()
                    registers[name][threads] = words[:, i]
        case ["st", "shared" | "global" as space, *_]:
            found = _ADDRESS.match(rest)
            assert found
            given = [r.strip(" {}") for r in rest[found.end() :].strip(" ,").split(",")]
            threads = np.flatnonzero(live)
            words = np.stack([value(r) for r in given], 1)[threads]
            data = np.ascontiguousarray(words).view(np.uint8)
            to = place(found[0])[threads]
            if space == "shared":
                machine.write(to, data, threads)
            elif len(threads):
                machine.store(to, data)
        case ["bar", "sync"]:
            machine.barrier()
        case _:
            raise AssertionError(f"unknown instruction {name} {rest}")


def _halves(register: Any) -> Any:
    """f64 [..., 2] of two bf16."""
    low, high = register << np.uint32(16), register & np.uint32(0xFFFF0000)
    return np.stack((low.view(np.float32), high.view(np.float32)), -1).astype(np.float64)


def _mma(a: Sequence[Any], b: Sequence[Any], c: Sequence[Any]) -> list[Any]:
    """mma.m16n8k16 of bf16: in lane 4r + q rows r and r + 8 (column r) at k = 2q, 2q + 8."""
    # warp, r, q, two
    parts = [_halves(x).reshape(-1, 8, 4, 2) for x in (*a, *b)]
    low = np.stack((parts[0], parts[2]), 2)  # warp, r, k / 8, q, two
    high = np.stack((parts[1], parts[3]), 2)
    left = np.concatenate((low, high), 1).reshape(-1, 16, 16)
    right = np.stack((parts[4], parts[5]), 2).reshape(-1, 8, 16)
    before = [x.view(np.float32).astype(np.float64).reshape(-1, 8, 4) for x in c]
    product = np.einsum("wik,wjk->wij", left, right).reshape(-1, 2, 8, 4, 2)
    found = [product[:, half, :, :, odd] for half in (0, 1) for odd in (0, 1)]
    return [
        (x + y).astype(np.float32).reshape(-1).view(np.uint32)
        for x, y in zip(found, before, strict=True)
    ]
