"""The GPU runtime on the GPU that is there: kernels by Triton, everything else by our drivers."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ingot
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ingot.codegen.templates.pdl import pdl_wait
from ingot.runtime.devices.cuda import CudaApi, CudaDriver
from ingot.runtime.devices.device_api import DeviceError
from ingot.runtime.devices.gpu_memory import SelfTestError
from ingot.runtime.devices.graph_executable import GpuExecutable
from ingot.runtime.devices.hip import HipDriver
from ingot.runtime.program import Argument, Buffer, Entry, Kernel, Launch, Program, Slice
from msgspec.structs import replace
from programs import program_of, with_entries
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.gpu

BLOCK, BLOCKS = 256, 64
N = BLOCK * BLOCKS
REPLAYS = 1000


@triton.jit
def _axpy(y_ptr, x_ptr, a, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    y = tl.load(y_ptr + at, mask=inside)
    x = tl.load(x_ptr + at, mask=inside)
    tl.store(y_ptr + at, a * x + y, mask=inside)


@triton.jit
def _axpy_programmatic(y_ptr, x_ptr, a, n, BLOCK: tl.constexpr):
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    y = tl.load(y_ptr + at, mask=inside)
    x = tl.load(x_ptr + at, mask=inside)
    tl.store(y_ptr + at, a * x + y, mask=inside)


@triton.jit
def _busy(seed, rounds):
    """A number that takes `rounds` steps to find, each after the one before."""
    for _ in range(rounds):
        seed = seed * 1664525 + 1013904223
    return seed


@triton.jit
def _start(PROGRAMMATIC: tl.constexpr, WAITS: tl.constexpr):
    """As every kernel does, or with WAITS False as none may."""
    if WAITS:
        pdl_wait(PROGRAMMATIC)
    else:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _blend(
    out, a, b, live, read_after, write_after, PROGRAMMATIC: tl.constexpr, WAITS: tl.constexpr
):
    """out = 3·a + b in programs before `live`: a's block is another program's. What is found busily
    is never -1; it puts reads and writes off."""
    _start(PROGRAMMATIC, WAITS)
    block = tl.program_id(0)
    if block >= live:
        return
    lane = tl.arange(0, 256)
    late = lane + (_busy(block, read_after) == -1).to(tl.int32)
    total = 3 * tl.load(a + (block + 17) % 64 * 256 + late) + tl.load(b + block * 256 + late)
    total += (_busy(block + 1, write_after) == -1).to(tl.int32)
    tl.store(out + block * 256 + lane, total)


@triton.jit
def _total(out, a, read_after, PROGRAMMATIC: tl.constexpr, WAITS: tl.constexpr):
    """out = Σ a everywhere, by one program."""
    _start(PROGRAMMATIC, WAITS)
    lane = tl.arange(0, 256) + (_busy(tl.program_id(0), read_after) == -1).to(tl.int32)
    total = tl.zeros([256], tl.int32)
    for block in range(64):
        total += tl.load(a + block * 256 + lane)
    for block in range(64):
        tl.store(out + block * 256 + lane, tl.zeros([256], tl.int32) + tl.sum(total, 0))


@triton.jit
def _store_at(y_ptr, offset):
    tl.store(y_ptr + offset, 1)


def driver() -> CudaDriver | HipDriver:
    return HipDriver() if torch.version.hip else CudaDriver()


def build(
    function: Any, signature: dict[str, str], constants: dict[str, int], **options: Any
) -> Kernel:
    """A kernel for the device that is there."""
    device = driver()
    kind, _, arch = device.target.partition(":")
    name = arch if kind == "hip" else int(arch.removeprefix("sm_"))
    types = {name: text.replace("f32", "fp32") for name, text in signature.items()}
    source = ASTSource(function, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
    built = triton.compile(
        source, target=GPUTarget(kind, name, device.info.warp), options={"num_warps": 4, **options}
    )
    return Kernel(
        id=function.__name__,
        symbol=built.metadata.name,
        binary=built.asm["hsaco" if kind == "hip" else "cubin"],
        num_warps=4,
        shared=built.metadata.shared,
        args=tuple(Argument(text) for text in signature.values()),
    )


AXPY = {"y_ptr": "*f32", "x_ptr": "*f32", "a": "f32", "n": "i32"}


def axpy_program(kernel: Kernel, steps: int) -> Program:
    """s += w (state), then y = 0, y += a·x for a = 1 … steps, one launch each, then y += s."""
    vectors: dict[str, Any] = {"dtype": "f32", "shape": (N,), "nbytes": 4 * N}
    y, x, w, s = (Slice(name, "f32", (N,)) for name in "yxws")
    grid = (BLOCKS, 1, 1)
    launches = [
        Launch(kernel.id, (s, w, 1.0, N), grid),
        # y = y - y: the arena holds what the last replay left.
        Launch(kernel.id, (y, y, -1.0, N), grid),
        *(Launch(kernel.id, (y, x, float(a), N), grid) for a in range(1, steps + 1)),
        Launch(kernel.id, (y, s, 1.0, N), grid),
    ]
    last = len(launches) - 1
    edges = [(i, i + 1) for i in range(1, last)] + [(0, last)]
    buffers = (
        Buffer("x", kind="input", offset=0, **vectors),
        Buffer("y", kind="output", offset=4 * N, **vectors),
    )
    return program_of(
        target=driver().target,
        kernels={kernel.id: kernel},
        buffers={
            "w": Buffer("w", kind="weight", **vectors),
            "s": Buffer("s", kind="state", **vectors),
        },
        entry=Entry({}, buffers, tuple(launches), tuple(edges)),
        arena_bytes=8 * N,
    )


# Small whole numbers: every sum is exact, in whatever order and fused or not.
X = np.random.default_rng(0).integers(-8, 8, N).astype(np.float32)
W = np.random.default_rng(1).integers(-8, 8, N).astype(np.float32)


def load(program: Program, w: Any = W) -> GpuExecutable:
    return driver().load(program, {"w": w}.__getitem__)


def check(executable: GpuExecutable, steps: int, turn: int) -> None:
    y = executable.run("step", {}, {"x": X})["y"]
    np.testing.assert_array_equal(y, steps * (steps + 1) / 2 * X + turn * W)


def test_find() -> None:
    found = type(driver()).find()
    assert found == driver().target
    assert driver().info.memory_bytes > 1 << 30


def test_numbers_state_and_many_replays() -> None:
    executable = load(axpy_program(build(_axpy, AXPY, {"BLOCK": BLOCK}), 3))
    for turn in range(1, REPLAYS + 1):
        check(executable, 3, turn)
    executable.close()


def test_thousand_replays_are_bit_identical() -> None:
    """Floats of all sizes, and a program without state: the same bytes every time."""
    program = axpy_program(build(_axpy, AXPY, {"BLOCK": BLOCK}), 20)
    entry = program.entries[0]
    chain = tuple((i, i + 1) for i in range(len(entry.launches) - 3))
    entry = replace(entry, launches=entry.launches[1:-1], dependencies=chain)
    program = with_entries(program, [entry])
    executable = load(program)
    x = np.random.default_rng(2).standard_normal(N).astype(np.float32) * np.float32(1e3)
    first = executable.run("step", {}, {"x": x})["y"].tobytes()
    for _ in range(REPLAYS):
        assert executable.run("step", {}, {"x": x})["y"].tobytes() == first
    executable.close()


def test_programmatic_edges_give_the_same_sooner() -> None:
    if torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic launches need an NVIDIA GPU of compute capability 9 or higher")
    steps = 300
    plain = load(axpy_program(build(_axpy, AXPY, {"BLOCK": BLOCK}), steps))
    kernel = build(_axpy_programmatic, AXPY, {"BLOCK": BLOCK}, launch_pdl=True)
    early = load(axpy_program(replace(kernel, programmatic=True), steps))
    for turn in range(1, 101):
        check(plain, steps, turn)
        check(early, steps, turn)
    times = [float(np.median(which.measure("step", {}, {"x": X}, 31))) for which in (plain, early)]
    print(f"ms for {steps + 3} launches: plain {times[0]:.3f}, programmatic {times[1]:.3f}")
    assert times[1] < times[0]
    plain.close()
    early.close()


def overlapping_program(waits: bool) -> Program:
    """Six scratch buffers written and read by turns, overwritten while they are read, across a
    launch that does nothing, one program alone, kernels that are not programmatic, and a join of
    each kind of edges. `waits` False builds kernels that do not wait for those before them."""
    early = not torch.version.hip
    blend = dict.fromkeys(("out", "a", "b"), "*i32")
    blend |= dict.fromkeys(("live", "read_after", "write_after"), "i32")
    total = {"out": "*i32", "a": "*i32", "read_after": "i32"}
    kernels = [
        replace(build(f, names, {"PROGRAMMATIC": early, "WAITS": waits}), programmatic=early)
        for f, names in ((_blend, blend), (_total, total))
    ]
    plain = build(_blend, blend, {"PROGRAMMATIC": False, "WAITS": True})
    kernels.append(replace(plain, id="plain"))
    x, p, q, r, t, u, v, y = (Slice(name, "i32", (N,)) for name in "xpqrtuvy")
    long, grid = 5000, (BLOCKS, 1, 1)  # about ten microseconds

    launches = (
        Launch("_blend", (p, x, x, BLOCKS, 0, long), grid),
        Launch("_blend", (v, x, x, 0, 0, 0), grid),
        Launch("_blend", (q, p, x, BLOCKS, long, 0), grid),
        Launch("_blend", (p, q, x, BLOCKS, 0, long), grid),
        Launch("_total", (r, p, long)),
        Launch("_blend", (q, p, r, BLOCKS, long, long), grid),
        Launch("_blend", (r, q, p, BLOCKS, 0, long), grid),
        Launch("plain", (t, q, q, BLOCKS, 0, 0), grid),
        Launch("_blend", (u, r, t, BLOCKS, 0, long), grid),
        Launch("_blend", (v, q, p, BLOCKS, long, 0), grid),
        Launch("_blend", (y, u, v, BLOCKS, 0, 0), grid),
    )
    joins = ((5, 6), (5, 7), (6, 8), (7, 8), (5, 9), (8, 10), (9, 10))
    edges = (*((i, i + 1) for i in range(5)), *joins)
    kinds = {"x": "input", "y": "output"}
    buffers = tuple(
        Buffer(name, "i32", (N,), kinds.get(name, "scratch"), 4 * N, 4 * N * i)
        for i, name in enumerate("xpqrtuvy")
    )
    entry = Entry({}, buffers, launches, edges)
    named = {k.id: k for k in kernels}
    return program_of(driver().target, named, {}, entry, 4 * N * len(buffers))


def overlapping_results(x: Any) -> Any:
    """y of the program, one launch after the other."""

    def blend(a: Any, b: Any) -> Any:
        return 3 * np.roll(a, -17 * BLOCK) + b

    p = blend(x, x)
    p = blend(blend(p, x), x)
    q = blend(p, np.full_like(x, p.sum(dtype=np.int32)))
    return blend(blend(blend(q, p), blend(q, q)), blend(q, p))


def wrong_replays(executable: GpuExecutable) -> int:
    """Of REPLAYS, each of other numbers: the memory holds what the last one left."""
    wrong = 0
    for seed in range(REPLAYS):
        x = np.random.default_rng(seed).integers(-(2**31), 2**31, N, np.int32)
        y = executable.run("step", {}, {"x": x})["y"]
        wrong += not np.array_equal(y, overlapping_results(x))
    return wrong


def test_overlapping_launches_compute_what_launches_in_turn_do() -> None:
    executable = driver().load(overlapping_program(waits=True), {}.__getitem__)
    assert wrong_replays(executable) == 0
    executable.close()


def test_overlapping_launches_that_do_not_wait_go_wrong() -> None:
    """Were it not so, the test above would tell nothing."""
    if torch.version.hip:
        pytest.skip("launches overlap on NVIDIA only")
    try:
        executable = driver().load(overlapping_program(waits=False), {}.__getitem__)
    except SelfTestError:  # told sooner still
        return
    assert wrong_replays(executable) > 0
    executable.close()


def test_weight_of_torch_is_used_in_place() -> None:
    w = torch.from_numpy(W).cuda()
    executable = load(axpy_program(build(_axpy, AXPY, {"BLOCK": BLOCK}), 2), w)
    check(executable, 2, 1)
    w.zero_()
    torch.cuda.synchronize()
    check(executable, 2, 1)  # the state grew by nothing
    executable.close()


class Products(torch.nn.Module):
    """Two products by large weights, a slice of a third, and a table that is made at load."""

    SIZE = 8192

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(self.SIZE, self.SIZE)
        self.second = torch.nn.Linear(self.SIZE, self.SIZE, bias=False)
        self.wide = torch.nn.Parameter(torch.randn(self.SIZE, 64) / 64)
        self.register_buffer("scale", torch.arange(32) / 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.nn.functional.silu(self.first(x)))
        ones = torch.ones(32, dtype=x.dtype, device=x.device)
        return (y @ self.wide[:, 16:48]) * (self.scale + ones)


def test_module_on_the_gpu_is_served_where_it_lies() -> None:
    """There is no second copy of its weights: they are read in place, and kept while needed."""
    torch.manual_seed(0)
    module = Products().bfloat16().cuda()
    x = torch.randn(4, Products.SIZE).bfloat16()
    compiled = ingot.compile(module, example_inputs=(x.cuda(),), progress=False)

    def agrees(factor: float) -> None:
        with torch.no_grad():
            expected = module(x.cuda()).float().cpu()
        found = compiled(x).float()
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01 * factor)

    with torch.no_grad():
        module(x.cuda())  # so that torch has all the memory that it needs
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    agrees(1)  # the first call loads
    taken = free - torch.cuda.mem_get_info()[0]
    large = 2 * Products.SIZE * Products.SIZE * 2
    assert sum(p.nbytes for p in module.parameters()) > large
    assert taken < large // 2, f"{taken} bytes more are in use, weights have {large}"
    with torch.no_grad():
        module.second.weight.mul_(2)
    torch.cuda.synchronize()
    agrees(2)  # what the parameter holds now

    # The module moves away; its memory stays, and torch gives it to nobody else.
    before = compiled(x)
    module.cpu()
    sizes, dtype = (Products.SIZE, Products.SIZE), torch.bfloat16
    others = [torch.full(sizes, 7.0, dtype=dtype, device="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    torch.testing.assert_close(compiled(x), before, rtol=0, atol=0)
    assert [float(other[0, 0]) for other in others] == [7, 7]


def test_context_is_that_of_torch() -> None:
    """The primary one, which outlives what was loaded in it."""
    if torch.version.hip:
        pytest.skip("the HIP runtime has no contexts to choose from")
    tensor = torch.ones(4, device="cuda")  # torch makes it current on this thread
    library, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    assert library.cuCtxGetCurrent(ctypes.byref(context)) == 0
    executable = load(axpy_program(build(_axpy, AXPY, {"BLOCK": BLOCK}), 2))
    api = executable._api
    assert isinstance(api, CudaApi)
    assert context.value == api._context
    with api.current():
        inside = ctypes.c_void_p()
        assert library.cuCtxGetCurrent(ctypes.byref(inside)) == 0
        assert inside.value == context.value
    executable.close()
    after = ctypes.c_void_p()
    assert library.cuCtxGetCurrent(ctypes.byref(after)) == 0
    assert after.value == context.value
    assert float(tensor.sum()) == 4


def test_from_another_thread_and_beside_torch() -> None:
    executable = load(axpy_program(build(_axpy, AXPY, {"BLOCK": BLOCK}), 2))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            check(executable, 2, 1)
            executable.close()
        except (AssertionError, DeviceError) as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
    assert float(torch.ones(4, device="cuda").sum()) == 4


def test_memory_comes_back() -> None:
    program = axpy_program(build(_axpy, AXPY, {"BLOCK": BLOCK}), 2)
    state = replace(program.buffers["s"], name="big", shape=(1 << 28,), nbytes=1 << 30)
    program = replace(program, buffers={**program.buffers, "big": state})
    load(program).close()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(5):
        load(program).close()
    assert abs(torch.cuda.mem_get_info()[0] - free) < 64 << 20


def bad_store() -> None:
    """Store far outside of every buffer; the self-test of the load is the first to launch it."""
    kernel = build(_store_at, {"y_ptr": "*i32", "offset": "i64"}, {})
    buffers = (Buffer("y", "i32", (1,), "output", 4, 0),)
    launch = Launch(kernel.id, (Slice("y", "i32", (1,)), 1 << 45))
    entry = Entry({}, buffers, (launch,), ())
    program = program_of(driver().target, {kernel.id: kernel}, {}, entry, 256)
    try:
        driver().load(program, {}.__getitem__)
    except DeviceError as error:
        print(f"sticky {error.sticky}: {error}")


def test_bad_store_is_told(tmp_path: Path) -> None:
    """In a process of its own, which it ends."""
    code = (
        "import importlib.util, sys\n"
        f"sys.path[:0] = {sys.path!r}\n"  # helpers are imported from where they are here
        f"spec = importlib.util.spec_from_file_location('bad', {str(Path(__file__))!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['bad'] = module\n"
        "spec.loader.exec_module(module)\n"
        "module.bad_store()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("sticky True: "), done.stdout
    assert "restart" in done.stdout
    assert "Synchronize failed with 7" in done.stdout, done.stdout
