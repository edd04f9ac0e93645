"""The GPU runtime from load to close, on drivers that keep to the rules and have no GPU."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import (
    CUDA,
    HIP,
    WEIGHTS,
    FakeGpu,
    build_fake,
    changed_kernel,
    floats,
    image,
    kernel,
    sum_program,
    view,
    with_arg,
    with_launch,
)
from ingot.runtime.devices import gpu_memory
from ingot.runtime.devices.check_program import ProgramError
from ingot.runtime.devices.cuda import CudaDriver
from ingot.runtime.devices.device_api import DeviceApi, DeviceError, DriverMissingError
from ingot.runtime.devices.gpu_memory import SelfTestError
from ingot.runtime.devices.graph_executable import GpuExecutable
from ingot.runtime.devices.hip import HipDriver
from ingot.runtime.devices.host_arrays import memory_view
from ingot.runtime.program import Buffer, Entry, Launch, Program, Slice
from msgspec.structs import replace
from programs import program_of, with_entries, with_step

X = np.linspace(-1, 2, 8, dtype=np.float32)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FakeGpu]:
    folder = tmp_path_factory.mktemp("fakes")
    return {vendor.name: build_fake(vendor, folder) for vendor in (HIP, CUDA)}


@pytest.fixture(params=["hip", "cuda"])
def gpu(request: pytest.FixtureRequest, built: dict[str, FakeGpu]) -> Iterator[FakeGpu]:
    """A fake that must have nothing to complain about, and get everything back."""
    fake = built[request.param]
    fake.reset()
    yield fake
    assert fake.complaints == ""
    assert fake.outstanding == []


def expected(
    x: np.ndarray[Any, Any] = X, w: np.ndarray[Any, Any] = WEIGHTS["w"]
) -> np.ndarray[Any, Any]:
    s = x + w
    return s + ((x + x) + s)


def one_launch(gpu: FakeGpu, name: str, args: tuple[Any, ...], *buffers: Buffer) -> Program:
    """A program of one launch over buffers in an arena of 4 KiB."""
    entry = Entry({}, buffers, (Launch(name, args),), ())
    kernels = {name: kernel(gpu.vendor, name)}
    return program_of(gpu.vendor.target, kernels, {}, entry, 4096)


# ---- what it does


def test_load_run_close(gpu: FakeGpu) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    for turn in range(1, 4):
        results = executable.run("step", {}, {"x": X * turn})
        np.testing.assert_array_equal(results["out"], expected(X * turn))
        # State goes on from run to run, and began at zero though the self-test counted too.
        assert results["n"].tolist() == [turn]
    executable.close()
    executable.close()
    with pytest.raises(RuntimeError, match="was closed"):
        executable.run("step", {}, {"x": X})


def test_what_nobody_closed_comes_back(gpu: FakeGpu) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    assert len(gpu.outstanding) > 0
    del executable
    assert gpu.outstanding == []


def test_results_are_copies(gpu: FakeGpu) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    first = executable.run("step", {}, {"x": X})
    executable.run("step", {}, {"x": X + 1})
    np.testing.assert_array_equal(first["out"], expected())
    executable.close()


def test_driver_gets_launches_as_planned(gpu: FakeGpu) -> None:
    program = sum_program(gpu.vendor)
    executable = gpu.load(program, WEIGHTS)
    gpu.take_launches()
    executable.run("step", {}, {"x": X})
    ran = {launch["node"]: launch for launch in gpu.take_launches()}
    entry = program.entries[0]
    assert sorted(ran) == list(range(len(entry.launches)))
    edges = {(earlier, node) for node in ran for earlier, _ in ran[node]["after"]}
    assert edges == set(entry.dependencies)
    assert ran[0]["grid"] == [3, 2, 1]
    assert ran[0]["threads"] == 2 * gpu.vendor.warp
    # Addresses: s, x and d are places of one arena, and a number is a number.
    s, x, _, n = ran[0]["params"]
    assert (s - x, ran[1]["params"][0] - x, n) == (256, 512, 8)
    executable.close()


def test_edges_order_the_launches(gpu: FakeGpu) -> None:
    """The fake runs what no edge holds back last first: without edges, sums of what was there."""
    program = sum_program(gpu.vendor)
    entry = replace(program.entries[0], dependencies=())
    with pytest.raises(SelfTestError, match="gave output out with"):
        gpu.load(with_entries(program, [entry]), WEIGHTS)


def test_nothing_is_made_after_load(gpu: FakeGpu) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    before = gpu.outstanding
    allocated = gpu.calls("allocate")
    for _ in range(3):
        executable.run("step", {}, {"x": X})
    assert (gpu.outstanding, gpu.calls("allocate")) == (before, allocated)
    executable.close()


def test_functions_share_state_and_arena(gpu: FakeGpu) -> None:
    program = sum_program(gpu.vendor)
    (entry,) = program.entries
    step = program.functions["step"]
    again = replace(step, symbols={"T": (2, 2)}, entries=(replace(entry, symbols={"T": 2}),))
    executable = gpu.load(replace(program, functions={"step": step, "again": again}), WEIGHTS)
    calls = (("step", {}), ("again", {"T": 2}), ("step", {}))
    counts = [int(executable.run(*call, {"x": X})["n"][0]) for call in calls]
    assert counts == [1, 2, 3]
    executable.close()


def test_neighbours_travel_together(gpu: FakeGpu) -> None:
    """Three inputs, of which two are neighbours, are two copies; two outputs are one."""
    buffers = (
        floats("a", "input", 0),
        floats("b", "input", 256),
        floats("far", "input", 2048),
        floats("y", "output", 3072),
        floats("z", "output", 3104),
    )
    args = (view("y"), view("a"), view("b"), 8)
    program = one_launch(gpu, "add", args, *buffers)
    more = (*program.entries[0].launches, Launch("add", (view("z"), view("b"), view("far"), 8)))
    executable = gpu.load(with_entries(program, [replace(program.entries[0], launches=more)]))
    sent, fetched = gpu.calls("to_device"), gpu.calls("to_host")
    a, b, far = (np.random.default_rng(i).random(8, np.float32) for i in range(3))
    results = executable.run("step", {}, {"far": far, "b": b, "a": a})
    assert (gpu.calls("to_device") - sent, gpu.calls("to_host") - fetched) == (2, 1)
    np.testing.assert_array_equal(results["y"], a + b)
    np.testing.assert_array_equal(results["z"], b + far)
    executable.close()


HOST_DTYPES = ["bool", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64", "c64"]


@pytest.mark.parametrize("dtype", HOST_DTYPES)
def test_every_dtype_goes_there_and_back(gpu: FakeGpu, dtype: str) -> None:
    from ingot.compiler.torch_types import torch_dtype

    torch.manual_seed(0)
    value = (torch.randn(3, 5) * 3).to(torch_dtype(dtype))
    nbytes = value.numel() * value.element_size()
    buffers = (
        Buffer("x", dtype, (3, 5), "input", nbytes, 0),
        Buffer("y", dtype, (3, 5), "output", nbytes, 512),
    )
    whole = [Slice(name, "u8", (nbytes,)) for name in ("y", "x")]
    executable = gpu.load(one_launch(gpu, "copy", (*whole, nbytes), *buffers))
    wide = value.float() if dtype in ("f16", "bf16") else value
    for given in [value] if dtype == "bf16" else [value, value.numpy(), value.T.contiguous().T]:
        result = executable.run("step", {}, {"x": given})["y"]  # pyright: ignore[reportArgumentType]
        assert result.dtype == wide.numpy().dtype
        np.testing.assert_array_equal(result, wide.numpy())
    executable.close()


def test_weights_in_every_form(gpu: FakeGpu) -> None:
    program = sum_program(gpu.vendor)
    w = WEIGHTS["w"]
    for given in (w, torch.from_numpy(w), np.repeat(w, 2)[::2]):
        executable = gpu.load(program, {"w": given})
        np.testing.assert_array_equal(executable.run("step", {}, {"x": X})["out"], expected())
        executable.close()


def test_bf16_weights_come_as_u16_or_bytes(gpu: FakeGpu) -> None:
    value = torch.randn(4, 4).bfloat16()
    buffers = (Buffer("y", "bf16", (4, 4), "output", 32, 0),)
    args = (Slice("y", "u8", (32,)), Slice("w", "u8", (32,)), 32)
    program = one_launch(gpu, "copy", args, *buffers)
    program = replace(program, buffers={"w": Buffer("w", "bf16", (4, 4), "weight", 32)})
    bits = value.view(torch.uint16).numpy()
    for given in (value, bits, bits.view(np.uint8).reshape(-1)):
        executable = gpu.load(program, {"w": given})
        np.testing.assert_array_equal(executable.run("step", {}, {})["y"], value.float().numpy())
        executable.close()


def test_long_weights_pass_through_a_short_buffer(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies wait until someone waits for them: a half filled again too early would show."""
    monkeypatch.setattr(gpu_memory, "UPLOAD_BYTES", 64)
    n = 1001
    w = np.random.default_rng(0).integers(0, 256, n, np.uint8)
    args = (Slice("y", "u8", (n,)), Slice("w", "u8", (n,)), n)
    program = one_launch(gpu, "copy", args, Buffer("y", "u8", (n,), "output", n, 0))
    program = replace(program, buffers={"w": Buffer("w", "u8", (n,), "weight", n)})
    executable = gpu.load(program, {"w": w})
    np.testing.assert_array_equal(executable.run("step", {}, {})["y"], w)
    executable.close()


