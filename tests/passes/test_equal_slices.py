"""Slices of copies that expand made: M-RoPE over text is rope with one position a token."""

from __future__ import annotations

import pytest
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.validate import check_rewrite
from ingot.passes.raising.canonicalize import Canonicalize
from pass_checks import assert_equal_results, graph_of, ops

HEAD = """
graph @g(%positions: i64[T], %x: f32[3, T, 8]) T=1..9 {
  %0 = view(%positions, shape=[1, 1, T])
  %1 = expand(%0, shape=[3, 1, T])
  %2 = view(%1, shape=[3, 1, T, 1])
  %3 = cast(%2, dtype='f32')
  %4 = mul(%3, @frequencies)
  %c = cos(%4)
  %a = view(%c, shape=[3, T, 8])
"""
TAIL = "\n  return %r\n} where {\n  @frequencies: f32[8]\n}"
# M-RoPE as Qwen2-VL has it, in sections, and as Qwen3-VL has it, by turns.
ONE_POSITION = {
    "sections": """
        %s = slice(%a, dim=0, start=0, stop=1)
        %p = slice(%s, dim=2, start=0, stop=2)
        %t = slice(%a, dim=2, start=2, stop=8)
        %q = slice(%t, dim=0, start=2, stop=3)
        %r = cat(%p, %q, dim=2)
    """,
    "turns": """
        %s = slice(%a, dim=0, start=0, stop=1)
        %t = slice(%a, dim=0, start=1, stop=2)
        %u = slice(%t, dim=2, start=1, stop=6, step=3)
        %v = slice_scatter(%s, %u, dim=2, start=1, stop=6, step=3)
        %w = slice_scatter(%a, %v, dim=0, start=0, stop=1)
        %r = slice(%w, dim=0, start=0, stop=1)
    """,
}
# Where something differs, slices stay.
SEVERAL = {
    "another operand": """
        %y = add(%a, %x)
        %r = slice(%y, dim=0, start=1, stop=2)
    """,
    "along the tokens": "%r = slice(%a, dim=1, start=0, stop=1)",
    "a sum over the copies": """
        %y = softmax(%x, dim=0)
        %r = slice(%y, dim=0, start=1, stop=2)
    """,
    "put elsewhere": """
        %y = slice(%x, dim=2, start=0, stop=2)
        %r = slice_scatter(%x, %y, dim=2, start=1, stop=3)
    """,
}


def canonical(body: str) -> tuple[Graph, Graph]:
    graph = graph_of(f"{HEAD}{body}{TAIL}")
    after = run_pipeline(graph, [Canonicalize()], check=check_rewrite)[-1].graph
    assert_equal_results(graph, after)
    return graph, after


@pytest.mark.parametrize("name", ONE_POSITION)
def test_text_is_rotated_by_one_position(name: str) -> None:
    _, after = canonical(ONE_POSITION[name])
    assert ops(after) == {"cast": 1, "view": 2, "mul": 1, "cos": 1}


@pytest.mark.parametrize("name", SEVERAL)
def test_what_differs_stays(name: str) -> None:
    _, after = canonical(SEVERAL[name])
    assert any("slice" in n.op.name or n.op.name == "cat" for n in after.nodes())
