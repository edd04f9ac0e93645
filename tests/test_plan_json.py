"""Programs as JSON and back, and what a program must hold to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_ingot
from hypothesis import given
from hypothesis import strategies as st
from ingot.compiler import target as targets
from ingot.compiler.types import DTYPE_BITS
from ingot.runtime.buckets import Buckets
from ingot.runtime.check_program import LIMITS, ProgramError, check_program
from ingot.runtime.dtypes import DTYPES
from ingot.runtime.elf import EXPECTED, architecture
from ingot.runtime.plan_json import binary_name, entry_data, program_data, read_program
from ingot.runtime.program import Argument, Buffer, Entry, Kernel, Launch, Program, Slice
from ingot.runtime.strict_json import IngotError, read_json, write_json
from tiny_ingot import GFX950, SM_90, elf, program

# ---- the round trip

names = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=12)
sizes = st.integers(0, 2**40)
shapes = st.lists(sizes, max_size=4).map(tuple)
strides = st.lists(st.integers(-(2**40), 2**40), max_size=4).map(tuple)
slices = st.builds(Slice, names, names, shapes, sizes, st.none() | strides)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats()
kinds: Any = st.sampled_from(["input", "output", "weight", "state", "scratch"])
buffers = st.builds(Buffer, names, names, shapes, kinds, sizes, st.none() | sizes)
launches = st.builds(
    Launch,
    names,
    st.lists(slices | numbers, max_size=3).map(tuple),
    st.tuples(sizes, sizes, sizes),
    names,
)
facts: Any = st.dictionaries(names, st.integers() | names | st.booleans() | st.none(), max_size=2)
kernels = st.builds(
    Kernel,
    names,
    names,
    st.binary(max_size=8),
    sizes,
    sizes,
    st.lists(st.builds(Argument, names, sizes), max_size=3).map(tuple),
    st.booleans(),
    facts,
)
entries = st.builds(
    Entry,
    names,
    st.dictionaries(names, sizes, max_size=2),
    st.lists(buffers, max_size=3).map(tuple),
    st.lists(launches, max_size=3).map(tuple),
    st.lists(st.tuples(sizes, sizes), max_size=3).map(tuple),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any program by its types, most of which must never run."""
    made = {k.id: k for k in draw(st.lists(kernels, max_size=3))}
    own = {b.name: b for b in draw(st.lists(buffers, max_size=3))}
    some = tuple(draw(st.lists(entries, max_size=3)))
    return Program(draw(names), made, own, some, draw(sizes), draw(facts))


def through_json(made: Program) -> Program:
    codes = {
        binary_name(k.binary): k.binary
        for k in made.kernels.values()
        if isinstance(k.binary, bytes)
    }
    shared = read_json(write_json(program_data(made)), "shared", 1 << 20)
    plans = {
        f"entry {i}": read_json(write_json(entry_data(e)), "e", 1 << 20)
        for i, e in enumerate(made.entries)
    }
    return read_program(made.target, shared, plans, codes.__getitem__, "plan")


@given(programs())
def test_any_program_comes_back_equal(made: Program) -> None:
    # By text: nan is no equal of itself, and 1, 1.0 and True are.
    assert repr(through_json(made)) == repr(made)


def test_the_tiny_program_comes_back_and_may_run() -> None:
    assert through_json(program()) == program()
    check_program(program())
    Buckets(program())
    check_program(program("hip:gfx950", GFX950))


def test_a_program_of_python_is_not_written() -> None:
    broken = replace(program(), kernels={"f": Kernel("f", "f", print)})
    with pytest.raises(ValueError, match="kernel f: expected device code, found a builtin"):
        program_data(broken)


# ---- JSON from strangers