class Storage:
    """Memory of the device, with its address."""

    def __init__(self, address: int) -> None:
        self.address = address


class TensorOnGpu:
    """What of a torch tensor on a GPU is asked for; copies of it lie at `copy`, or where it is."""

    is_cuda = True
    dtype = "torch.float32"
    shape = (8,)

    def __init__(
        self, address: int, index: int = 0, dense: bool = True, copy: int | None = None
    ) -> None:
        self.storage, self.dense, self.copy = Storage(address), dense, copy
        self.device = torch.device("cuda", index)

    def data_ptr(self) -> int:
        return self.storage.address

    def detach(self) -> TensorOnGpu:
        other = TensorOnGpu(0, self.device.index, self.dense, self.copy)
        other.storage = self.storage
        return other

    def resolve_conj(self) -> TensorOnGpu:
        return self

    def resolve_neg(self) -> TensorOnGpu:
        return self

    def contiguous(self) -> TensorOnGpu:
        return self if self.dense else self.clone()

    def clone(self) -> TensorOnGpu:
        return TensorOnGpu(self.data_ptr() if self.copy is None else self.copy)


@pytest.fixture
def others_memory(gpu: FakeGpu) -> Iterator[int]:
    """Where 32 bytes of the device lie that someone else has allocated, and frees."""
    api = gpu.api()
    api.open()
    with api.current():
        address = api.allocate(32)
    yield address
    with api.current():
        api.free(address)
    api.close()


