"""raise-ops on rotary embeddings, in the forms in which models write them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ingot.compiler.ir import Graph, Node
from ingot.compiler.pipeline import run_pipeline
from ingot.passes.pipelines import RAISING
from ingot.passes.raising.raise_ops import RaiseOps
from pass_checks import applied, assert_equal_results, checked, graph_of, ops

# Angles [T, 4], and tables from them: once, as halves that repeat, or with each element twice.
ANGLES = """
    %p = cast(%positions, dtype='f32')
    %col = view(%p, shape=[T, 1])
    %a = mul(%col, @inv)
"""
ONCE = (
    ANGLES
    + """
    %cos = cos(%a)
    %sin = sin(%a)
    %c = view(%cos, shape=[T, 1, 4])
    %s = view(%sin, shape=[T, 1, 4])
"""
)
TWICE = (
    ANGLES
    + """
    %e = cat(%a, %a, dim=1)
    %cos = cos(%e)
    %sin = sin(%e)
    %c = view(%cos, shape=[T, 1, 8])
    %s = view(%sin, shape=[T, 1, 8])
"""
)
EACH_TWICE = (
    ANGLES
    + """
    %cos = cos(%a)
    %sin = sin(%a)
    %cc = view(%cos, shape=[T, 1, 4, 1])
    %ss = view(%sin, shape=[T, 1, 4, 1])
    %ce = expand(%cc, shape=[T, 1, 4, 2])
    %se = expand(%ss, shape=[T, 1, 4, 2])
    %c = view(%ce, shape=[T, 1, 8])
    %s = view(%se, shape=[T, 1, 8])
"""
)
EACH_TWICE_BEFORE = (
    ANGLES
    + """
    %ac = view(%a, shape=[T, 4, 1])
    %ae = cat(%ac, %ac, dim=2)
    %e = view(%ae, shape=[T, 8])
    %cos = cos(%e)
    %sin = sin(%e)
    %c = view(%cos, shape=[T, 1, 8])
    %s = view(%sin, shape=[T, 1, 8])
"""
)
HALVES = """
    %lo = slice(%q, dim=2, start=0, stop=4)
    %hi = slice(%q, dim=2, start=4, stop=8)
"""
EVEN_ODD = """
    %lo = slice(%q, dim=2, start=0, stop=8, step=2)
    %hi = slice(%q, dim=2, start=1, stop=8, step=2)
"""
TURN_HALF = (
    HALVES
    + """
    %n = neg(%hi)
    %h = cat(%n, %lo, dim=2)
    %l = mul(%q, %c)
    %r = mul(%h, %s)
    %y = add(%l, %r)
"""
)
TURN_PAIRS = """
    %lc = mul(%lo, %c)
    %hs = mul(%hi, %s)
    %hc = mul(%hi, %c)
    %ls = mul(%lo, %s)
    %d = sub(%lc, %hs)
    %u = add(%hc, %ls)
    %y = cat(%d, %u, dim=2)
"""
TURN_INTERLEAVED = (
    EVEN_ODD
    + """
    %n = neg(%hi)
    %nc = view(%n, shape=[T, 2, 4, 1])
    %lc = view(%lo, shape=[T, 2, 4, 1])
    %h4 = cat(%nc, %lc, dim=3)
    %h = view(%h4, shape=[T, 2, 8])
    %l = mul(%q, %c)
    %r = mul(%h, %s)
    %y = add(%l, %r)
"""
)
COMPLEX = (
    ANGLES
    + """
    %one = full(value=1, shape=[T, 4], dtype='f32')
    %z = aten.polar.default(%one, %a)
    %t = view(%z, shape=[T, 1, 4])
    %w = view(%q, shape=[T, 2, 4, 2])
    %k = aten.view_as_complex.default(%w)
    %m = mul(%k, %t)
    %v = aten.view_as_real.default(%m)
    %y = view(%v, shape=[T, 2, 8])
"""
)
APART = """
    %w = view(%x, shape=[T, 2, 4, 2])
    %o = permute(%w, dims=[0, 1, 3, 2])
    %q = view(%o, shape=[T, 2, 8])
