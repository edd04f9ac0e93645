"""lay-out-weights: packed weights in the order of tensor cores, for those that take it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ingot.compiler.interpret import interpret, random_tensor
from ingot.compiler.ir import Graph
from ingot.compiler.ops.leaf import constant
from ingot.compiler.ops.mxfp4_fragments import mxfp4_fragments
from ingot.compiler.target import target_of
from ingot.compiler.weights import Weights
from ingot.passes.target.lay_out_weights import LayOutWeights
from pass_checks import applied, graph_of, ops, random_inputs

STEP, NVIDIA = LayOutWeights(), target_of("cuda:sm_90")
GRAPH = """
    graph @block(%x: bf16[T, 64], %i: i64[T], %chosen: i64[T, 2], %by: f32[T, 2]) T=1..8 {{
      {lines}
      return %r
    }} where {{
      @w: u8[32, 32]
      @s: u8[32, 2]
      @s16: u8[32, 4]
      @odd: u8[18, 32]
      @odd_s: u8[18, 2]
      @up: u8[8, 64, 32]
      @up_s: u8[8, 64, 2]
      @up_s16: u8[8, 64, 4]
      @even: u8[8, 32, 32]
      @even_s: u8[8, 32, 2]
      @down: u8[8, 64, 16]
      @down_s: u8[8, 64, 1]
      @heads: u8[2, 24, 16]
      @heads_s: u8[2, 24, 1]
    }}"""
SCALES = ("s", "s16", "odd_s", "up_s", "up_s16", "even_s", "down_s", "heads_s")
WEIGHT = "%w = mxfp4(@w, @s, dtype='bf16')\n"
EXPERTS = """%u = mxfp4(@up, @up_s, dtype='bf16')
%d = mxfp4(@down, @down_s, dtype='bf16')
%r = experts(%x, %by, %chosen, %u, %d, activation='silu'"""


def text(lines: str) -> str:
    return GRAPH.format(lines=lines)


def laid_out(lines: str) -> Graph:
    """The graph after the pass; it computes the same numbers, of any codes and scales."""
    before = graph_of(text(lines))
    after, _ = applied(STEP, before, NVIDIA)
    held: dict[str, torch.Tensor] = {}
    for node in before.nodes():
        if node.op is constant:
            low, high = (121, 128) if node.attrs["name"] in SCALES else (0, 256)
            held[node.attrs["name"]] = random_tensor(node.types[0], high=high, low=low)
    weights = Weights.of(held)
    for tokens in (1, 3, 8):
        inputs = random_inputs(before, {"T": tokens}, tokens)
        expected, found = (interpret(g, inputs, weights).outputs[0] for g in (before, after))
        assert expected.abs().max() > 0.1
        assert torch.equal(expected, found)
    return after


def test_one_weight_of_all_its_products(golden: Callable[[str], None]) -> None:
    """Products share what is packed once; gate and up rows lie otherwise, and numbers stay."""
    lines = f"""{WEIGHT}%a = linear(%x, %w)
        %b = linear(%x, %w, gate='silu')
        %c, %d = project_heads(%x, %w, heads=[3, 1], dims=[8, 8])
        %e = embedding(%i, %w)
        %f = slice(%e, dim=1, start=0, stop=32)
        %g = add(%a, %f)
        %h = cat(%g, %b, dim=1)
        %j = view(%c, shape=[T, 24])
        %r = cat(%h, %j, dim=1)"""
    after = laid_out(lines)
    assert ops(after)["mxfp4_fragments"] == ops(after)["mxfp4_tiled"] == 2
    golden(str(after))


def test_a_weight_of_each_head() -> None:
    lines = """%h = view(%x, shape=[T, 2, 32])
        %w = mxfp4(@down, @down_s, dtype='bf16')
        %v = slice(%w, dim=0, start=0, stop=2)
        %a = head_linear(%h, %v)
        %m = mxfp4(@heads, @heads_s, dtype='bf16')
        %b = head_linear(%h, %m)
        %r = cat(%a, %b, dim=2)"""
    after = laid_out(lines)
    (tiled,) = (n for n in after.nodes() if n.op.name == "mxfp4_tiled")
    assert tiled.types[0].shape == (2, 24, 32) and tiled.args[0].type.shape == (2, 2, 1, 1024)


def test_sources_are_those_of_the_weight() -> None:
    after = laid_out(f"{WEIGHT}%r = linear(%x, %w)")
    (made,) = (n for n in after.nodes() if n.op is mxfp4_fragments)
    (user,) = (n for n in after.nodes() if n.op.name == "mxfp4_tiled")
    assert made.source == user.source


def test_both_weights_of_experts(golden: Callable[[str], None]) -> None:
    after = laid_out(f"{EXPERTS})")
    golden(str(after))


def test_experts_without_gates() -> None:
    lines = EXPERTS.replace("@up, @up_s", "@even, @even_s").replace("'silu'", "'relu', gated=False")
    after = laid_out(f"{lines})")
    made = [n for n in after.nodes() if n.op is mxfp4_fragments]
    assert len(made) == 2 and not any("gated" in n.attrs for n in made)


OTHERS = {
    "experts in groups of 16": (
        EXPERTS.replace("@up_s", "@up_s16") + ")",
        "the weight is bf16 in mxfp4g16",
    ),
    "groups of 16": (
        "%w = mxfp4(@w, @s16, dtype='bf16')\n%r = linear(%x, %w)",
        "the weight is bf16 in mxfp4g16",
    ),
    "numbers of f32": (
        "%w = mxfp4(@w, @s, dtype='f32')\n%n = cast(%x, dtype='f32')\n%r = linear(%n, %w)",
        "the weight is f32 in mxfp4g32",
    ),
    "gate rows not in eights": (
        "%w = mxfp4(@odd, @odd_s, dtype='bf16')\n%r = linear(%x, %w, gate='silu')",
        "not in eights: 18 rows",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_that_stay(name: str) -> None:
    lines, reason = OTHERS[name]
    before = graph_of(text(lines))
    after, log = applied(STEP, before, NVIDIA)
    assert after is before
    (declined,) = log.declined
    assert reason in declined


def test_experts_of_one_packed_weight_stay() -> None:
    dense = EXPERTS.replace("%d = mxfp4(@down, @down_s, dtype='bf16')\n", "").replace(
        "%d", "@dense"
    )
    lines = text(f"{dense})").replace("@down: ", "@dense: bf16[8, 64, 32]\n      @down: ")
    before = graph_of(lines)
    assert applied(STEP, before, NVIDIA)[0] is before


@pytest.mark.parametrize("target", ["hip:gfx942", "cpu"])
@pytest.mark.parametrize("lines", [f"{WEIGHT}%r = linear(%x, %w)", f"{EXPERTS})"])
def test_other_targets_read_rows(target: str, lines: str) -> None:
    before = graph_of(text(lines))
    after, _ = applied(STEP, before, target_of(target))
    assert after is before
