"""What the device can do at best: bytes read a second, and flops a second of the vendor's GEMM."""

from __future__ import annotations

from statistics import median

import torch
from msgspec import structs

from ...codegen.build import build
from ...codegen.kernel_source import KernelSource
from ...codegen.templates.read_stream import read_kernel
from ...compiler.target import Target, target_of
from ...runtime.devices.graph_executable import GpuDriver
from ...runtime.program import Argument, Buffer, Entry, Function, Launch, Program, Slice, Spec
from .random_weights import RandomWeights

READ_BYTES = 8 << 30
_REPEATS = 20
# Shapes of the launch; the fastest counts.
_BLOCKS, _STEPS, _WARPS = (2048, 4096, 8192), (4, 16, 64), 8
_GEMM = 8192


def bytes_per_second(driver: GpuDriver, nbytes: int = READ_BYTES) -> float:
    """The fastest of several kernels that only read `nbytes` of memory."""
    program = _read_program(target_of(driver.target), nbytes)
    executable = driver.load(program, RandomWeights(program))
    try:
        best = 0.0
        for name, function in program.functions.items():
            symbols = function.entries[0].symbols
            executable.run(name, symbols, {})
            times = executable.measure(name, symbols, {}, _REPEATS)
            best = max(best, nbytes / (1e-3 * median(times)))
        return best
    finally:
        executable.close()


def _read_program(target: Target, nbytes: int) -> Program:
    """A function for each shape of the launch, over one weight of `nbytes`."""
    elements = nbytes // 4
    sources = {
        f"{steps} blocks of {block}": (steps * block, _read_source(steps, block))
        for block in _BLOCKS
        for steps in _STEPS
    }
    built = build([source for _, source in sources.values()], target)
    x = Buffer("x", "i32", (elements,), "weight", nbytes)
    kernels = {name: structs.replace(built[s], id=name) for name, (_, s) in sources.items()}
    functions: dict[str, Function] = {}
    for name, (each, _) in sources.items():
        count = elements // each
        out = Buffer("out", "i32", (count,), "output", 4 * count, 0)
        args = (Slice("x", "i32", (elements,)), Slice("out", "i32", (count,)))
        entry = Entry({}, (out,), (Launch(name, args, (count, 1, 1)),), ())
        functions[name] = Function({}, {}, {"out": Spec("i32", (count,))}, (), (entry,))
    arena = max(e.buffers[0].nbytes for f in functions.values() for e in f.entries)
    return Program(target.name, kernels, {"x": x}, functions, arena)


def _read_source(steps: int, block: int) -> KernelSource:
    memory = Argument("*i32", 16)
    arguments = {"x": memory, "out": memory, "STEPS": steps, "BLOCK": block}
    return KernelSource.of(read_kernel, arguments, _WARPS, 1, programmatic=False)


def gemm_flops_per_second() -> float | None:
    """What torch's bf16 GEMM does at 8192 x 8192 x 8192; None where torch has no GPU."""
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(_GEMM, _GEMM, device="cuda").bfloat16() for _ in range(2))
    times: list[float] = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, b)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * _GEMM**3 / (1e-3 * median(times))
