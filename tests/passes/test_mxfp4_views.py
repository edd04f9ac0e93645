"""Views of weights in MXFP4 move to their codes and scales; what would split a group stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.rewrite import Log, rewrite_all
from ingot.compiler.verify import verify
from ingot.compiler.weights import Weights
from ingot.passes.raising.canonicalize import Canonicalize
from ingot.passes.raising.mxfp4_views import RULES
from pass_checks import applied, graph_of

# Each rule once or more: what is done to w = mxfp4(@c, @s) : bf16[4, 6, 64] in groups of 32, and
# v, its like in another weight.
CASES = {
    "mxfp4-view": "view(%0, shape=[2, 12, 64])",
    "mxfp4-view-more-dims": "view(%0, shape=[2, 2, 3, 2, 64])",
    "mxfp4-permute": "permute(%0, dims=[1, 0, 2])",
    "mxfp4-slice": "slice(%0, dim=1, start=1, stop=6, step=2)",
    "mxfp4-slice-last": "slice(%0, dim=-1, start=32, stop=64)",
    "mxfp4-take": "take(%0, @rows)",
    "mxfp4-cat": "cat(%0, %1, dim=1)",
    "mxfp4-cat-last": "cat(%1, %0, dim=2)",
    "mxfp4-cast": "cast(%0, dtype='f32')",
    "mxfp4-cast-f16": "cast(%0, dtype='f16')",
}
DECLINED = {
    "a view that joins rows": ("view(%0, shape=[4, 384])", "bf16"),
    "a permute of the last dim": ("permute(%0, dims=[0, 2, 1])", "bf16"),
    "a slice within a group": ("slice(%0, dim=2, start=16, stop=64)", "bf16"),
    "a slice with a step": ("slice(%0, dim=2, start=0, stop=64, step=2)", "bf16"),
    "an empty slice": ("slice(%0, dim=2, start=32, stop=32)", "bf16"),
    "a cast from f16": ("cast(%0, dtype='bf16')", "f16"),
    "a cast to f64": ("cast(%0, dtype='f64')", "f32"),
    "a cast to integers": ("cast(%0, dtype='i32')", "bf16"),
    "a weight of other groups": ("cat(%0, %2, dim=0)", "bf16"),
    "a weight that is not packed": ("cat(%0, @dense, dim=0)", "bf16"),
}


def graph_with(line: str, dtype: str = "bf16") -> Graph:
    return graph_of(f"""
        graph @g() {{
          %0 = mxfp4(@c, @s, dtype='{dtype}')
          %1 = mxfp4(@d, @t, dtype='{dtype}')
          %2 = mxfp4(@c, @u, dtype='{dtype}')
          %3 = {line}
          return %3
        }} where {{
          @c: u8[4, 6, 32]
          @d: u8[4, 6, 32]
          @dense: bf16[4, 6, 64]
          @rows: i64[3]
          @s: u8[4, 6, 2]
          @t: u8[4, 6, 2]
          @u: u8[4, 6, 4]
        }}
    """)


def results(graph: Graph) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)

    def drawn(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    weights = Weights.of(
        {
            **{name: drawn(0, 256, 4, 6, 32) for name in ("c", "d")},
            **{name: drawn(0, 255, 4, 6, 2) for name in ("s", "t")},
            "u": drawn(0, 255, 4, 6, 4),
            "rows": torch.tensor([3, 0, 3]),
            "dense": torch.ones(4, 6, 64, dtype=torch.bfloat16),
        }
    )
    return interpret(graph, {}, weights).outputs[0]


@pytest.mark.parametrize("case", CASES)
def test_the_weight_stays_packed(case: str) -> None:
    before, log = graph_with(CASES[case]), Log()
    after = rewrite_all(before, RULES, log)
    verify(after)
    assert [name for name in log.matches if case.startswith(name)] == [*log.matches]
    assert after.outputs[0].op.name == "mxfp4"
    assert after.outputs[0].type == before.outputs[0].type
    expected, found = results(before), results(after)
    assert expected.dtype == found.dtype and torch.equal(expected, found)
    assert torch.equal(torch.signbit(expected), torch.signbit(found))


def test_every_rule_is_tested() -> None:
    assert {rule.name for rule in RULES} <= CASES.keys()


@pytest.mark.parametrize("case", DECLINED)
def test_declines(case: str) -> None:
    before, log = graph_with(*DECLINED[case]), Log()
    assert rewrite_all(before, RULES, log) is before
    assert not log.applied


def test_casts_at_the_ends_of_the_range() -> None:
    """Beyond what bf16 and f32 hold there is infinity, in both; f16 rounds what bf16 holds."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    for scale in (0, 1, 100, 103, 127, 141, 142, 252, 253, 254):
        weights = Weights.of({"c": codes, "s": torch.full((16, 1), scale, dtype=torch.uint8)})
        for before, after in (("bf16", "f32"), ("f32", "bf16"), ("f64", "f32"), ("bf16", "f16")):
            text = f"""
                graph @g() {{
                  %0 = mxfp4(@c, @s, dtype='{before}')
                  %1 = cast(%0, dtype='{after}')
                  return %1
                }} where {{
                  @c: u8[16, 16]
                  @s: u8[16, 1]
                }}
            """
            graph = graph_of(text)
            rewritten = rewrite_all(graph, RULES, log := Log())
            assert log.matches["mxfp4-cast"] == 1
            expected, found = (interpret(g, {}, weights).outputs[0] for g in (graph, rewritten))
            assert torch.equal(expected, found), (scale, before, after)


# gpt-oss: the model's parameter is [E, in, out], gate and up rows alternate.
GPT_OSS = """
    graph @g(%x: bf16[T, 64]) T=1..8 {
      %0 = mxfp4(@w.codes, @w.scales, dtype='bf16')
      %1 = permute(%0, dims=[0, 2, 1])
      %2 = permute(%1, dims=[0, 2, 1])
      %3 = slice(%2, dim=1, start=0, stop=6, step=2)
      %4 = slice(%2, dim=1, start=1, stop=6, step=2)
      %5 = cat(%3, %4, dim=1)
      %6 = slice(%5, dim=0, start=1, stop=2)
      %7 = view(%6, shape=[6, 64])
      %8 = linear(%x, %7)
      return %8
    } where {
      @w.codes: u8[4, 6, 32]
      @w.scales: u8[4, 6, 2]
    }
"""


def test_interleaved_experts(golden: Callable[[str], None]) -> None:
    before = graph_of(GPT_OSS)
    after, _ = applied(Canonicalize(), before)
    assert after.outputs[0].node.args[1].op.name == "mxfp4"
    golden(str(after))
    generator = torch.Generator().manual_seed(0)
    weights = Weights.of(
        {
            "w.codes": torch.randint(0, 256, (4, 6, 32), generator=generator, dtype=torch.uint8),
            "w.scales": torch.randint(120, 130, (4, 6, 2), generator=generator, dtype=torch.uint8),
        }
    )
    for tokens in (1, 3, 8):
        x = {"x": torch.randn(tokens, 64, generator=generator).bfloat16()}
        expected, found = (interpret(g, x, weights).outputs[0] for g in (before, after))
        assert torch.equal(expected, found)
