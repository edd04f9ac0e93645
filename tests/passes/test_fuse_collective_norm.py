"""fuse-collective-norm: sum and norm in one op, with the collective before them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ingot.compiler.ir import Graph
from ingot.compiler.ranks import interpret_ranks
from ingot.passes.fusion.fuse_collective_norm import FuseCollectiveNorm
from pass_checks import applied, body, checked, graph_of, ops, random_weights

GRAPH = """
    graph @block(%x: f32[T, 8], %d: f32[T, 8], %row: f32[8], %p: f32[T, 2], %i: i64[T, 2]) T=1..8 {{
      {lines}
      return %r{more}
    }} where {{
      @n: f32[8]
      @post: f32[8]
      @w: f32[6, 8]
      @sq: f32[8, 8]
      @both: f32[12, 8]
      @up: f32[8, 12, 8]
      @down: f32[8, 8, 6]
    }}"""

ADD = "%s = add(%x, %d)\n"
NORM = "%h = rms_norm(%s, weight=@n, eps=0.01)\n"
THREE = """%q = linear(%h, @w)
    %k = linear(%h, @w)
    %v = linear(%h, @w)
    %a = add(%q, %k)
    %r = add(%a, %v)
    """
ONE = "%r = linear(%h, @w)\n"
L = "%l = linear(%d, @sq)\n"
EXPERTS = "%e = experts(%d, %p, %i, @up, @down, activation='silu')\n"


def text(lines: str, more: str = "") -> str:
    return GRAPH.format(lines=lines, more=more)


# ---- without a collective


@pytest.mark.parametrize("more", ["", ", %s", ", %h", ", %s, %h"])
@pytest.mark.parametrize("order", ["%x, %d", "%d, %x"])
def test_several_products_of_the_norm(order: str, more: str) -> None:
    lines = ADD.replace("%x, %d", order) + NORM + THREE
    after = checked(FuseCollectiveNorm(), text(lines, more))
    assert ops(after) == {"add_rms_norm": 1, "linear": 3, "add": 2}


def test_sum_and_norm(golden: Callable[[str], None]) -> None:
    golden(str(checked(FuseCollectiveNorm(), text(ADD + NORM + THREE, ", %s"))))


def test_a_norm_that_no_product_reads() -> None:
    after = checked(FuseCollectiveNorm(), text(ADD + NORM + "%r = tanh(%h)", ", %s"))
    assert ops(after) == {"add_rms_norm": 1, "tanh": 1}


def test_a_norm_that_is_returned_goes_into_no_product() -> None:
    after = checked(FuseCollectiveNorm(), text(ADD + NORM + ONE, ", %h"))
    assert ops(after) == {"add_rms_norm": 1, "linear": 1}


def test_a_product_that_has_another_user_takes_no_sum() -> None:
    lines = L + ADD.replace("%d", "%l") + NORM + THREE
    assert ops(checked(FuseCollectiveNorm(), text(lines, ", %l")))["add_rms_norm"] == 1


@pytest.mark.parametrize("more", ["%t = tanh(%s)\n%r = add(%t, %h)", "%r = add(%h, %h)"])
def test_others_may_use_the_sum(more: str) -> None:
    after = checked(FuseCollectiveNorm(), text(ADD + NORM + more))
    assert ops(after)["add_rms_norm"] == 1


SUM_OF = "the sum goes into the epilogue of a product"
DECLINES = {
    "the sum is a linear's": (L + ADD.replace("%d", "%l") + NORM + THREE, ", %s", SUM_OF),
    "the sum is a linear's, first": (
        L + ADD.replace("%x, %d", "%l, %x") + NORM + THREE,
        ", %s",
        SUM_OF,
    ),
    "the sum is the experts'": (EXPERTS + ADD.replace("%d", "%e") + NORM + THREE, "", SUM_OF),
    "the sum is two products'": (
        L + EXPERTS + "%both = add(%l, %e)\n" + ADD.replace("%d", "%both") + NORM + THREE,
        "",
        SUM_OF,
    ),
    "the norm is a linear's": (
        ADD + NORM + ONE,
        ", %s",
        "the norm goes into the prologue of a product",
    ),
    "the norm is that of a linear with a gate": (
        ADD + NORM + "%r = linear(%h, @both, gate='silu')",
        ", %s",
        "the norm goes into the prologue of a product",
    ),
    "a row": (
        ADD.replace("%d", "%row") + NORM + THREE,
        "",
        "f32[T, 8] and f32[8] are broadcast in their sum",
    ),
    "a row that is reduced": (
        "%c = all_reduce(%row, ranks=2)\n" + ADD.replace("%d", "%c") + NORM + THREE,
        "",
        "are broadcast in their sum",
    ),
    "a collective that has another user": (
        "%c = all_reduce(%d, ranks=2)\n" + ADD.replace("%d", "%c") + NORM + ONE,
        ", %c",
        "all_reduce inside the match is used outside",
    ),
    "a collective that is added to itself": (
        "%c = all_reduce(%d, ranks=2)\n%s = add(%c, %c)\n" + NORM + ONE,
        "",
        "the all_reduce is added to itself",
    ),
}


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name: str) -> None:
    lines, more, reason = DECLINES[name]
    before = graph_of(text(lines, more))
    after, log = applied(FuseCollectiveNorm(), before)
    assert str(after) == str(before)
    assert reason in "\n".join(log.declined)


# ---- with a collective


def assert_equal_over_ranks(before: Graph, after: Graph, ranks: int = 2) -> None:
    """Every rank has its own delta and computes the same from before and after."""
    weights = random_weights(before)
    for tokens in (1, 3, 8):
        given = []
        for rank in range(ranks):
            generator = torch.Generator().manual_seed(10 * tokens)
            inputs = {"x": torch.randn(tokens, 8, generator=generator)}
            generator.manual_seed(rank)
            inputs["d"] = torch.randn(tokens, 8, generator=generator)
            inputs |= {"row": torch.ones(8), "p": torch.ones(tokens, 2)}
            given.append({**inputs, "i": torch.zeros(tokens, 2, dtype=torch.int64)})
        expected, found = (interpret_ranks([g] * ranks, given, weights) for g in (before, after))
        for a, b in zip(expected, found, strict=True):
            for x, y in zip(a.outputs, b.outputs, strict=True):
                torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


REDUCE = "%c = all_reduce(%d, ranks=2)\n"


@pytest.mark.parametrize("order", ["%x, %c", "%c, %x"])
@pytest.mark.parametrize("reader", [ONE, THREE, "%r = tanh(%h)\n"], ids=["one", "three", "none"])
def test_a_collective_always(reader: str, order: str) -> None:
    before = graph_of(text(REDUCE + ADD.replace("%x, %d", order) + NORM + reader, ", %s"))
    after, _ = applied(FuseCollectiveNorm(), before)
    assert not ops(after).keys() & {"all_reduce", "rms_norm"}
    (node,) = (n for n in after.nodes() if n.op.name == "add_rms_norm")
    assert node.attrs["ranks"] == 2
    assert_equal_over_ranks(before, after)


def test_a_row_parallel_product(golden: Callable[[str], None]) -> None:
    lines = f"{L}{REDUCE.replace('%d', '%l')}{ADD.replace('%d', '%c')}{NORM}{ONE}"
    after, _ = applied(FuseCollectiveNorm(), graph_of(text(lines, ", %s")))
    golden(str(after))


def test_a_norm_between_collective_and_sum_stays() -> None:
    """Sandwich norms: what is added is normed after the ranks' sum."""
    lines = (
        f"{REDUCE}%n = rms_norm(%c, weight=@post, eps=0.1)\n{ADD.replace('%d', '%n')}{NORM}{ONE}"
    )
    before = graph_of(text(lines))
    after, _ = applied(FuseCollectiveNorm(), before)
    assert body(after) == body(before)