JSON: dict[str, tuple[bytes, str]] = {
    "not json": (b"{", "expected JSON"),
    "not utf-8": (b'"\xff"', "expected JSON"),
    "a key twice": (b'{"a":1,"a":2}', "expected every key once"),
    "nan": (b"[NaN]", "expected finite numbers, found NaN"),
    "infinity": (b"[-Infinity]", "found -Infinity"),
    "a float too large": (b"[1e999]", "expected finite numbers, found '1e999'"),
    "an integer of a megabyte": (b"1" * 10**6, "expected JSON"),
    "deep": (b"[" * 40 + b"]" * 40, "expected at most 32 levels"),
    "deeper than the stack": (b"[" * 10**6, "expected JSON"),
    "long": (b'"' + b"a" * 2**21 + b'"', "expected at most 1048576 bytes of JSON, found 2097154"),
}


@pytest.mark.parametrize("case", JSON)
def test_json_is_refused(case: str) -> None:
    data, expected = JSON[case]
    with pytest.raises(IngotError, match="^file: ") as caught:
        read_json(data, "file", 1 << 20)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


# ---- what a program must hold to


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
        return replace(made, entries=(replace(made.entries[0], **changes), *made.entries[1:]))

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
    "no entries": (with_changes(entries=()), "entries: expected at least one"),
    "entries alike": (
        lambda p: replace(p, entries=p.entries[:1] * 2),
        "expected names that differ",
    ),
    "kernel under another id": (
        lambda p: replace(p, kernels={"x": p.kernels["head"]}),
        "found head",
    ),
    "symbol": (with_kernel("head", symbol="a b"), "expected the name of a function"),
    "python": (with_kernel("head", binary=print), "expected device code, found a builtin"),
    "no ELF": (
        with_kernel("head", binary=b"MZ" * 50),
        "expected code for sm_90, found no ELF file",
    ),
    "another GPU": (with_kernel("head", binary=GFX950), "expected code for sm_90, found gfx950"),
    "another SM": (with_kernel("head", binary=elf(190, 0x6006402)), "found sm_100"),
    "warps": (with_kernel("head", num_warps=33), "num_warps: expected an integer from 1 to 32"),
    "no warps": (with_kernel("head", num_warps=0), "num_warps"),
    "shared": (with_kernel("head", shared=232_449), "expected an integer from 0 to 232448"),
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
    "symbols": (with_entry(symbols={"T": -1}), "symbol T: expected"),
    "unknown kernel": (with_launch(kernel="gone"), "expected a kernel of the program, found gone"),
    "grid": (with_launch(grid=(1, 65536, 1)), "grid y: expected an integer from 1 to 65535"),
    "empty grid": (with_launch(grid=(0, 1, 1)), "grid x: expected an integer from 1"),
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


# ---- what the runtime knows again, because it may not import the compiler


def test_the_runtime_knows_the_targets_and_the_dtypes() -> None:
    gpus = {name: t for name, t in targets.TARGETS.items() if t.is_gpu}
    assert EXPECTED.keys() == LIMITS.keys() == gpus.keys()
    assert {n: (x.warp, x.shared) for n, x in LIMITS.items()} == {
        n: (t.warp, t.shared_bytes) for n, t in gpus.items()
    }
    assert {name: d.bits for name, d in DTYPES.items()} == {
        name: bits for name, bits in DTYPE_BITS.items() if name != "c128"
    }


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (elf(190, 0x5A0D5A, abi=7), "sm_90"),
        (elf(190, 0x6005A04), "sm_90"),
        (elf(190, 0x600640A), "sm_100"),
        (elf(224, 0x54C), "gfx942"),
        (GFX950, "gfx950"),
        (elf(224, 0x52C), "an AMD GPU of number 0x2c"),
        (elf(62, 0), "an ELF file for machine 62"),
        (SM_90[:63], "no ELF file"),
        (b"", "no ELF file"),
        (SM_90[:4] + b"\x01" + SM_90[5:], "an ELF file that is not 64-bit little-endian"),
    ],
)
def test_architecture(code: bytes, found: str) -> None:
    assert architecture(code) == found


def test_json_is_plain() -> None:
    assert json.loads(write_json(program_data(program())))["arena_bytes"] == 8192