def put(address: int, values: np.ndarray[Any, Any]) -> None:
    memory_view(address, values.nbytes)[:] = values.view(np.uint8)


def test_others_weights_are_used_in_place(gpu: FakeGpu, others_memory: int) -> None:
    """In the context that is there; they are read at each run, never copied, and not freed."""
    outstanding = gpu.outstanding
    put(others_memory, WEIGHTS["w"])
    allocated = gpu.calls("allocate")
    executable = gpu.load(sum_program(gpu.vendor), {"w": TensorOnGpu(others_memory)})
    assert gpu.calls("allocate") - allocated == 3  # the probe, the arena, the state
    np.testing.assert_array_equal(executable.run("step", {}, {"x": X})["out"], expected())
    changed = WEIGHTS["w"] * 2
    put(others_memory, changed)
    np.testing.assert_array_equal(executable.run("step", {}, {"x": X})["out"], expected(X, changed))
    executable.close()
    assert gpu.outstanding == outstanding


def test_others_weights_live_as_long_as_the_executable(gpu: FakeGpu, others_memory: int) -> None:
    """A parameter that is given other memory (module.cpu()) does not take its own away."""
    put(others_memory, WEIGHTS["w"])
    w = TensorOnGpu(others_memory)
    memory = weakref.ref(w.storage)
    executable = gpu.load(sum_program(gpu.vendor), {"w": w})
    w.storage = Storage(0)
    assert memory() is not None
    np.testing.assert_array_equal(executable.run("step", {}, {"x": X})["out"], expected())
    executable.close()
    assert memory() is None


