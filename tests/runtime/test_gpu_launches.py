"""Launches one behind another on fake drivers: what the host waits for, and what feeds itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_gpu import CUDA, HIP, WEIGHTS, FakeGpu, build_fake, floats, kernel, sum_program, view
from ingot.runtime.devices.device_api import DeviceApi
from ingot.runtime.driver import LAUNCHES, DeviceFailedError
from ingot.runtime.program import Buffer, Entry, Launch, Program, Slice
from msgspec.structs import replace
from programs import program_of, with_step

X = np.arange(8, dtype=np.float32)  # sums are exact
W = WEIGHTS["w"]


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


def fed_program(gpu: FakeGpu) -> Program:
    """out = x + by, n counted state; x is out the next time, and `by` and `other` stay."""
    launches = (
        Launch("add", (view("out"), view("x"), view("by"), 8), label="out"),
        Launch("copy", (Slice("x", "u8", (32,)), Slice("out", "u8", (32,)), 32), label="x"),
        Launch("count", (Slice("seen", "i32", (1,)), Slice("n", "i32", (1,))), label="count"),
    )
    buffers = (
        floats("x", "input", 0),
        floats("other", "input", 256, 64),  # all of the gap between its neighbours
        floats("by", "input", 512),
        floats("out", "output", 768),
        Buffer("n", "i32", (1,), "output", 4, 1024),
    )
    program = program_of(
        target=gpu.vendor.target,
        kernels={name: kernel(gpu.vendor, name) for name in ("add", "copy", "count")},
        buffers={"seen": Buffer("seen", "i32", (1,), "state", 4)},
        entry=Entry({}, buffers, launches, ((0, 1),)),
        arena_bytes=1280,
    )
    return with_step(program, fed=("x",))


INPUTS = {"x": X, "other": np.zeros(64, np.float32), "by": W}


def test_a_launch_waits_for_nothing(gpu: FakeGpu) -> None:
    """The host waits for a run after it has launched the next, and its outputs are its own."""
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    runs = [executable.launch("step", {}, {"x": X})]
    gpu.take_order()
    for turn in range(1, 9):
        runs.append(executable.launch("step", {}, {"x": X + turn}))
        found = runs[turn - 1].wait()
        assert found["n"].tolist() == [turn]
        np.testing.assert_array_equal(found["out"], 4 * (X + turn - 1) + 2 * W)
    order = [role for role in gpu.take_order() if role in ("launch", "wait", "wait_event")]
    assert order == ["launch", "wait_event"] * 8
    executable.close()


def test_a_launch_too_many_waits_for_the_first(gpu: FakeGpu) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    runs = [executable.launch("step", {}, {"x": X + i}) for i in range(LAUNCHES)]
    gpu.take_order()
    last = executable.launch("step", {}, {"x": X})
    assert [r for r in gpu.take_order() if r in ("launch", "wait_event")] == [
        "wait_event",
        "launch",
    ]
    with pytest.raises(RuntimeError, match="expected to be asked for outputs before 2 more"):
        runs[0].wait()
    assert [run.wait()["n"].tolist() for run in (runs[1], last, last)] == [[2], [3], [3]]
    executable.close()


def test_what_is_left_out_is_what_the_last_run_left(gpu: FakeGpu) -> None:
    executable = gpu.load(fed_program(gpu))
    value = X
    executable.launch("step", {}, INPUTS)
    for turn, given in enumerate(({}, {}, {"by": 3 * W}, {}, {"x": -X}, {"x": X, "by": W}), 2):
        run = executable.launch("step", {}, given)
        value = (value if turn > 2 else X + W) if "x" not in given else given["x"]
        value = value + (W if turn in (2, 3, 7) else 3 * W)
        found = run.wait()
        np.testing.assert_array_equal(found["out"], value)
        assert found["n"].tolist() == [turn]
    executable.close()


def test_partial_inputs_leave_their_neighbours_alone(gpu: FakeGpu) -> None:
    """x and by are one copy together with what lies between, but not without it."""
    executable = gpu.load(fed_program(gpu))
    copies = gpu.calls("to_device")
    executable.run("step", {}, INPUTS)
    assert gpu.calls("to_device") == copies + 1
    executable.run("step", {}, {"x": X, "by": W})
    assert gpu.calls("to_device") == copies + 3
    executable.close()


def test_nothing_is_left_after_something_else(gpu: FakeGpu) -> None:
    program = fed_program(gpu)
    step = program.functions["step"]
    executable = gpu.load(replace(program, functions={"step": step, "again": step}))
    message = "since another replay came before, found \\['by'\\]"

    def refused() -> None:
        with pytest.raises(ValueError, match="input x"):
            executable.run("step", {}, {"x": X[:3]})

    others: Any = [
        lambda: executable.run("again", {}, INPUTS),
        lambda: executable.measure("step", {}, INPUTS, 1),
        refused,
    ]
    with pytest.raises(ValueError, match=message):
        executable.run("step", {}, {"by": W})
    for other in others:
        executable.run("step", {}, INPUTS)
        other()
        with pytest.raises(ValueError, match=message):
            executable.run("step", {}, {"by": W})
    executable.run("again", {}, INPUTS)
    np.testing.assert_array_equal(executable.run("again", {}, {})["out"], X + 2 * W)
    executable.close()


def test_only_a_function_that_feeds_itself_may_leave_out(gpu: FakeGpu) -> None:
    executable = gpu.load(with_step(fed_program(gpu), fed=()))
    executable.run("step", {}, INPUTS)
    with pytest.raises(ValueError, match=r"expected inputs \['by', 'other', 'x'\], found \['x'\]"):
        executable.run("step", {}, {"x": X})
    executable.close()


def test_an_interrupted_launch_leaves_nothing(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run may have happened or not: the next one must be given everything."""
    executable = gpu.load(fed_program(gpu))
    executable.run("step", {}, INPUTS)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DeviceApi, "record_event", interrupt)
        with pytest.raises(KeyboardInterrupt):
            executable.launch("step", {}, {})
    with pytest.raises(ValueError, match="since another replay came before"):
        executable.launch("step", {}, {})
    np.testing.assert_array_equal(executable.run("step", {}, INPUTS)["out"], X + W)
    executable.close()


def test_a_closed_executable_gives_nothing(gpu: FakeGpu) -> None:
    executable = gpu.load(sum_program(gpu.vendor), WEIGHTS)
    run = executable.launch("step", {}, {"x": X})
    executable.close()
    with pytest.raises(DeviceFailedError, match="this executable was closed"):
        run.wait()


def test_measuring_starts_from_the_same_inputs(gpu: FakeGpu) -> None:
    """What a replay feeds to itself does not move on: positions stay within their tables."""
    executable = gpu.load(fed_program(gpu))
    copies = gpu.calls("to_device")
    assert executable.measure("step", {}, INPUTS, 5) == [0.25] * 5
    assert gpu.calls("to_device") == copies + 5
    run = executable.launch("step", {}, INPUTS)
    executable.measure("step", {}, INPUTS, 1)
    with pytest.raises(RuntimeError, match="before 2 more launches"):
        run.wait()
    executable.close()
