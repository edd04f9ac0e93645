"""fuse-elementwise: element-wise ops over one shape become convex regions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.ops.leaf import literal, param
from ingot.compiler.ops.region import STEP_OPS
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.text import parse, same_structure
from ingot.compiler.validate import check_rewrite
from ingot.compiler.weights import Weights
from ingot.passes.target.fuse_elementwise import LARGEST, FuseElementwise, fusible, grouped
from pass_checks import applied, graph_of, ops, random_inputs
from random_regions import dags

STEP = FuseElementwise()


def assert_same(before: Graph, after: Graph, tokens: int) -> None:
    """Bit for bit: a step rounds as its op does."""
    inputs = random_inputs(before, {"T": tokens}, tokens)
    expected, found = (interpret(g, inputs, Weights({})).outputs for g in (before, after))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


def fused(text: str) -> Graph:
    before = graph_of(text)
    after = run_pipeline(before, (STEP,), check=check_rewrite)[-1].graph
    assert same_structure(parse(str(after)), after)
    for tokens in (1, 3, 8):
        assert_same(before, after, tokens)
    return after


def test_a_chain_with_numbers_and_casts(golden: Callable[[str], None]) -> None:
    """What others read is a result too; a number stands in the body with its dtype."""
    after = fused("""
        graph @chain(%x: bf16[T, 40], %w: bf16[40], %c: bf16[T, 1]) T=1..64 {
          %0 = mul(%x, %c)
          %1 = add(%0, %w)
          %2 = mul(bf16(0.3), %1)
          %3 = cast(%2, dtype='f32')
          %4 = mul(%3, f32(0.3))
          %5 = lt(%4, f32(inf))
          %6 = where(%5, %4, %3)
          %7 = arange(start=0, stop=T, step=1, dtype='i64')
          %8 = cast(%7, dtype='f32')
          return %6, %2, %8
        }""")
    assert ops(after) == {"region": 2}
    golden(str(after))


def test_a_region_that_would_wait_for_itself_is_not_made() -> None:
    """The softmax waits for neg, and add for the softmax."""
    after = fused("""
        graph @detour(%x: f32[T, 8]) T=1..64 {
          %0 = neg(%x)
          %1 = softmax(%0, dim=-1)
          %2 = add(%0, %1)
          %3 = mul(%2, %0)
          return %3
        }""")
    assert ops(after) == {"neg": 1, "softmax": 1, "region": 1}


STAY = {
    "another shape": "%0 = neg(%y)\n%1 = add(%x, %0)",
    "dtypes that kernels do not know": "%0 = cast(%x, dtype='c128')\n%1 = mul(%0, %0)",
    "no arithmetic between": "%0 = neg(%x)\n%2 = softmax(%0, dim=-1)\n%1 = exp(%2)",
}


@pytest.mark.parametrize("name", STAY)
def test_ops_that_stay_alone(name: str) -> None:
    before = graph_of(
        f"graph @g(%x: f32[T, 8], %y: f32[T, 1]) T=1..64 {{\n{STAY[name]}\nreturn %1\n}}"
    )
    after, log = applied(STEP, before)
    assert after is before and not log.applied


def test_a_long_chain_is_cut() -> None:
    steps = "\n".join(f"%{i + 1} = neg(%{i})" for i in range(40))
    after = fused(f"graph @long(%x: f32[T]) T=1..64 {{\n%0 = abs(%x)\n{steps}\nreturn %40\n}}")
    sizes = [len(n.attrs["steps"]) for n in after.nodes() if n.op.name == "region"]
    assert sizes == [LARGEST, LARGEST, 41 - 2 * LARGEST]


@given(dags(), st.sampled_from((1, 2, 5)))
@settings(max_examples=60, deadline=None)
def test_any_dag(graph: Graph, tokens: int) -> None:
    nodes = [n for n in graph.nodes() if n.op not in (param, literal)]
    groups = grouped(nodes)
    assert Counter(n for g in groups for n in g) == Counter(nodes)
    for group in groups:
        assert len(group) == 1 or all(map(fusible, group))
        assert len({n.types[0].shape for n in group}) == 1
    # A region that is not convex would need its own results.
    after, _ = applied(STEP, graph)
    assert same_structure(parse(str(after)), after)
    assert_same(graph, after, tokens)
    kept = Counter(n.op.name for g in groups if len(g) == 1 for n in g)
    left = ops(after)
    assert left.pop("region", 0) == sum(len(g) > 1 for g in groups)
    assert left == kept and kept.keys() - STEP_OPS.keys() <= {"amax"}