@pytest.mark.parametrize("dense", [False, True])
def test_others_weights_are_copied_where_they_must(
    gpu: FakeGpu, others_memory: int, dense: bool
) -> None:
    """What is not dense, or lies at an odd place, as slices of weights may: torch copies it."""
    put(others_memory, WEIGHTS["w"])
    w = TensorOnGpu(others_memory + (4 if dense else 0), dense=dense, copy=others_memory)
    executable = gpu.load(sum_program(gpu.vendor), {"w": w})
    np.testing.assert_array_equal(executable.run("step", {}, {"x": X})["out"], expected())
    executable.close()


def test_weight_on_the_device_is_used_in_place(gpu: FakeGpu) -> None:
    """Its very address is what the kernel gets: after a free, the fake's kernels refuse it."""
    program = sum_program(gpu.vendor)
    gpu.load(program, WEIGHTS).close()
    address = next(ran for ran in gpu.take_launches() if ran["node"] == 0)["params"][2]
    allocated, waited = gpu.calls("allocate"), gpu.calls("synchronize")
    with pytest.raises(DeviceError, match="illegal memory access"):
        gpu.load(program, {"w": TensorOnGpu(address)})
    assert gpu.take_launches()[-1]["params"][2] == address
    assert gpu.calls("allocate") - allocated == 3  # the probe, the arena, the state
    # What torch's streams still do to the weight has been waited for.
    assert gpu.calls("synchronize") == waited + 1
    gpu.reset()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorOnGpu(256, index=1), "weight w: expected device 0, found cuda:1"),
        (TensorOnGpu(264), "the address of w: expected an address that 16 divides, found 264"),
        (torch.zeros(8, dtype=torch.float64), r"weight w: expected f32\[8\], found f64\[8\]"),
        (np.zeros(7, np.float32), r"weight w: expected f32\[8\] \(32 bytes\), found float32\[7\]"),
        (np.zeros(32, np.uint8), r"found uint8\[32\]"),
    ],
)
def test_weights_that_do_not_fit(gpu: FakeGpu, tensor: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpu.load(sum_program(gpu.vendor), {"w": tensor})


def test_measure(gpu: FakeGpu) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    executable.run("step", {}, {"x": X})
    assert executable.measure("step", {}, {"x": X}, 3) == [0.25, 0.25, 0.25]
    assert executable.run("step", {}, {"x": X})["n"].tolist() == [5]
    executable.close()


def test_used_from_another_thread(gpu: FakeGpu) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    results: list[Any] = []

    def work() -> None:
        results.append(executable.run("step", {}, {"x": X})["out"])
        executable.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(results[0], expected())


def test_second_device(gpu: FakeGpu) -> None:
    """Everything happens on device 1, and what was current before is so again."""
    gpu.reset(device=1)
    before = gpu.current_device
    driver = gpu.driver(ordinal=1)
    executable = driver.load(sum_program(gpu.vendor), WEIGHTS.__getitem__)
    np.testing.assert_array_equal(executable.run("step", {}, {"x": X})["out"], expected())
    with pytest.raises(ValueError, match="input x"):
        executable.run("step", {}, {"x": X[:3]})
    assert gpu.current_device == before
    executable.close()
    assert gpu.current_device == before


# ---- what it refuses: the caller


@pytest.mark.parametrize(
    ("function", "inputs", "message"),
    [
        ("other", {"x": X}, "no function 'other'; there are step"),
        ("step", {}, r"expected inputs \['x'\], found \[\]"),
        ("step", {"x": X, "y": X}, r"found \['x', 'y'\]"),
        ("step", {"x": X[:4]}, r"input x: expected f32\[8\] .*found float32\[4\]"),
        ("step", {"x": X.astype(np.float64)}, "found float64"),
        ("step", {"x": X.view(np.uint8)}, "found uint8"),
        ("step", {"x": torch.zeros(8, device="meta")}, "expected a tensor on the CPU"),
    ],
)
def test_inputs_that_do_not_fit(
    gpu: FakeGpu, function: str, inputs: dict[str, Any], message: str
) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    with pytest.raises(ValueError, match=message):
        executable.run(function, {}, inputs)
    # It was the caller's mistake: the next call is served.
    np.testing.assert_array_equal(executable.run("step", {}, {"x": X})["out"], expected())
    executable.close()


# ---- what it refuses: the program (test_check_program.py has the rest)


DEVICE_LIMITS = {"hip": (65536, 16), "cuda": (232_448, 32)}  # what the fakes have


@pytest.mark.parametrize("case", ["shared", "num_warps"])
def test_what_the_device_has_not_is_refused(gpu: FakeGpu, case: str) -> None:
    """Before anything is allocated, by the device's name; what just fits is run."""
    shared, warps = DEVICE_LIMITS[gpu.vendor.name]
    most = {"shared": shared, "num_warps": warps}[case]
    program = sum_program(gpu.vendor)
    gpu.load(changed_kernel(program, **{case: most}), WEIGHTS).close()
    allocated = gpu.calls("allocate")
    name = gpu.driver().info.name
    with pytest.raises(ProgramError, match=f"kernel add: .* on {name}: .* found {most + 1}"):
        gpu.load(changed_kernel(program, **{case: most + 1}), WEIGHTS)
    assert gpu.calls("allocate") == allocated


def test_refused_programs_leave_nothing(gpu: FakeGpu) -> None:
    program = with_arg(sum_program(gpu.vendor), 1, view("x", 7, 4))
    where = r"entry only, launch 0 \(s\) of kernel add, argument 1"
    with pytest.raises(ProgramError, match=f"{where}: expected an address that 16 divides"):
        gpu.load(program, WEIGHTS)


def test_promises_about_weights_in_place_are_checked_where_they_lie(gpu: FakeGpu) -> None:
    """Only when everything has its place; nothing stays behind, and the next try finds the same."""
    where = r"entry only, launch 0 \(s\) of kernel add, argument 2, the address of w"
    for _ in range(2):
        with pytest.raises(ProgramError, match=f"{where}: expected an address that 16 divides"):
            gpu.load(sum_program(gpu.vendor), {"w": TensorOnGpu(264)})


def test_strided_slices_run(gpu: FakeGpu) -> None:
    """Rows of a wider matrix: inside, though dense rows of that many would be outside."""
    part = Slice("x", "f32", (2, 2), 0, (4, 1))
    gpu.load(with_arg(sum_program(gpu.vendor), 1, part), WEIGHTS).close()


# ---- what it refuses: the device


def test_device_of_another_architecture(gpu: FakeGpu) -> None:
    gpu.reset(arch={"hip": "gfx950:sramecc+", "cuda": "100"}[gpu.vendor.name])
    found = {"hip": "hip:gfx950", "cuda": "cuda:sm_100"}[gpu.vendor.name]
    assert gpu.vendor.driver.find([gpu.path]) == found
    assert gpu.driver().target == found
    with pytest.raises(
        ValueError, match=f"built for {gpu.vendor.target}, and the device is {found}"
    ):
        gpu.load(sum_program(gpu.vendor), WEIGHTS)


def test_no_such_device(gpu: FakeGpu) -> None:
    with pytest.raises(DeviceError, match="failed with 101"):
        gpu.driver(ordinal=7)


@pytest.mark.parametrize("driver", [HipDriver, CudaDriver])
def test_no_driver(driver: type[HipDriver] | type[CudaDriver]) -> None:
    names = ["libnot-there.so.1", "libnor-here.so"]
    assert driver.find(names) is None
    with pytest.raises(DriverMissingError, match=r"looked for libnot-there.so.1 .*libnor-here.so"):
        driver(0, names)


@pytest.mark.parametrize("driver", [HipDriver, CudaDriver])
def test_library_of_something_else(driver: type[HipDriver] | type[CudaDriver]) -> None:
    assert driver.find(["libm.so.6"]) is None
    with pytest.raises(DriverMissingError, match=r"libm.so.6 lacks \w+Init"):
        driver(0, ["libm.so.6"])


def test_sticky_error_ends_the_executable(gpu: FakeGpu) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    name = gpu.fail("wait_event", 700)
    with pytest.raises(DeviceError) as caught:
        executable.run("step", {}, {"x": X})
    error = caught.value
    assert (error.call, error.code, error.sticky) == (name, 700, True)
    assert "illegal memory access" in error.text
    assert str(error).startswith(f"{name} failed with 700 (")
    assert "restart" in str(error)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"the device failed before: {name} failed with 700"):
            executable.run("step", {}, {"x": X})
    executable.close()
    gpu.reset()


