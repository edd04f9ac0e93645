"""A whole model on drivers that have no GPU: the real compiler's code, loaded, replayed, served.

The fakes know no kernel of it, so nothing is computed; but they read what each kernel takes from
its code, and hold every launch to it. Here every replay is held to the program besides.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ingot
import pytest
from fake_gpu import CUDA, HIP, FakeGpu, build_fake
from ingot.frontends.loading import LoadedModel
from ingot.runtime.artifact.reader import open_ingot
from ingot.runtime.devices.check_program import byte_range
from ingot.runtime.devices.cuda import CudaApi
from ingot.runtime.devices.device_api import DeviceApi, DeviceError
from ingot.runtime.devices.gpu_memory import GpuMemory
from ingot.runtime.devices.graph_executable import GpuExecutable
from ingot.runtime.devices.hip import HipApi
from ingot.runtime.program import Buffer, Entry, Launch, Program, Slice
from msgspec.structs import replace
from programs import with_entries

PICO = Path(__file__).parents[2] / "examples" / "pico"
NEW_TOKENS = 6
FIRST_TOKEN = 1000


@dataclass
class Compiled:
    """An ingot of pico, the program in it, and a fake driver of its target."""

    path: Path
    program: Program
    gpu: FakeGpu
    arch: str

    def load(self) -> LoadedModel:
        model = ingot.load(self.path, driver=self.gpu.driver())
        assert isinstance(model, LoadedModel)
        return model


CASES = {
    "hip:gfx942": (HIP, "gfx942:sramecc+:xnack-", None),
    "hip:gfx950": (HIP, "gfx950:sramecc+:xnack-", "mxfp4"),
    "cuda:sm_90": (CUDA, "90", "mxfp4"),
}


@pytest.fixture(
    scope="module",
    params=[
        "hip:gfx942",
        pytest.param("hip:gfx950", marks=pytest.mark.slow),
        pytest.param("cuda:sm_90", marks=pytest.mark.slow),
    ],
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    vendor, arch, quantize = CASES[request.param]
    folder = tmp_path_factory.mktemp("pico")
    options: dict[str, Any] = {"max_sequences": 2, "max_tokens_per_sequence": 64}
    path = folder / "pico.ingot"
    ingot.compile_to(PICO, path, target=request.param, quantize=quantize, progress=False, **options)
    program = open_ingot(path).program
    assert program is not None
    return Compiled(path, program, build_fake(vendor, folder), arch)


@pytest.fixture
def pico(compiled: Compiled) -> Iterator[Compiled]:
    """On a device with nothing on it; it must have nothing to complain about, and nothing left."""
    compiled.gpu.reset(compiled.arch)
    yield compiled
    assert compiled.gpu.complaints == ""
    assert compiled.gpu.outstanding == []


# ---- replays against the program


def check_replays(program: Program, launches: Sequence[dict[str, Any]]) -> list[str]:
    """Hold what ran to what was planned; the names of the entries that were replayed, in order.

    Every launch once, after what it depends on, with the planned edges, grid, threads, numbers and
    addresses: each buffer has one address, and from each slice to the end of its memory there is
    room for it.
    """
    warp = CUDA.warp if program.target.startswith("cuda") else HIP.warp
    addresses: dict[str, int] = {}
    entries: list[str] = []
    left = list(launches)
    while left:
        graph = left[0]["graph"]
        entry = program.entries[graph]
        ran, left = left[: len(entry.launches)], left[len(entry.launches) :]
        entries.append(entry.name)
        assert [one["graph"] for one in ran] == [graph] * len(entry.launches), entry.name
        order = {one["node"]: place for place, one in enumerate(ran)}
        assert sorted(order) == list(range(len(entry.launches))), entry.name
        edges = {(earlier, node) for node in order for earlier, _ in ran[order[node]]["after"]}
        assert edges == set(entry.dependencies), entry.name
        assert all(order[earlier] < order[later] for earlier, later in edges), entry.name
        for one in ran:
            check_launch(program, entry, one, warp, addresses)
    return entries


def check_launch(
    program: Program, entry: Entry, ran: dict[str, Any], warp: int, addresses: dict[str, int]
) -> None:
    launch = entry.launches[ran["node"]]
    kernel = program.kernels[launch.kernel]
    where = f"{entry.name}, launch {ran['node']} of {kernel.symbol}"
    assert ran["kernel"] == kernel.symbol, where
    assert tuple(ran["grid"]) == launch.grid, where
    assert (ran["threads"], ran["shared"]) == (kernel.num_warps * warp, kernel.shared), where
    assert len(ran["params"]) == len(launch.args), where
    early = CUDA.name in program.target and kernel.programmatic
    for earlier, programmatic in ran["after"]:
        before = program.kernels[entry.launches[earlier].kernel]
        assert programmatic == (early and before.programmatic), where
    buffers = {**program.buffers, **{buffer.name: buffer for buffer in entry.buffers}}
    for taken, value, word, room in zip(
        kernel.args, launch.args, ran["params"], ran["room"], strict=True
    ):
        if not isinstance(value, Slice):
            assert word == bits_of(taken.kind, value), where
            continue
        # What has an offset lies in the arena, which is one memory.
        buffer = buffers[value.buffer]
        home, start = ("", buffer.offset) if buffer.offset is not None else (buffer.name, 0)
        base = word - start - value.offset
        assert addresses.setdefault(home, base) == base, f"{where}: {value.buffer}"
        assert byte_range(value)[1] - value.offset <= room, f"{where}: {value.buffer}"


def bits_of(kind: str, value: float) -> int:
    """A number as the bytes that a kernel gets, read as one word."""
    form = {"i32": "<i", "i64": "<q", "f32": "<f"}[kind]
    return int.from_bytes(struct.pack(form, value), "little")


def token_parameter(program: Program) -> tuple[str, int]:
    """The kernel that chooses tokens, and which of its parameters they are written to."""
    (found,) = {
        (program.kernels[launch.kernel].symbol, place)
        for entry in program.entries
        for launch in entry.launches
        for place, value in enumerate(launch.args)
        if isinstance(value, Slice) and value.buffer == "token"
        if program.kernels[launch.kernel].symbol != "feed_kernel"  # which reads them
    }
    return found


# ---- serving


def test_pico_is_loaded_replayed_and_served(pico: Compiled) -> None:
    gpu, program = pico.gpu, pico.program
    with pico.load() as model:
        # The self-test has replayed the smallest entry, and everything that there is was made.
        assert check_replays(program, gpu.take_launches()) == ["T=1,L=1"] * 2
        made, allocated = gpu.outstanding, gpu.calls("allocate")
        assert gpu.calls("instantiate") == len(program.entries) == 7
        gpu.answer(*token_parameter(program), FIRST_TOKEN)

        gpu.take_order()
        first = model.generate("def main(", max_new_tokens=NEW_TOKENS)
        # A step is waited for when the next is queued; those that feed themselves copy nothing.
        order = [role for role in gpu.take_order() if role in ("to_device", "launch", "wait_event")]
        copied = ["to_device", "launch"]
        assert order == [
            *(*copied, "wait_event"),
            *(*copied, *["launch", "wait_event"] * (NEW_TOKENS - 2), "wait_event"),
        ]
        assert first.tokens == tuple(range(FIRST_TOKEN, FIRST_TOKEN + NEW_TOKENS))
        assert model.tokenizer and first.text == model.tokenizer.decode(first.tokens)
        replayed = check_replays(program, gpu.take_launches())
        assert replayed == ["T=4,L=2"] + ["T=1,L=1"] * (NEW_TOKENS - 1)

        # Three for two slots, long and short, one of them drawn: prefill and decoding in one batch.
        prompts = ["class Stack:\n" * 4, "import os\n", "x = 1"]
        sampled = {"temperature": 0.8, "top_k": 10, "top_p": 0.9, "min_p": 0.01, "seed": 7}
        for options in ({}, sampled):
            found = model.generate(prompts, max_new_tokens=NEW_TOKENS, logprobs=3, **options)
            for completion in found:
                start = completion.tokens[0]
                assert completion.tokens == tuple(range(start, start + NEW_TOKENS))
                assert completion.finish_reason == "length"
            replayed = check_replays(program, gpu.take_launches())
            assert "T=2,L=2" in replayed and len(set(replayed)) > 2
        # Every bucket has its turn, and logits come to the host.
        for size in (1, 2, 3, 8, 9, 17, 60):
            assert len(model.generate([7] * size, max_new_tokens=1).tokens) == 1
        replayed = check_replays(program, gpu.take_launches())
        assert replayed == [entry.name for entry in program.entries]
        assert model.logits([5] * 9).shape == (9, program.meta["vocab_size"])
        assert set(check_replays(program, gpu.take_launches())) == {"T=1,L=1", "T=2,L=2"}
        # Nothing was made or given back since it was loaded.
        assert (gpu.outstanding, gpu.calls("allocate")) == (made, allocated)


def test_modules_are_the_programs(pico: Compiled) -> None:
    """One module for each piece of code, one executable graph for each entry."""
    with pico.load():
        kinds = [line.split()[0] for line in pico.gpu.outstanding]
        binaries = {kernel.binary for kernel in pico.program.kernels.values()}
        assert kinds.count("module") == len(binaries)
        assert kinds.count("executable") == len(pico.program.entries)
        assert kinds.count("graph") == 0
        owned = sum(b.kind in ("weight", "state", "counter") for b in pico.program.buffers.values())
        assert kinds.count("device") == owned + 1  # and the arena


# ---- broken on purpose


@dataclass(frozen=True)
class Mutation:
    """A rule that the runtime breaks, and what the fake says of it."""

    apply: Callable[[pytest.MonkeyPatch], None]
    complaint: str


def without_a_parameter(patch: pytest.MonkeyPatch) -> None:
    node = GpuExecutable._node

    def broken(*args: Any) -> Any:
        made = node(*args)
        return dataclasses.replace(made, params=made.params[1:])

    patch.setattr(GpuExecutable, "_node", broken)


def with_one_more_parameter(patch: pytest.MonkeyPatch) -> None:
    node = GpuExecutable._node

    def broken(*args: Any) -> Any:
        made = node(*args)
        return dataclasses.replace(
            made, params=(*made.params[:-2], ctypes.c_void_p(8), *made.params[-2:])
        )

    patch.setattr(GpuExecutable, "_node", broken)


def with_twice_the_threads(patch: pytest.MonkeyPatch) -> None:
    node = GpuExecutable._node

    def broken(*args: Any) -> Any:
        made = node(*args)
        return dataclasses.replace(
            made, threads=made.threads // 2 * 4 if made.threads < 512 else 64
        )

    patch.setattr(GpuExecutable, "_node", broken)


def outside_of_its_memory(patch: pytest.MonkeyPatch) -> None:
    address_of = GpuMemory.address_of

    def broken(memory: GpuMemory, buffer: Buffer) -> int:
        return address_of(memory, buffer) + (buffer.nbytes if buffer.kind == "weight" else 0)

    patch.setattr(GpuMemory, "address_of", broken)


def without_waiting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GpuExecutable, "_settle", lambda _executable: None)


def with_an_allocation_a_run(patch: pytest.MonkeyPatch) -> None:
    replay = GpuExecutable._replay

    def broken(executable: GpuExecutable, *args: Any) -> None:
        replay(executable, *args)
        executable._owned.callback(executable._api.free, executable._api.allocate(64))

    patch.setattr(GpuExecutable, "_replay", broken)


MUTATIONS = {
    "a parameter too few": Mutation(without_a_parameter, "where no device memory is"),
    "a parameter too many": Mutation(with_one_more_parameter, r"parameter \d+ of \w+ is not null"),
    "other threads": Mutation(with_twice_the_threads, r"threads for \w+, which was built for"),
    "an address outside": Mutation(outside_of_its_memory, "where no device memory is"),
    "no wait": Mutation(without_waiting, "work is still queued"),
    "memory after load": Mutation(with_an_allocation_a_run, "made after the first launch"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_runtime_is_seen(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    gpu, mutation = compiled.gpu, MUTATIONS[name]
    gpu.reset(compiled.arch)
    with monkeypatch.context() as patch:
        mutation.apply(patch)
        with pytest.raises(DeviceError):
            compiled.load().close()
    assert re.search(mutation.complaint, gpu.complaints), gpu.complaints
    gpu.reset(compiled.arch)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["cuda:sm_90"], indirect=True)
def test_much_shared_memory_must_be_asked_for(
    pico: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NVIDIA only: on AMD a launch may use all of a block's LDS."""
    assert any(kernel.shared > 48 << 10 for kernel in pico.program.kernels.values())
    with monkeypatch.context() as patch:
        patch.setattr(CudaApi, "allow_shared", lambda *_: None)
        with pytest.raises(DeviceError):
            pico.load()
    assert "bytes of shared memory, allowed 49152" in pico.gpu.complaints
    pico.gpu.reset(pico.arch)


