"""What a GPU program must hold to before any of it is given to a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import tiny_ingot
import torch
from fake_elf import code_for
from ingot.codegen.lower import lower
from ingot.compiler import target as targets
from ingot.compiler.pipeline import run_pipeline
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.pipelines import causal_lm
from ingot.runtime.devices.check_program import (
    ProgramError,
    byte_range,
    check_address,
    check_program,
    launch_place,
)
from ingot.runtime.devices.device_api import DeviceInfo
from ingot.runtime.program import Argument, Buffer, Program, Slice, Spec
from interpreted import InterpretedBackend
from msgspec.structs import replace
from pass_checks import for_target
from programs import with_entries, with_step
from tiny_ingot import GFX950, program
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("shared_traces")


def with_buffer(name: str, **changes: Any) -> Callable[[Program], Program]:
    def change(made: Program) -> Program:
        changed = replace(made.buffers[name], **changes)
        return replace(made, buffers={**made.buffers, name: changed})

    return change


def with_kernel(name: str, **changes: Any) -> Callable[[Program], Program]:
    def change(made: Program) -> Program:
        changed = replace(made.kernels[name], **changes)
        return replace(made, kernels={**made.kernels, name: changed})

    return change


def with_entry(**changes: Any) -> Callable[[Program], Program]:
    def change(made: Program) -> Program:
        return with_entries(made, (replace(made.entries[0], **changes), *made.entries[1:]))

    return change


def with_local(index: int, **changes: Any) -> Callable[[Program], Program]:
    def change(made: Program) -> Program:
        local = list(made.entries[0].buffers)
        local[index] = replace(local[index], **changes)
        return with_entry(buffers=tuple(local))(made)

    return change


def with_launch(**changes: Any) -> Callable[[Program], Program]:
    def change(made: Program) -> Program:
        first, *rest = made.entries[0].launches
        return with_entry(launches=(replace(first, **changes), *rest))(made)

    return change


def with_counters(*bytes_of: tuple[int, int], ordered: bool = True) -> Callable[[Program], Program]:
    """The first pointer of each launch is to counters: from a byte on, so many bytes."""

    def change(made: Program) -> Program:
        held = Buffer("%counters", "i32", (4,), "counter", 16)
        made = replace(made, buffers={**made.buffers, held.name: held})
        for i, (start, nbytes) in enumerate(bytes_of):
            kernel = made.kernels[made.entries[0].launches[i].kernel]
            at = next(j for j, a in enumerate(kernel.args) if a.kind.startswith("*"))
            args = (*kernel.args[:at], Argument("*i32"), *kernel.args[at + 1 :])
            made = with_kernel(kernel.id, args=args)(made)
            counters = Slice(held.name, "i32", (nbytes // 4,), start)
            launches = [*made.entries[0].launches]
            launch = launches[i]
            launches[i] = replace(
                launch, args=(*launch.args[:at], counters, *launch.args[at + 1 :])
            )
            made = with_entries(made, [replace(made.entries[0], launches=tuple(launches))])
            made = with_step(made, symbols={n: (v, v) for n, v in made.entries[0].symbols.items()})
        return made if ordered else with_entry(dependencies=())(made)

    return change


def with_arg(index: int, arg: Any, launch: int = 0) -> Callable[[Program], Program]:
    """Argument `index` of a launch is another; a dict changes the slice that is there."""

    def change(made: Program) -> Program:
        found = list(made.entries[0].launches)
        args = list(found[launch].args)
        given = args[index]
        args[index] = replace(given, **arg) if isinstance(arg, dict) else arg  # pyright: ignore
        found[launch] = replace(found[launch], args=tuple(args))
        return with_entry(launches=tuple(found))(made)

    return change


def with_changes(**changes: Any) -> Callable[[Program], Program]:
    return lambda made: replace(made, **changes)


BROKEN: dict[str, tuple[Callable[[Program], Program], str]] = {
    "target": (with_changes(target="cuda:sm_70"), "expected one of cuda:sm_90"),
    "cpu": (with_changes(target="cpu"), "found cpu"),
    "arena": (with_changes(arena_bytes=-1), "arena_bytes: expected an integer from 0"),
    "arena too small": (
        with_changes(arena_bytes=4096),
        "within the arena of 4096 bytes, found 4352",
    ),
    "no functions": (with_changes(functions={}), "functions: expected at least one"),
    "no entries": (lambda p: with_entries(p, ()), "function step: expected at least one entry"),
    "entries alike": (
        lambda p: with_entries(p, p.entries[:1] * 2),
        "expected each entry once, found {'L': 1, 'T': 1} twice",
    ),
    "an entry outside the range": (
        lambda p: with_step(p, symbols={"T": (2, 4), "L": (1, 2)}),
        "entry T=1,L=1: symbol T: expected an integer from 2 to 4, found 1",
    ),
    "an entry of other symbols": (
        lambda p: with_step(p, symbols={"T": (1, 4)}),
        "expected entries for ['T'], found one for ['L', 'T']",
    ),
    "a range that is none": (
        lambda p: with_step(p, symbols={"T": (1, 4), "L": (2, 1)}),
        "last L: expected an integer from 2",
    ),
    "an input too few": (
        lambda p: with_step(p, inputs={}),
        "entry T=1,L=1: expected inputs [], found",
    ),
    "an output of another type": (
        lambda p: with_step(p, outputs={"logits": Spec("f32", ("T", tiny_ingot.VOCAB))}),
        "entry T=4,L=2, buffer logits: expected f32[T, 64], found f32[2, 64]",
    ),
    "what is fed is no input": (
        lambda p: with_step(p, fed=("tokens", "logits")),
        "function step: expected to feed inputs, found 'logits'",
    ),
    "scratch where an input stays": (
        lambda p: with_step(with_local(5, offset=1024)(p), fed=("tokens",)),
        "buffer %0.0: expected memory that a fed entry's inputs have alone, found logit_rows at",
    ),
    "an input where another stays": (
        lambda p: with_step(with_local(1, offset=0)(p), fed=("tokens",)),
        "expected memory that a fed entry's inputs have alone",
    ),
    "state that is none": (
        lambda p: with_step(p, state=("@codes",)),
        "function step: expected state of the program, found '@codes'",
    ),
    "state of no function": (
        lambda p: with_step(p, state=()),
        "expected a buffer of this entry, found 'cache.0'",
    ),
    "kernel under another id": (
        lambda p: replace(p, kernels={"x": p.kernels["head"]}),
        "found head",
    ),
    "symbol": (with_kernel("head", symbol="a b"), "expected the name of a function"),
    "python": (with_kernel("head", binary=print), "expected device code, found a builtin"),
    "no ELF": (
        with_kernel("head", binary=b"MZ" * 50),
        "expected code for cuda:sm_90, found no ELF file",
    ),
    "another GPU": (with_kernel("head", binary=GFX950), "found hip:gfx950"),
    "another SM": (with_kernel("head", binary=code_for("cuda:sm_100")), "found cuda:sm_100"),
    "warps": (
        with_kernel("head", num_warps=33),
        "warps on cuda:sm_90: expected an integer from 1 to 32, found 33",
    ),
    "no warps": (with_kernel("head", num_warps=0), "from 1 to 32, found 0"),
    "shared": (
        with_kernel("head", shared=232_449),
        "bytes shared on cuda:sm_90: expected an integer from 0 to 232448",
    ),
    "argument kind": (
        with_kernel("head", args=(Argument("f64"),)),
        "expected *dtype, i32, i64 or f32",
    ),
    "pointer kind": (with_kernel("head", args=(Argument("*fp32"),)), "found '*fp32'"),
    "promise": (with_kernel("head", args=(Argument("i32", 512),)), "multiple: expected"),
    "promise of a float": (
        with_kernel("head", args=(Argument("f32", 2),)),
        "no multiple of an f32",
    ),
    "buffer under another name": (
        lambda p: replace(p, buffers={"x": p.buffers["@codes"]}),
        "@codes",
    ),
    "weight in the arena": (
        with_buffer("@codes", offset=0),
        "without an offset, found weight at 0",
    ),
    "scratch outside": (with_buffer("@codes", kind="scratch"), "found scratch"),
    "dtype": (with_buffer("@codes", dtype="f7"), "found 'f7'"),
    "bytes": (with_buffer("@codes", nbytes=255), "expected 256 bytes for u8[32, 8], found 255"),
    "negative dim": (with_buffer("@codes", shape=(-32, -8)), "dim: expected an integer from 0"),
    "dims that overflow": (with_buffer("@codes", shape=(2**40,) * 4), "elements: expected"),
    "dims without end": (with_buffer("@codes", shape=(1,) * 17), "at most 16 dims, found 17"),
    "local name twice": (with_local(0, name="slots"), "expected a name of its own"),
    "local like a weight": (with_local(0, name="@codes"), "expected a name of its own"),
    "local state": (with_local(0, kind="state"), "expected input, output or scratch, found state"),
    "local without a place": (with_local(0, offset=None), "expected an offset in the arena"),
    "local before the arena": (with_local(0, offset=-4), "offset: expected an integer from 0"),
    "local beyond the arena": (with_local(0, offset=8190), "arena of 8192 bytes, found 8194"),
    "an output that the host cannot read": (
        with_local(6, dtype="f8e4m3", nbytes=64),
        "found f8e4m3",
    ),
    "symbols": (with_entry(symbols={"T": -1, "L": 1}), "symbol T: expected"),
    "unknown kernel": (
        with_launch(kernel="gone"),
        "entry T=1,L=1, launch 0 (e) of kernel gone: expected a kernel of the program",
    ),
    "grid": (
        with_launch(grid=(1, 65536, 1)),
        "grid y on cuda:sm_90: expected an integer from 1 to",
    ),
    "empty grid": (with_launch(grid=(0, 1, 1)), "grid x on cuda:sm_90: expected an integer from 1"),
    "grid of two": (with_launch(grid=(1, 1)), "expected a grid of 3, found 2"),
    "too few arguments": (with_launch(args=()), "expected 4 arguments, found 0"),
    "number for a pointer": (with_arg(0, 7), "expected *i32, found the number 7"),
    "pointer for a number": (
        with_arg(3, Slice("tokens", "i32", (1,))),
        "expected i32, found a slice",
    ),
    "float for an integer": (with_arg(3, 16.0), "expected an integer for i32, found 16.0"),
    "truth for a float": (with_arg(3, True, launch=1), "expected a number for f32, found True"),
    "truth": (with_arg(3, True), "expected an integer from"),
    "integer too wide for a float": (with_arg(3, 2**63, launch=1), "found 9223372036854775808"),
    "slice for a float": (
        with_arg(3, Slice("tokens", "i32", (1,)), launch=1),
        "launch 1 (linear model.lm_head) of kernel head_kernel, argument 3: expected f32",
    ),
    "integer too wide": (with_arg(3, 2**31), "expected an integer from -2147483648"),
    "broken promise": (with_arg(3, 8), "expected a multiple of 16, found 8"),
    "slice of another dtype": (
        with_arg(0, {"dtype": "i64"}),
        "expected *i32, found a slice of i64",
    ),
    "slice of nothing": (
        with_arg(0, {"buffer": "gone"}),
        "expected a buffer of this entry, found 'gone'",
    ),
    "slice too long": (with_arg(0, {"shape": (2,)}), "within the 4 bytes of tokens, found 0 to 8"),
    "slice too far": (with_arg(0, {"offset": 4}), "within the 4 bytes of tokens, found 4 to 8"),
    "slice before": (with_arg(0, {"offset": -4}), "offset: expected an integer from 0"),
    "slice that overflows": (with_arg(0, {"shape": (2**47, 2**47)}), "elements: expected"),
    "stride too long": (with_arg(2, {"strides": (2**40, 65)}), "within the 256 bytes of %0.0"),
    "stride backwards": (with_arg(2, {"shape": (2, 1), "strides": (-1, 1)}), "found -4 to 4"),
    "strides missing": (with_arg(2, {"strides": (1,)}), "expected 2 strides, found 1"),
    "misaligned": (with_arg(1, {"offset": 8, "shape": (1,)}), "that 16 divides, found 8"),
    "misaligned element": (
        with_arg(2, {"offset": 2, "shape": (1,), "strides": (1,)}),
        "that 4 divides",
    ),
    "counters of two launches": (
        with_counters((0, 8), (0, 8), ordered=False),
        "launch 1 (linear model.lm_head) of kernel head_kernel: expected counters of its own",
    ),
    "counters of two launches in part": (
        with_counters((0, 8), (4, 8)),
        "found bytes 0 to 8 of %counters, and another's from 4",
    ),
    "counters outside": (with_counters((0, 8), (8, 12)), "within the 16 bytes of %counters"),
    "counters in the arena": (
        with_local(0, kind="counter"),
        "expected input, output or scratch, found counter",
    ),
    "dependency backwards": (with_entry(dependencies=((1, 0),)), "found [1, 0]"),
    "dependency on itself": (with_entry(dependencies=((0, 0),)), "found [0, 0]"),
    "dependency beyond": (with_entry(dependencies=((0, 2),)), "of 2 launches, found [0, 2]"),
    "dependency twice": (
        with_entry(dependencies=((0, 1), (0, 1))),
        "expected each dependency once",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_program_is_refused(case: str) -> None:
    change, expected = BROKEN[case]
    with pytest.raises(ProgramError) as caught:
        check_program(change(program()))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_launches_with_counters_of_their_own_are_accepted() -> None:
    check_program(with_counters((0, 8), (8, 8))(program()))
    check_program(with_counters((0, 8), (8, 8), ordered=False)(program()))
    check_program(with_counters((0, 8), (0, 8))(program()))


def test_hip_counts_threads() -> None:
    broken = with_launch(grid=(2**25, 1, 1))(program("hip:gfx950", GFX950))
    with pytest.raises(ProgramError, match=r"expected fewer than 2\^32 threads along x"):
        check_program(broken)


def test_what_fits_exactly_is_accepted() -> None:
    for change in (
        with_kernel("head", shared=232_448, num_warps=32),
        with_arg(2, {"shape": (0,), "offset": 256, "strides": None}),
        with_arg(2, {"strides": (0, 2)}),
        with_arg(2, {"shape": (2,), "offset": 4, "strides": (-1,)}),
        with_arg(3, 1, launch=1),
        with_launch(grid=(2**31 - 1, 65535, 65535)),
        with_changes(arena_bytes=4096 + 4 * tiny_ingot.VOCAB * 2),
    ):
        check_program(change(program()))


def limits(shared_bytes: int, warp: int, *rest: Any, **more: Any) -> DeviceInfo:
    """Those of a device."""
    names = dict(zip(("max_threads", "max_grid"), rest, strict=False)) | more
    most = {"max_threads": 1024, "max_grid": (2**31 - 1, 65535, 65535)}
    return DeviceInfo(0, "it", "cuda:sm_90", warp, 1 << 30, shared_bytes, **most | names)


@pytest.mark.parametrize(
    ("device", "refused"),
    [
        (limits(1024, 32, 256, (4, 2, 1)), None),
        (limits(1023, 32), "gather_kernel: bytes shared on it: .* to 1023, found 1024"),
        (limits(1024, 64, 256), "head_kernel: warps on it: .* to 4, found 8"),
        (limits(1024, 32, max_grid=(4, 1, 1)), "launch 1 .* grid y on it: .* to 1, found 2"),
    ],
)
def test_a_device_has_limits_of_its_own(device: DeviceInfo, refused: str | None) -> None:
    if refused is None:
        check_program(program(), device)
        return
    with pytest.raises(ProgramError, match=refused):
        check_program(program(), device)


def test_real_addresses_are_checked_like_those_of_the_plan() -> None:
    check_address("here", 48, Argument("*f32", 16))
    check_address("here", 12, Argument("*f32"))
    check_address("here", 3, Argument("*f4e2m1"))
    for address, taken, divisor in (
        (40, Argument("*f32", 16), 16),
        (6, Argument("*f32"), 4),
        (8, Argument("*f32", 3), 12),
    ):
        expected = f"^here: expected an address that {divisor} divides, found {address}$"
        with pytest.raises(ProgramError, match=expected):
            check_address("here", address, taken)


def test_launches_are_named_by_label_and_function() -> None:
    made = program()
    first, second = (launch_place(made, made.entries[1], i) for i in (0, 1))
    assert first == "entry T=4,L=2, launch 0 (e) of kernel gather_kernel"
    assert second == "entry T=4,L=2, launch 1 (linear model.lm_head) of kernel head_kernel"
    plain = with_launch(label="")(made)
    unnamed = launch_place(plain, plain.entries[0], 0)
    assert unnamed == "entry T=1,L=1, launch 0 of kernel gather_kernel"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Slice("x", "f32", (2, 3), 8), (8, 32)),
        (Slice("x", "f32", (2, 3), 8, (8, 1)), (8, 8 + 4 * 11)),
        (Slice("x", "f32", (2, 3), 8, (0, 1)), (8, 20)),
        (Slice("x", "bf16", (4,), 8, (-1,)), (2, 10)),
        (Slice("x", "f32", (0, 3), 8, (100, 1)), (8, 8)),
        (Slice("x", "f4e2m1", (3,), 1), (1, 3)),
        (Slice("x", "f4e2m1", (3,), 1, (2,)), (1, 4)),
    ],
)
def test_bytes_of_slices(part: Slice, expected: tuple[int, int]) -> None:
    assert byte_range(part) == expected


# ---- programs that codegen makes


@cache
def lowered(model: str) -> Program:
    """A tiny model for cuda:sm_90; its kernels are all there but for their code."""
    module = import_hugging_face(tiny_model(model, dtype=torch.bfloat16), dtype=None, max_tokens=64)
    passes = causal_lm(max_sequences=4, max_tokens_per_sequence=64)
    target = targets.target_of("cuda:sm_90")
    graph = for_target(run_pipeline(module.graph, passes)[-1].graph, target)
    backend = InterpretedBackend(target)
    bindings = [{"T": 4, "L": 4}, {"T": 32, "L": 4}]
    made = lower(graph, module.weights, target, bindings, ["logits"], backend=backend).program
    kernels = {
        id_: replace(kernel, binary=code_for(target.name), num_warps=backend.sources[id_].num_warps)
        for id_, kernel in made.kernels.items()
    }
    return replace(made, kernels=kernels)


@pytest.mark.parametrize("model", ["llama", "minicpm3"])
def test_what_codegen_makes_holds(model: str) -> None:
    made = lowered(model)
    check_program(made)
    args = [a for entry in made.entries for launch in entry.launches for a in launch.args]
    slices = [arg for arg in args if isinstance(arg, Slice)]
    # Latent attention looks at parts of its vectors.
    latent = model == "minicpm3"
    assert any(part.strides for part in slices) == any(part.offset for part in slices) == latent


def test_what_codegen_makes_is_as_tight_as_it_can_be() -> None:
    """An arena a byte too small, buffers a little off, or a kernel too few: each is refused."""
    made = lowered("llama")
    end = max(b.nbytes + (b.offset or 0) for entry in made.entries for b in entry.buffers)
    check_program(replace(made, arena_bytes=end))
    with pytest.raises(ProgramError, match=f"arena of {end - 1} bytes, found {end}"):
        check_program(replace(made, arena_bytes=end - 1))
    first = made.entries[0]
    off = tuple(replace(b, offset=(b.offset or 0) + 8) for b in first.buffers)
    moved = replace(with_entries(made, [replace(first, buffers=off)]), arena_bytes=end + 8)
    with pytest.raises(ProgramError, match="expected an address that 16 divides"):
        check_program(moved)
    used = first.launches[-1].kernel
    fewer = {id_: kernel for id_, kernel in made.kernels.items() if id_ != used}
    with pytest.raises(ProgramError, match="expected a kernel of the program"):
        check_program(replace(made, kernels=fewer))