def test_fault_of_a_kernel_is_told(gpu: FakeGpu) -> None:
    """A kernel that reaches past its buffer; the self-test finds it at load."""
    program = one_launch(
        gpu,
        "copy",
        (Slice("y", "u8", (4,)), Slice("y", "u8", (4,)), 1 << 20),
        Buffer("y", "u8", (4,), "output", 4, 0),
    )
    with pytest.raises(DeviceError, match="700.*illegal memory access.*restart"):
        gpu.load(program)
    gpu.reset()


def test_passing_error_ends_the_executable_and_frees(gpu: FakeGpu) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    name = gpu.fail("launch", 1)
    with pytest.raises(DeviceError, match=f"^{name} failed with 1 ") as caught:
        executable.run("step", {}, {"x": X})
    assert not caught.value.sticky
    with pytest.raises(RuntimeError, match="the device failed before"):
        executable.measure("step", {}, {"x": X}, 1)
    # The input's copy is still queued: to free under it would be wrong.
    executable.close()


FAILING = ["allocate", "module", "instantiate", "to_device", "to_host", "launch", "wait"]


@pytest.mark.parametrize("role", FAILING)
@pytest.mark.parametrize("nth", [1, 2])
def test_failed_load_leaves_nothing(gpu: FakeGpu, role: str, nth: int) -> None:
    name = gpu.fail(role, 2, nth)
    program = sum_program(gpu.vendor)
    step = program.functions["step"]
    program = replace(
        program,
        kernels={
            name: replace(kernel, binary=image(gpu.vendor.target, name))
            for name, kernel in program.kernels.items()
        },
        functions={"step": step, "again": step},
    )
    with pytest.raises(DeviceError, match=f"^{name} failed with 2 "):
        gpu.load(program, WEIGHTS)