"""
WHOLE = "%q = mul(%x, f32(0.5))\n"


def rope_text(*parts: str, size: int = 8, result: str = "%y") -> str:
    head = f"graph @turn(%x: f32[T, 2, {size}], %positions: i32[T]) T=1..8 {{"
    return "\n".join((head, *parts, f"return {result}", "} where {", "@inv: f32[4]", "}"))


def turned(graph: Graph) -> Node:
    (node,) = (n for n in graph.nodes() if n.op.name == "rope")
    return node


def raised(text: str, tolerance: float = 2e-5) -> Graph:
    """The graph of `text`, canonical and raised; it computes what it computed before."""
    before = graph_of(text)
    after = run_pipeline(before, RAISING)[-1].graph
    assert_equal_results(before, after, tolerance)
    return after


FORMS = {
    "half": ("half", WHOLE + TWICE + TURN_HALF),
    "pairs of halves": ("half", WHOLE + ONCE + HALVES + TURN_PAIRS),
    "pairs of halves, long tables": (
        "half",
        WHOLE
        + TWICE.replace("%c =", "%cl =").replace("%s =", "%sl =")
        + "%c = slice(%cl, dim=2, start=0, stop=4)\n%s = slice(%sl, dim=2, start=0, stop=4)\n"
        + HALVES
        + TURN_PAIRS,
    ),
    "even and odd": ("deinterleaved", WHOLE + ONCE + EVEN_ODD + TURN_PAIRS),
    "interleaved": ("interleaved", WHOLE + EACH_TWICE + TURN_INTERLEAVED),
    "interleaved, repeated before": ("interleaved", WHOLE + EACH_TWICE_BEFORE + TURN_INTERLEAVED),
    "complex": ("interleaved", WHOLE + COMPLEX),
    "brought apart": ("deinterleaved", APART + TWICE + TURN_HALF),
}
LEFT_OVER = {"cos", "sin", "cat", "slice", "neg", "permute", "aten.polar.default"}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_one_op(name: str) -> None:
    form, text = FORMS[name]
    after = raised(rope_text(text))
    assert turned(after).attrs == {"form": form}
    assert ops(after)["rope_tables"] == 1
    assert not ops(after).keys() & LEFT_OVER


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 8), (4, 12), (2, 10)], ids=["at the start", "at the end", "between"]
)
@pytest.mark.parametrize("name", ["half", "even and odd", "interleaved", "complex"])
def test_part_of_the_dims(name: str, start: int, stop: int) -> None:
    form, text = FORMS[name]
    text = text.replace(WHOLE, f"%q = slice(%x, dim=2, start={start}, stop={stop})\n")
    spans = {"%low": (0, start), "%high": (stop, 12)}
    rest = {
        n: f"{n} = slice(%x, dim=2, start={a}, stop={b})" for n, (a, b) in spans.items() if a < b
    }
    parts = ", ".join(p for p in ("%low", "%y", "%high") if p in rest or p == "%y")
    joined = f"%out = cat({parts}, dim=2)"
    after = raised(rope_text(text, *rest.values(), joined, size=12, result="%out"))
    assert turned(after).attrs == {"form": form, **({"start": start} if start else {})}
    assert not ops(after).keys() & LEFT_OVER


def test_part_of_a_slice() -> None:
    """Query, key and value in one product: what is turned is part of a third of it."""
    text = FORMS["half"][1].replace(WHOLE, "%q = slice(%x, dim=2, start=4, stop=12)\n")
    rest = "%rest = slice(%x, dim=2, start=12, stop=16)\n%out = cat(%y, %rest, dim=2)"
    after = raised(rope_text(text, rest, size=24, result="%out"))
    assert turned(after).attrs == {"form": "half"}
    assert ops(after)["slice"] == 1


def test_scaled_tables(golden: Callable[[str], None]) -> None:
    text = TWICE.replace("%c = view(%cos", "%cs = mul(%cos, f32(1.25))\n%c = view(%cs")
    text = text.replace("%s = view(%sin", "%sn = mul(%sin, f32(1.25))\n%s = view(%sn")
    golden(str(checked(RaiseOps(), rope_text(WHOLE + text + TURN_HALF), 2e-5)))


def test_scaled_complex_tables() -> None:
    text = COMPLEX.replace("%t = view(%z", "%zs = mul(%z, c64(1.25))\n%t = view(%zs")
    after = checked(RaiseOps(), rope_text(WHOLE + text), 2e-5)
    tables = next(n for n in after.nodes() if n.op.name == "rope_tables")
    assert tables.attrs["scale"] == 1.25


def test_tables_rounded_to_bf16(golden: Callable[[str], None]) -> None:
    text = TWICE.replace("%c = view(%cos", "%cr = cast(%cos, dtype='bf16')\n%c = view(%cr")
    text = text.replace("%s = view(%sin", "%sr = cast(%sin, dtype='bf16')\n%s = view(%sr")
    text = rope_text("%q = add(%x, %x)" + text + TURN_HALF).replace("%x: f32", "%x: bf16")
    golden(str(checked(RaiseOps(), text, 2e-2)))


@pytest.mark.parametrize("halves", ["of x", "of x in f32"])
def test_turned_in_f32_and_rounded_once(halves: str) -> None:
    source = "x" if halves == "of x" else "q"
    turn = TURN_HALF.replace("(%q, dim", f"(%{source}, dim")
    if halves == "of x":
        turn = turn.replace("mul(%h, %s)", "mul(%hw, %s)")
        turn = turn.replace("%l =", "%hw = cast(%h, dtype='f32')\n%l =")
    wide = "%q = cast(%x, dtype='f32')"
    text = rope_text(wide + TWICE + turn, "%out = cast(%y, dtype='bf16')", result="%out")
    after = checked(RaiseOps(), text.replace("%x: f32", "%x: bf16"), 2e-2)
    assert ops(after) == {"rope_tables": 1, "rope": 1}
    assert turned(after).types[0].dtype == "bf16"


def test_rounded_to_another_dtype_stays_in_f32() -> None:
    wide = "%q = cast(%x, dtype='f32')"
    text = rope_text(wide + TWICE + TURN_HALF, "%out = cast(%y, dtype='f16')", result="%out")
    after = checked(RaiseOps(), text.replace("%x: f32", "%x: bf16"), 1e-2)
    assert turned(after).types[0].dtype == "f32"


# Near misses: what was changed, and the reason that is given, if the chain still looks like a rope.
MISSES = {
    "halves that differ": (
        WHOLE
        + TWICE.replace("cat(%a, %a", "cat(%a, %col4").replace(
            "%e =", "%col4 = add(%a, f32(1.0))\n%e ="
        )
        + TURN_HALF,
        "the halves of a table differ",
    ),
    "the other half negated": (
        WHOLE + TWICE + TURN_HALF.replace("neg(%hi)", "neg(%lo)").replace("(%n, %lo", "(%n, %hi"),
        "neither halves nor even and odd",
    ),
    "the sign of the sine": (WHOLE + TWICE + TURN_HALF.replace("add(%l, %r)", "sub(%l, %r)"), ""),
    "pairs with the signs changed": (
        WHOLE
        + ONCE
        + HALVES
        + TURN_PAIRS.replace("sub(%lc", "add( %lc").replace(" add(%hc", " sub(%hc"),
        "",
    ),
    "pairs joined along the heads": (
        WHOLE + ONCE + HALVES + TURN_PAIRS.replace("%u, dim=2", "%u, dim=1"),
        "not joined along the last dim",
    ),
    "another value turned": (
        WHOLE + TWICE + TURN_HALF.replace("%l = mul(%q, %c)", "%l = mul(%x, %c)"),
        "not the value itself, half by half",
    ),
    "a table that differs between heads": (
        WHOLE + TWICE.replace("%c = view(%cos, shape=[T, 1, 8])", "%c = mul(%x, %x)") + TURN_HALF,
        "differs between heads",
    ),
    "a table that is not known to repeat": (
        WHOLE + TWICE.replace("cos(%e)", "exp(%e)") + TURN_HALF,
        "not known to repeat itself",
    ),
    "interleaved with tables of halves": (
        WHOLE + TWICE + TURN_INTERLEAVED,
        "does not repeat each element",
    ),
    "polar with other absolute values": (
        WHOLE + COMPLEX.replace("value=1,", "value=2,"),
        "absolute values are not 1",
    ),
    "complex numbers of another kind": (
        WHOLE + COMPLEX.replace("aten.polar.default(%one, %a)", "aten.complex.default(%one, %a)"),
        "not made by polar",
    ),
    "parts in another order": (
        "%q = slice(%x, dim=2, start=0, stop=8)\n"
        + TWICE
        + TURN_HALF.replace("(%q, dim", "(%x, dim")
        + "%rest = slice(%x, dim=2, start=8, stop=12)\n%out = cat(%rest, %y, dim=2)",
        "not one value in order",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_declines(name: str) -> None:
    text, reason = MISSES[name]
    wide = "%out" in text
    before = graph_of(rope_text(text, size=12 if wide else 8, result="%out" if wide else "%y"))
    after, log = applied(RaiseOps(), before)
    assert_equal_results(before, after, 2e-5)
    if name == "parts in another order":
        assert ops(after)["cat"] == 1
    else:
        assert ops(after)["rope"] == 0
    assert reason in "\n".join(log.declined)


def test_tables_of_two_origins_stay_tables() -> None:
    """cos and sin changed places: still a rope, but not of rope_tables."""
    text = WHOLE + TWICE.replace("cos(", "COS(").replace("sin(", "cos(").replace("COS(", "sin(")
    after = checked(RaiseOps(), rope_text(text + TURN_HALF), 2e-5)
    assert ops(after)["rope"] == 1
    assert ops(after)["rope_tables"] == 0


def test_what_others_use_is_declined() -> None:
    before = graph_of(rope_text(WHOLE + TWICE + TURN_HALF, result="%y, %h"))
    after, log = applied(RaiseOps(), before)
    assert ops(after)["rope"] == 0
    assert "used outside" in "\n".join(log.declined)