@pytest.mark.parametrize("what", ["an edge", "a place"])
def test_what_only_the_program_tells_is_seen(
    pico: Compiled, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """An edge that is left out, or a buffer at another place of its memory, breaks no rule of a
    driver's: the comparison with the program must tell.
    """
    api: type[DeviceApi] = CudaApi if pico.gpu.vendor is CUDA else HipApi
    add, address_of = api.add_kernel_node, GpuMemory.address_of

    def without_an_edge(self: Any, graph: int, node: Any, edges: Sequence[Any]) -> int:
        return add(self, graph, node, edges[1:] if len(edges) > 1 else edges)

    def moved(memory: GpuMemory, buffer: Buffer) -> int:
        return address_of(memory, buffer) + (256 if buffer.name == "logits" else 0)

    with monkeypatch.context() as patch:
        if what == "an edge":
            patch.setattr(api, "add_kernel_node", without_an_edge)
        else:
            patch.setattr(GpuMemory, "address_of", moved)
        with pico.load():
            launches = pico.gpu.take_launches()
    with pytest.raises(AssertionError, match="T=1,L=1"):
        check_replays(pico.program, launches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbol": "nothing_of_the_kind"}, "ModuleGetFunction failed with 500"),
        ({"args": 1}, "where no device memory is"),
    ],
)
def test_a_program_that_does_not_fit_its_code_is_refused(
    pico: Compiled, change: dict[str, Any], message: str
) -> None:
    """The first kernel by another name, or said to take one argument less, which is not given."""
    kernel = pico.program.kernels[pico.program.entries[0].launches[0].kernel]
    if "args" in change:
        change = {"args": kernel.args[1:]}
    kernels = {**pico.program.kernels, kernel.id: replace(kernel, **change)}

    def fitting(launch: Launch) -> Launch:
        return replace(launch, args=launch.args[-len(kernels[launch.kernel].args) :])

    entries = tuple(
        replace(entry, launches=tuple(map(fitting, entry.launches)))
        for entry in pico.program.entries
    )
    weights = open_ingot(pico.path).weights(pico.program.buffers)
    program = replace(with_entries(pico.program, entries), kernels=kernels)
    with pytest.raises(DeviceError) as caught:
        pico.gpu.driver().load(program, weights)
    assert message in f"{caught.value}\n{pico.gpu.complaints}"
    pico.gpu.reset(pico.arch)