@pytest.mark.parametrize(("role", "nth"), [("to_host", 2), ("to_device", 3), ("instantiate", 1)])
def test_first_of_many_errors_is_told(gpu: FakeGpu, role: str, nth: int) -> None:
    """After a sticky error everything fails, also giving back: the cause is what is raised."""
    name = gpu.fail(role, 700, nth)
    with pytest.raises(DeviceError, match=f"^{name} failed with 700 "):
        gpu.load(sum_program(gpu.vendor), WEIGHTS)
    gpu.reset()


def test_out_of_memory_says_for_what(gpu: FakeGpu) -> None:
    gpu.fail("allocate", 2, 2)
    with pytest.raises(DeviceError) as caught:
        gpu.load(sum_program(gpu.vendor), WEIGHTS)
    assert "while allocating 1280 bytes for the arena" in caught.value.__notes__[0]


def test_failed_free_is_told(gpu: FakeGpu) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    name = gpu.fail("free", 1)
    with pytest.raises(DeviceError, match=name):
        executable.close()
    assert [line.split()[0] for line in gpu.outstanding] == ["device"]  # the one that failed
    gpu.reset()


def test_missing_symbol(gpu: FakeGpu) -> None:
    program = changed_kernel(sum_program(gpu.vendor), symbol="mul")
    with pytest.raises(DeviceError, match="ModuleGetFunction failed with 500"):
        gpu.load(program, WEIGHTS)


