"""Programs as JSON and back."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.runtime.artifact.plan_json import (
    entry_json,
    program_json,
    read_program,
)
from ingot.runtime.artifact.strict_json import IngotError, decode, read_json
from ingot.runtime.devices.check_program import check_program
from ingot.runtime.program import (
    Argument,
    Buffer,
    Entry,
    Function,
    Kernel,
    Launch,
    Program,
    Slice,
    Spec,
)
from ingot.runtime.serving.abi import ServingAbi
from msgspec.structs import replace
from tiny_ingot import GFX950, program

# ---- the round trip

names = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=12)
sizes = st.integers(0, 2**40)
shapes = st.lists(sizes, max_size=4).map(tuple)
strides = st.lists(st.integers(-(2**40), 2**40), max_size=4).map(tuple)
slices = st.builds(Slice, names, names, shapes, sizes, st.none() | strides)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats()
kinds: Any = st.sampled_from(["input", "output", "weight", "state", "counter", "scratch"])
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
    st.dictionaries(names, sizes, max_size=2),
    st.lists(buffers, max_size=3).map(tuple),
    st.lists(launches, max_size=3).map(tuple),
    st.lists(st.tuples(sizes, sizes), max_size=3).map(tuple),
)
specs = st.dictionaries(
    names, st.builds(Spec, names, st.lists(sizes | names, max_size=3).map(tuple)), max_size=2
)
functions = st.builds(
    Function,
    st.dictionaries(names, st.tuples(sizes, sizes), max_size=2),
    specs,
    specs,
    st.lists(names, max_size=2).map(tuple),
    st.lists(entries, max_size=2).map(tuple),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any program by its types, most of which must never run."""
    made = {k.id: k for k in draw(st.lists(kernels, max_size=3))}
    own = {b.name: b for b in draw(st.lists(buffers, max_size=3))}
    some = draw(st.dictionaries(names, functions, max_size=2))
    return Program(draw(names), made, own, some, draw(sizes), draw(facts))


def through_json(made: Program) -> Program:
    codes = {sha256(k.binary).hexdigest(): k.binary for k in made.kernels.values()}
    shared = read_json(program_json(made), "shared", 1 << 20)
    plans = [
        (name, "entry", read_json(entry_json(entry), "e", 1 << 20))
        for name, function in made.functions.items()
        for entry in function.entries
    ]
    return read_program(shared, plans, codes.__getitem__, "plan")


@given(programs())
def test_any_program_comes_back_equal(made: Program) -> None:
    # By text: nan is no equal of itself, and 1, 1.0 and True are.
    assert repr(through_json(made)) == repr(made)


def test_the_tiny_program_comes_back_and_may_run() -> None:
    assert through_json(program()) == program()
    check_program(program())
    ServingAbi(program())
    check_program(program("hip:gfx950", GFX950))


def test_a_program_of_python_is_not_written() -> None:
    broken = replace(program(), kernels={"f": Kernel("f", "f", print)})
    with pytest.raises(ValueError, match="kernel f: expected device code, found a builtin"):
        program_json(broken)


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
        decode(data, Any, "file", 1 << 20)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_json_is_plain() -> None:
    assert json.loads(program_json(program()))["arena_bytes"] == 8192
