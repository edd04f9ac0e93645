"""gather-logits: rows are taken as early as no other token needs the value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ingot.compiler.interpret import interpret, random_tensor
from ingot.compiler.ir import Graph
from ingot.passes.serving.gather_logits import GatherLogits
from pass_checks import applied, graph_of, ops, random_weights

END = """
    graph @end(%x: f32[T, 8], %y: f32[T, 8], %i: i64[T, 2], %rows: i32[L]) T=1..8 L=1..8 {{
      {lines}
      %t = take(%r, %rows)
      return %t{more}
    }} where {{
      @norm: f32[8]
      @w: f32[8, 8]
      @v: f32[16, 8]
      @b: f32[8]
      @up: f32[4, 12, 8]
      @down: f32[4, 8, 6]
    }}"""


def assert_equal(before: Graph, after: Graph) -> None:
    """Both give the same for rows that are permuted, repeated and left out."""
    weights = random_weights(before)
    generator = torch.Generator().manual_seed(1)
    for tokens, chosen in ((5, [3, 0, 3, 4]), (1, [0, 0]), (8, [7]), (4, [0, 1, 2, 3])):
        binding = {"T": tokens, "L": len(chosen)}
        inputs = {
            p.attrs["name"]: random_tensor(p.type.bind(binding), generator, 4)
            for p in before.params
        }
        inputs["rows"] = torch.tensor(chosen).int()
        expected, found = (interpret(g, inputs, weights).outputs for g in (before, after))
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def gathered(lines: str, more: str = "") -> tuple[Graph, list[str]]:
    before = graph_of(END.format(lines=lines, more=more))
    after, log = applied(GatherLogits(), before)
    assert_equal(before, after)
    return after, log.declined


def taken(graph: Graph) -> list[str]:
    """What rows are taken of: the op, or the name of the parameter."""
    sources = [n.args[0].node for n in graph.nodes() if n.op.name == "take"]
    return sorted(s.attrs.get("name", s.op.name) for s in sources)


MOVES = {
    "linear": "%r = linear(%x, @v)",
    "linear with a bias": "%r = linear(%x, @w, bias=@b)",
    "head_linear": (
        "%a = view(%x, shape=[T, 4, 2])\n%h = slice(@up, dim=2, start=0, stop=2)\n"
        "%r = head_linear(%a, %h)"
    ),
    "rms_norm": "%r = rms_norm(%x, weight=@norm, eps=1e-05)",
    "layer_norm": "%r = layer_norm(%x, weight=@norm, bias=@b, eps=1e-05)",
    "element-wise": "%a = tanh(%x)\n%c = mul(%a, f32(30.0))\n%r = cast(%c, dtype='f64')",
    "slices of columns": (
        "%a = slice(%x, dim=1, start=0, stop=4)\n%b = slice(%x, dim=-1, start=1, stop=8, step=2)\n"
        "%r = glu(%a, %b, activation='silu')"
    ),
    "a weight that is broadcast": "%r = add(%x, @b)",
    "a view that keeps the rows": (
        "%a = view(%x, shape=[T, 2, 4])\n%c = exp(%a)\n%r = view(%c, shape=[T, 8])"
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_before(name: str) -> None:
    after, _ = gathered(MOVES[name])
    assert taken(after) == ["x"]


def test_moves_before_both_operands() -> None:
    after, _ = gathered("%a = add(%x, %y)\n%r = glu(%a, %y, activation='silu')")
    assert taken(after) == ["x", "y"]


def test_moves_before_experts() -> None:
    lines = "%w = softmax(%z, dim=1)\n%r = experts(%x, %w, %i, @up, @down, activation='silu')"
    after, _ = gathered("%z = slice(%y, dim=1, start=0, stop=2)\n" + lines)
    assert taken(after) == ["i", "x", "y"]


def test_stops_at_attention() -> None:
    lines = "%a = view(%x, shape=[T, 2, 4])\n%o = attention(%a, %a, %a, scale=0.5)\n"
    after, _ = gathered(lines + "%f = view(%o, shape=[T, 8])\n%r = add(%f, %y)")
    assert taken(after) == ["attention", "y"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("%a = view(%x, shape=[4*T, 2])\n%r = exp(%a)", "does not keep the rows"),
        (
            "%a = view(%x, shape=[4*T, 2])\n%b = exp(%a)\n%r = view(%b, shape=[T, 8])",
            "does not keep the rows",
        ),
        ("%a = slice(%x, dim=0, start=0, stop=1)\n%r = add(%a, %y)", "does not have the rows"),
        ("%r = slice(%x, dim=0, start=0, stop=T)", "it works along the rows"),
        ("%r = aten.fliplr.default(%x)", "aten.fliplr.default: it has no axis rule"),
    ],
    ids=[
        "a view that mixes rows",
        "a view that makes rows of several",
        "an operand without the rows",
        "a slice of rows",
        "an op without an axis rule",
    ],
)
def test_declines(lines: str, reason: str) -> None:
    after, declined = gathered(lines)
    assert taken(after)[0] in ("add", "view", "slice", "aten.fliplr.default")
    assert reason in "\n".join(declined)


def test_declines_operands_that_are_broadcast_over_the_rows() -> None:
    """x [8] over rows [8]: of equal sizes, but not rows of the result."""
    before = graph_of("""
        graph @same(%x: f32[8], %y: f32[8, 8], %rows: i32[L]) T=1..8 L=1..8 {
          %r = add(%x, %y)
          %t = take(%r, %rows)
          return %t
        }""")
    after, log = applied(GatherLogits(), before)
    assert str(after) == str(before)
    assert "broadcast over the rows" in "\n".join(log.declined)


def test_stops_at_what_other_tokens_need() -> None:
    after, declined = gathered("%a = tanh(%x)\n%r = linear(%a, @v)", more=", %a")
    assert taken(after) == ["tanh"]
    assert "tanh inside the match is used outside" in "\n".join(declined)


def test_values_that_two_need_are_taken_once() -> None:
    """The residual sum feeds the norm and the last sum."""
    lines = "%a = linear(%x, @w)\n%n = rms_norm(%a, weight=@norm, eps=1e-05)\n%m = linear(%n, @w)\n"
    after, _ = gathered(lines + "%r = add(%a, %m)")
    assert ops(after) == {"take": 1, "linear": 2, "rms_norm": 1, "add": 1}
    assert taken(after) == ["x"]


def test_the_end_of_a_network(golden: Callable[[str], None]) -> None:
    lines = """
      %q = view(%x, shape=[T, 2, 4])
      %o = attention(%q, %q, %q, scale=0.5)
      %f = view(%o, shape=[T, 8])
      %s = add(%x, %f)
      %n = rms_norm(%s, weight=@norm, eps=1e-05)
      %g = linear(%n, @w)
      %h = glu(%g, %n, activation='silu')
      %m = add(%s, %h)
      %k = rms_norm(%m, weight=@norm, eps=1e-05)
      %l = linear(%k, @v)
      %d = div(%l, f32(30.0))
      %r = tanh(%d)"""
    golden(str(gathered(lines)[0]))