def test_weight_loader_that_fails(gpu: FakeGpu) -> None:
    with pytest.raises(KeyError, match="w"):
        gpu.load(sum_program(gpu.vendor), {})


# ---- the self-test


@pytest.mark.parametrize(("lost", "count"), [(False, "1"), (True, "65536")])
def test_copies_that_go_wrong(gpu: FakeGpu, lost: bool, count: str) -> None:
    gpu.corrupt_copies(lost=lost)
    message = f"of 65536 bytes written to the device {count} came back changed"
    with pytest.raises(SelfTestError, match=message):
        gpu.load(sum_program(gpu.vendor), WEIGHTS)


def test_counters_that_launches_leave(gpu: FakeGpu) -> None:
    program = sum_program(gpu.vendor)
    seen = replace(program.buffers["seen"], kind="counter")
    program = with_step(replace(program, buffers={**program.buffers, "seen": seen}), state=())
    message = "of the 4 bytes of seen, expected to be 0, 1 are not"
    with pytest.raises(SelfTestError, match=message):
        gpu.load(program, WEIGHTS)


def test_replays_that_differ(gpu: FakeGpu) -> None:
    out = Slice("y", "i32", (1,))
    program = one_launch(gpu, "noise", (out,), Buffer("y", "i32", (1,), "output", 4, 0))
    with pytest.raises(
        SelfTestError, match="entry only, replayed twice .* gave output y with 1 of 4"
    ):
        gpu.load(program)


def test_nan_equals_itself(gpu: FakeGpu) -> None:
    """0 · inf: the self-test compares bytes."""
    program = one_launch(
        gpu,
        "axpy",
        (view("y"), view("x"), float("inf"), 8),
        floats("x", "input", 0),
        floats("y", "output", 256),
    )
    executable = gpu.load(program)
    assert np.isnan(executable.run("step", {}, {"x": np.zeros(8, np.float32)})["y"]).all()
    executable.close()


def test_interrupted_run_is_waited_for(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyboardInterrupt before the wait, and before the event that is waited for: later runs must
    not write under its copies."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for of, name in ((GpuExecutable, "results"), (DeviceApi, "record_event")):
        executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
        with monkeypatch.context() as patch:
            patch.setattr(of, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                executable.run("step", {}, {"x": X})
        for turn in (2, 3, 4):
            results = executable.run("step", {}, {"x": X * turn})
            np.testing.assert_array_equal(results["out"], expected(X * turn))
            assert results["n"].tolist() == [turn]  # the interrupted one was done first
        executable.close()


# ---- what only one of them has


def test_hip_keeps_no_error_for_others(built: dict[str, FakeGpu]) -> None:
    """torch asks for the thread's last error after its launches, and would take it for its own."""
    gpu = built["hip"]
    gpu.reset()
    for nth in (1, 2):
        gpu.fail("allocate", 2, nth)
        with pytest.raises(DeviceError, match="hipMalloc failed with 2"):
            gpu.load(sum_program(HIP), WEIGHTS)
        assert gpu.last_error == 0
    assert (gpu.complaints, gpu.outstanding) == ("", [])


def programmatic(vendor: Any, *names: str) -> Program:
    """sum_program, its `add` programmatic; s and out by a kernel that is not."""
    program = sum_program(vendor)
    plain = replace(program.kernels["add"], id="plain")
    program = changed_kernel(program, programmatic=True)
    program = replace(program, kernels={**program.kernels, "plain": plain})
    return with_launch(with_launch(program, 0, kernel="plain"), 3, kernel="plain")


def test_programmatic_edges(built: dict[str, FakeGpu]) -> None:
    gpu = built["cuda"]
    gpu.reset()
    executable = gpu.load(programmatic(CUDA), WEIGHTS)
    gpu.take_launches()
    executable.run("step", {}, {"x": X})
    after = {launch["node"]: launch["after"] for launch in gpu.take_launches()}
    assert after == {0: [], 1: [], 2: [[0, 0], [1, 1]], 3: [[2, 0]], 4: []}
    # Only the node with such edges needs the newer call.
    calls = {
        name: gpu.calls_by_name(name) for name in ("cuGraphAddNode_v2", "cuGraphAddKernelNode_v2")
    }
    assert calls == {"cuGraphAddNode_v2": 1, "cuGraphAddKernelNode_v2": 4}
    executable.close()
    assert (gpu.complaints, gpu.outstanding) == ("", [])


def test_programmatic_edges_on_an_old_driver(tmp_path: Path) -> None:
    gpu = build_fake(CUDA, tmp_path, "-DWITHOUT_ADD_NODE")
    gpu.reset()
    with pytest.raises(DriverMissingError, match=r"lacks cuGraphAddNode_v2.*CUDA 12.3 or later"):
        gpu.load(programmatic(CUDA), WEIGHTS)
    executable = gpu.load(sum_program(CUDA), WEIGHTS)
    np.testing.assert_array_equal(executable.run("step", {}, {"x": X})["out"], expected())
    executable.close()
    assert (gpu.complaints, gpu.outstanding) == ("", [])


def test_old_hip(tmp_path: Path) -> None:
    gpu = build_fake(HIP, tmp_path, "-DOLD")
    gpu.reset()
    assert HipDriver.find([gpu.path]) is None
    with pytest.raises(DriverMissingError, match=r"expected HIP 60400000 \(6.4\) or later"):
        gpu.driver()


def test_programmatic_kernels_on_hip_have_plain_edges(built: dict[str, FakeGpu]) -> None:
    gpu = built["hip"]
    gpu.reset()
    executable = gpu.load(programmatic(HIP), WEIGHTS)
    np.testing.assert_array_equal(executable.run("step", {}, {"x": X})["out"], expected())
    executable.close()
    assert (gpu.complaints, gpu.outstanding) == ("", [])


# Of shared memory, and of how a multiprocessor divides its own.
@pytest.mark.parametrize(("nbytes", "asked"), [(48 << 10, 0), (100 << 10, 2)])
def test_much_shared_memory_is_asked_for(
    built: dict[str, FakeGpu], nbytes: int, asked: int
) -> None:
    gpu = built["cuda"]
    gpu.reset()
    executable = gpu.load(changed_kernel(sum_program(CUDA), shared=nbytes), WEIGHTS)
    assert gpu.calls_by_name("cuFuncSetAttribute") == asked
    assert {launch["shared"] for launch in gpu.take_launches()} == {0, nbytes}
    executable.close()
    assert (gpu.complaints, gpu.outstanding) == ("", [])


def test_kernels_of_one_binary_have_the_most_shared_memory_of_all(
    built: dict[str, FakeGpu],
) -> None:
    gpu = built["cuda"]
    gpu.reset()
    program = sum_program(CUDA)
    much, less = (replace(program.kernels["add"], shared=n << 10) for n in (100, 60))
    program = replace(
        program, kernels={**program.kernels, "add": much, "less": replace(less, id="less")}
    )
    executable = gpu.load(with_launch(program, 1, kernel="less"), WEIGHTS)
    np.testing.assert_array_equal(executable.run("step", {}, {"x": X})["out"], expected())
    assert {launch["shared"] for launch in gpu.take_launches()} == {0, 60 << 10, 100 << 10}
    executable.close()
    assert (gpu.complaints, gpu.outstanding) == ("", [])
